"""Optimizers by name. One that lives in a package of its own is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import TrainingError
from .settings import Settings


@dataclass(frozen=True)
class Kind:
    module: str
    cls: str
    package: str
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)


OPTIMIZERS = {
    "adamw": Kind("torch.optim", "AdamW", "torch", 5e-4),
    "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", 5e-4),
    # finds its own rate; the settings' one multiplies it
    "prodigy": Kind(
        "prodigyopt", "Prodigy", "prodigyopt", 1.0,
        {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True},
    ),
}  # fmt: skip


def check(name: str) -> Any:
    """The class of that name; TrainingError where it is unknown or its package is missing."""
    if name not in OPTIMIZERS:
        raise TrainingError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")
    kind = OPTIMIZERS[name]
    try:
        return getattr(importlib.import_module(kind.module), kind.cls)
    except ImportError as error:
        raise TrainingError(
            f"optimizer: {name} needs {kind.package}: pip install {kind.package} ({error})"
        ) from error


def rate(settings: Settings) -> float:
    """The top of the learning rate, told or the optimizer's own."""
    told = settings.learning_rate
    return OPTIMIZERS[settings.optimizer].learning_rate if told is None else told


def build(settings: Settings, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    kind = OPTIMIZERS[settings.optimizer]
    return check(settings.optimizer)(
        parameters,
        lr=rate(settings),
        weight_decay=settings.weight_decay,
        **kind.options,
    )


def schedule(settings: Settings, optimizer: torch.optim.Optimizer) -> Any:
    """diffusers' learning-rate schedule of that name, counted in optimizer steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.schedule, optimizer, num_warmup_steps=settings.warmup,
        num_training_steps=settings.steps,
    )  # fmt: skip
