"""The autograd rule of `layer_norm`, its torch.library registration, and the backend protocol.

The formulas stand at the top of ops/norm.py. A backend is a module with two functions, without
autograd:

    forward(x, weight, bias, eps) -> (y, mean, rstd)
    backward(dy, x, mean, rstd, weight) -> dx

x, dy (M, C) with unit column stride (`rule.rows`), row strides are free; y, dx (M, C) contiguous.
weight and bias (C,), contiguous, of x's dtype or of that of the sums; None: 1 and 0. mean, rstd
(M,) in the dtype of the sums (`rule.acc_dtype`). M may be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..norm import norm_dtype, norm_rule, parameter, save_norm
from ..rule import acc_dtype, cast, is_plain, loader, record, refuse_second_derivative, rows

backend_module = loader(__package__)


def flat(x: Tensor) -> Tensor:
    """(..., C) as (M, C) rows: a view where the strides allow it."""
    return rows(x.reshape(x.numel() // x.shape[-1], x.shape[-1]))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of x's shape, and mean and rstd (M,)."""
    y, mean, rstd = backend_module(backend).forward(
        flat(cast(x, dtype)), parameter(weight, dtype), parameter(bias, dtype), eps
    )
    # no view to autograd, which lets nobody write into one that a Function returns; models do
    return torch.ops.aten._unsafe_view(y, x.shape), mean, rstd


def backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, backend: str
) -> Tensor:
    """dx of x's shape; dy and x of one dtype."""
    dx = backend_module(backend).backward(flat(dy), flat(x), mean, rstd, parameter(weight, x.dtype))
    return dx.view(x.shape)


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _, keep, _, backend = inputs
    save_norm(ctx, x, (weight,), output[1:], keep, backend)


def rule(ctx: Any, *grad_outputs: Any) -> tuple:
    """The gradients of mean and rstd never come: no caller sees them."""
    dy = grad_outputs[0]
    run: Callable = backward if is_plain(dy) else torch.ops.a3fta.layer_norm_backward
    return (norm_rule(ctx, dy, run), *(None,) * 6)


class LayerNormFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.layer_norm."""

    operator = "layer_norm"

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        return rule(ctx, *grad_outputs)


def apply(*inputs: Any) -> Tensor:
    """y for the arguments of `forward`, differentiable in x."""
    if not is_plain(inputs[0]):
        return torch.ops.a3fta.layer_norm(*inputs)[0]
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return record(LayerNormFunction, *inputs)
    return forward(*inputs)[0]


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str keep, ScalarType dtype, "
    "str backend) -> (Tensor y, Tensor mean, Tensor rstd)"
)
_library.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "str backend) -> Tensor dx"
)
_library.impl("layer_norm", forward, "CompositeExplicitAutograd")
_library.impl("layer_norm_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::layer_norm", lib=_library)
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = rest[-2]
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=acc_dtype(dtype))
    return x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


@torch.library.register_fake("a3fta::layer_norm_backward", lib=_library)
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _autocast(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, _, backend = rest
    dtype = norm_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.a3fta.layer_norm(x, *others, dtype, backend)


_library.impl("layer_norm", _autocast, "AutocastCUDA")
torch.library.register_autograd("a3fta::layer_norm", rule, setup_context=save, lib=_library)
