"""The autograd rule of `frozen_conv`, and its registration.

    y  = conv(x, weight) + bias
    dx = conv_transposed(dy, weight)

dx needs the weight and the shape of x, not x: PyTorch's own rule keeps x all the same, because
the gradient of the weight would need it. Nothing of the size of x is kept here.

Both directions are the library's convolution (cuDNN, oneDNN) on every device: there is nothing
to fuse, and no kernel of ours would be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import autocast_dtype, cast, is_plain, record, refuse_second_derivative
from .reference import frozen_conv as forward

_OPTIONS = "int[] stride, int[] padding, int[] dilation, int groups"


def backward(
    dy: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    channels_last: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """dx, computed in the memory format that the forward had."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    # the library asks an input for its shape; this one has one element of memory
    like_x = dy.new_empty_strided(shape, (0,) * len(shape))
    return torch.ops.aten.convolution_backward(
        dy.contiguous(memory_format=form), like_x, weight.contiguous(memory_format=form), None,
        stride, padding, dilation, False, [0], groups, [True, False, False],
    )[0]  # fmt: skip


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, *options = inputs
    ctx.save_for_backward(weight)
    # as the library does: either of the two decides
    ctx.channels_last = is_channels_last(x) or is_channels_last(weight)
    ctx.shape = x.shape
    ctx.options = options


def rule(ctx: Any, *grad_outputs: Any) -> tuple:
    (dy,) = grad_outputs
    (weight,) = ctx.saved_tensors
    run: Callable = backward if is_plain(dy) else torch.ops.a3fta.frozen_conv_backward
    dx = run(dy, weight, ctx.shape, ctx.channels_last, *ctx.options)
    return (dx, *[None] * 6)


class FrozenConvFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.frozen_conv."""

    operator, saved_names = "frozen_conv", ("weight",)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        return rule(ctx, *grad_outputs)


def apply(*inputs: Any) -> Tensor:
    """y for the arguments of `forward`, differentiable in x."""
    if not is_plain(inputs[0]):
        return torch.ops.a3fta.frozen_conv(*inputs)
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return record(FrozenConvFunction, *inputs)
    return forward(*inputs)


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(f"frozen_conv(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}) -> Tensor")
_library.define(
    "frozen_conv_backward(Tensor dy, Tensor weight, SymInt[] shape, bool channels_last, "
    f"{_OPTIONS}) -> Tensor"
)
_library.impl("frozen_conv", forward, "CompositeExplicitAutograd")
_library.impl("frozen_conv_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::frozen_conv", lib=_library)
def _(*inputs: Any) -> Tensor:
    return forward(*inputs)


@torch.library.register_fake("a3fta::frozen_conv_backward", lib=_library)
def _(dy: Tensor, weight: Tensor, shape: Sequence[int], channels_last: bool, *_: Any) -> Tensor:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return dy.new_empty(shape).contiguous(memory_format=form)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    dtype = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.a3fta.frozen_conv(
            x.to(dtype), weight.to(dtype), cast(bias, dtype), *options
        )


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("frozen_conv", _autocast, _key)
torch.library.register_autograd("a3fta::frozen_conv", rule, setup_context=save, lib=_library)
