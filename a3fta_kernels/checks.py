"""Argument checks. Every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


def describe(value: Any) -> str:
    """A short description of a received value for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(value)}")


def check_shape(name: str, value: torch.Tensor | None, shape: Sequence[int], meaning: str) -> None:
    """`meaning` names the axes, e.g. "(R, C) = (rank, channels)"."""
    if value is not None and value.shape != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, {meaning}, got {tuple(value.shape)}"
        )


def check_device(name: str, value: torch.Tensor | None, device: torch.device, like: str) -> None:
    if value is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device} (that of {like}), got {value.device}")


def check_dtype(
    name: str, value: torch.Tensor | None, allowed: Collection[torch.dtype], why: str = ""
) -> None:
    if value is not None and value.dtype not in allowed:
        listing = ", ".join(str(d) for d in allowed)
        raise TypeError(
            f"{name}: expected dtype {listing}{f' ({why})' if why else ''}, got {value.dtype}"
        )


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
