"""What an adapter file says of its base beside names and shapes: some weights, which a load
compares, and where the adapter comes from, for people.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import hub
from .adapter_file import AdapterFile, refuse
from .attention_weights import stock_values
from .checks import describe
from .processors import family_of
from .whereabouts import unreadable_weight, why_absent

logger = logging.getLogger("a3fta_kernels")

_SAMPLED_LAYERS = 16
_SAMPLES_PER_LAYER = 16
# rounding to bf16 moves a value by 2^-8 of itself at most, to fp16 by 2^-11 or, near zero, 2^-25;
# one copy of the weights may have been through either
_RELATIVE = 1.25 * 2.0**-8
_ABSOLUTE = 2.0**-24


def samples(root: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, list[float | None]]:
    """Some weights of some layers: enough to tell one base from another at little cost."""
    weights = _base_weights(root, layers)
    keys = sorted(key for key, weight in weights.items() if _readable(weight))
    step = max(1, math.ceil(len(keys) / _SAMPLED_LAYERS))
    return {key: _sampled(weights[key]) for key in keys[::step]}


def _base_weights(root: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """The weights of the base, also of a layer that trains."""
    stock = stock_values(root)
    return {key: stock.get(f"{key}.weight", layer.weight) for key, layer in layers.items()}


def _readable(weight: Tensor) -> bool:
    return unreadable_weight(weight) is None and why_absent(weight) is None


def _sampled(weight: Tensor) -> list[float | None]:
    """Weights at even distances."""
    count = min(_SAMPLES_PER_LAYER, weight.numel())
    places = torch.arange(count, device=weight.device) * (weight.numel() - 1) // max(1, count - 1)
    values = weight.detach().reshape(-1)[places].double().tolist()
    return [value if math.isfinite(value) else None for value in values]


def check_samples(
    file: AdapterFile, root: nn.Module, layers: Mapping[str, nn.Linear], allow_other_base: bool
) -> None:
    compared = 0
    weights = _base_weights(root, layers)
    for key, stored in file.samples.items():
        if key not in layers or not isinstance(stored, list):
            refuse(file.path, "samples of adapted layers", f"samples of {key}: {stored!r:.80}")
        if not _readable(weights[key]):
            continue
        compared += 1
        here = _sampled(weights[key])
        if len(stored) != len(here):
            refuse(file.path, f"{len(here)} samples of {key}", f"{len(stored)}")
        for a, b in zip(stored, here, strict=True):
            if allow_other_base or _close(a, b):
                continue
            refuse(
                file.path,
                f"an adapter for this base, with {b} in {key}.weight",
                f"one for another, with {a} there; allow_other_base=True accepts it",
            )
    if not compared:
        logger.info(
            "%s: the base's weights were not compared, they are not at hand in a plain dtype "
            "(offloaded, quantized or cast for storage); names and shapes fit",
            file.path,
        )


def _close(a: Any, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, bool) or not isinstance(a, (int, float)):
        return False
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def about(root: nn.Module, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where the adapter comes from, for people; nothing that is only true on this machine."""
    family = family_of(root)
    name = getattr(getattr(root, "config", None), "_name_or_path", None)
    known = isinstance(name, str) and hub.is_repository(name)
    found = {
        "family": family.name,
        "base": name if known else None,
        "versions": {
            package: module.__version__
            for package in ("torch", "diffusers", "peft")
            if (module := sys.modules.get(package)) is not None
        },
    }
    if training is not None:
        if not isinstance(training, Mapping):
            raise TypeError(f"training: expected a dict, got {describe(training)}")
        try:
            found["training"] = json.loads(json.dumps(dict(training), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"training: expected settings of JSON's types, got some that are not: {error}"
            ) from error
    return found
