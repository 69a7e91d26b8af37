"""The families of pipelines that can be trained, and how one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError
from .family import Crop, Family, Row, stack
from .flux import Flux
from .sd3 import StableDiffusion3
from .stable_diffusion import StableDiffusion, StableDiffusionXL
from .unconditional import Unconditional
from .z_image import ZImage

__all__ = ["FAMILIES", "Crop", "Family", "Row", "load", "stack"]

FAMILIES: tuple[type[Family], ...] = (
    Unconditional,
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    ZImage,
)


def load(model: str, dtype: torch.dtype, variant: str = "") -> Family:
    """The pipeline of that folder, or of that name on the hub, on the CPU; `variant`: of its files.

    Raises TrainingError where it cannot be read, or is of no known family.
    """
    kinds = {name: family for family in FAMILIES for name in family.pipelines}
    path = Path(model)
    if path.exists() and not (path / "model_index.json").is_file():
        raise TrainingError(
            f"model: expected a pipeline's folder, as save_pretrained writes it, got {model} "
            f"without a model_index.json"
        )
    # the index first: it is small, and a pipeline of another kind need not be downloaded
    index = _index(model)
    kind = index.get("_class_name")
    if kind not in kinds:
        raise TrainingError(f"model: expected one of {', '.join(kinds)}, got {kind} ({model})")
    return kinds[kind](_read(model, index, dtype, variant))


def _index(model: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(model))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(model, error) from error


def _read(model: str, index: dict[str, Any], dtype: torch.dtype, variant: str) -> Any:
    from diffusers import DiffusionPipeline

    # diffusers saves a pipeline without a part, but loads it only when told of that
    absent = {name: None for name, value in index.items() if value == [None, None]}
    try:
        return DiffusionPipeline.from_pretrained(
            model, dtype=dtype, variant=variant or None, **absent
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(model, error) from error


def _unreadable(model: str, error: Exception) -> TrainingError:
    told = " ".join(str(error).split())  # diffusers' is of several lines
    return TrainingError(f"model: {model} cannot be loaded: {told}")
