"""The public `frozen_conv`: checks and casts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_device, check_dtype, check_shape, check_tensor, describe
from ..rule import autocast_dtype, autocasts, cast, without_autocast
from ..validate import FLOATS
from . import contract, reference


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A 2-D convolution whose weight is frozen: nothing of the size of x is kept for backward.

        y = conv(x, weight) + bias

    Args:
        x: (B, C, H, W) in any memory format, which y and the gradient keep where it is
            contiguous or channels_last; fp64, fp32, fp16 or bf16.
        weight: (N, C / groups, KH, KW), of x's dtype (under autocast: of any).
        bias: (N,) or None.
        stride, padding, dilation: one number, or one for each dimension.

    Returns:
        (B, N, H', W').

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Differentiable once, in x. A weight or bias that requires a gradient gets it by PyTorch's own
    convolution, which keeps x.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected four dimensions, got {describe(tensor)}")
    check_dtype("x", x, FLOATS)
    check_dtype("weight", weight, FLOATS)
    check_device("weight", weight, x.device, "x")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x: expected {weight.shape[1] * groups} channels (weight's {weight.shape[1]} in "
            f"{groups} groups), got shape {tuple(x.shape)}"
        )
    check_shape("bias", bias, (weight.shape[0],), "(N,) = (weight.shape[0],)")
    options = (
        _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1),
        groups,
    )  # fmt: skip
    dtype = autocast_dtype(x)
    if weight.dtype != dtype and not autocasts(x):
        raise TypeError(f"weight: expected dtype {dtype} (that of x), got {weight.dtype}")
    x, weight, bias = cast(x, dtype), cast(weight, dtype), cast(bias, dtype)
    with without_autocast(x):
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains and torch.is_grad_enabled():
            return reference.frozen_conv(x, weight, bias, *options)
        return contract.apply(x, weight, bias, *options)


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(
            f"{name}: expected one number, or two, of at least {least}, got {describe(value)}"
        )
    return pair
