"""The checks that the ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_choice, check_device, check_dtype, check_shape, check_tensor, describe
from .activations import ACTIVATIONS
from .rule import autocasts

# what an op keeps of its input for the backward: the input, or its 8-bit copy by `quantize`
KEEPS = ("input", "int8")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_input(h: Tensor, name: str = "h") -> None:
    check_tensor(name, h)
    if h.dim() < 1:
        raise ValueError(f"{name}: expected shape (..., C), got {tuple(h.shape)}")
    if h.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one channel, got shape {tuple(h.shape)}")
    check_dtype(name, h, FLOATS)


def check_base(h: Tensor, base: Tensor | None) -> int:
    """Checks what is added to, apart from h; returns its channels, or h's where there is none."""
    if base is None:
        return h.shape[-1]
    check_tensor("base", base)
    if base.dim() != h.dim() or base.shape[:-1] != h.shape[:-1] or base.shape[-1] == 0:
        raise ValueError(
            f"base: expected shape (..., N) beside h {tuple(h.shape)}, got {tuple(base.shape)}"
        )
    check_dtype("base", base, FLOATS if autocasts(h) else (h.dtype,), "that of h")
    check_device("base", base, h.device, "h")
    return base.shape[-1]


def check_adapter(
    h: Tensor,
    channels: int,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: float | Tensor,
    activation: str,
    gamma: Tensor | None,
    beta: Tensor | None,
    like: str = "h",
    outputs: int | None = None,
) -> None:
    """Checks the adapter's tensors and options against h and the `channels` it reads.

    `like` is the name of h in messages. outputs: the channels it writes, if not as many.
    """
    check_choice("activation", activation, ACTIVATIONS)
    written, names = channels, ("(C, R) = (channels, rank)", "(C,) = (channels,)")
    if outputs is not None and outputs != channels:
        written, names = outputs, ("(N, R) = (base.shape[-1], rank)", "(N,) = (base.shape[-1],)")
    if _fits(h, channels, written, w_down, w_up, b_down, b_up, scale, gamma, beta):
        return
    for name, value in (("w_down", w_down), ("w_up", w_up)):
        check_tensor(name, value)
        if value.dim() != 2:
            raise ValueError(f"{name}: expected a matrix, got shape {tuple(value.shape)}")
    rank = w_down.shape[0]
    if rank == 0:
        raise ValueError(f"w_down: expected a rank of at least 1, got shape {tuple(w_down.shape)}")
    check_shape("w_down", w_down, (rank, channels), "(R, C) = (rank, channels)")
    check_shape("w_up", w_up, (written, rank), names[0])
    optional: dict[str, tuple[Tensor | None, tuple[int, ...], str]] = {
        "b_down": (b_down, (rank,), "(R,) = (rank,)"),
        "b_up": (b_up, (written,), names[1]),
    }
    if gamma is not None or beta is not None:
        if h.dim() < 2:
            raise ValueError(
                f"{like}: expected shape (B, ..., C) beside gamma or beta, got {tuple(h.shape)}"
            )
        meaning = f"(B, R) = ({like}.shape[0], rank)"
        optional["gamma"] = (gamma, (h.shape[0], rank), meaning)
        optional["beta"] = (beta, (h.shape[0], rank), meaning)
    for name, (tensor, shape, meaning) in optional.items():
        check_tensor(name, tensor, optional=True)
        check_shape(name, tensor, shape, meaning)
    tensors: dict[str, Tensor | None] = {"w_down": w_down, "w_up": w_up}
    tensors |= {k: v[0] for k, v in optional.items()}
    _check_scale(scale)
    if isinstance(scale, Tensor):
        tensors["scale"] = scale
    for name, tensor in tensors.items():
        check_dtype(name, tensor, FLOATS)
        check_device(name, tensor, h.device, like)


def _check_scale(scale: float | Tensor) -> None:
    expected = "scale: expected a number or a tensor of one element, got"
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"{expected} {describe(scale)}")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{expected} {describe(scale)}")


def _fits(
    h: Tensor,
    channels: int,
    outputs: int,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: float | Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> bool:
    """Whether the usual call is right, in one look; False leaves it to the checks one by one."""
    if gamma is not None or beta is not None or type(scale) is not float:
        return False
    tensors = (w_down, w_up) if b_down is None else (w_down, w_up, b_down, b_up)
    device = h.device
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.device != device or tensor.dtype not in FLOATS:
            return False
    rank = w_down.shape[0] if w_down.dim() == 2 else 0
    return (
        rank > 0
        and w_down.shape == (rank, channels)
        and w_up.shape == (outputs, rank)
        and (b_down is None) == (b_up is None)
        and (b_down is None or b_down.shape == (rank,))
        and (b_up is None or b_up.shape == (outputs,))
    )
