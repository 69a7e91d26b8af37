"""The autograd rule of `group_norm`, its torch.library registration, and the backend protocol.

The formulas stand at the top of ops/norm.py. A backend is a module with two functions, without
autograd:

    forward(x, groups, weight, bias, eps, activation) -> (y, mean, rstd)
    backward(dy, x, mean, rstd, weight, bias, activation) -> dx

x, y, dy, dx (B, C, S), all four contiguous or all four with their channels last: strides
(C * S, 1, C). weight and bias (C,), contiguous, of x's dtype or of that of the sums; None: 1 and 0.
mean, rstd (B, G) in the dtype of the sums (`rule.acc_dtype`). B and S may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..norm import norm_dtype, norm_rule, parameter, save_norm
from ..rule import acc_dtype, cast, is_plain, loader, record, refuse_second_derivative

ACTIVATIONS = ("identity", "silu")

backend_module = loader(__package__)


def laid_out(x: Tensor) -> Tensor:
    """x where it is contiguous or has its channels last, else a contiguous copy."""
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x
    return x.contiguous()


def like_layout(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory format that `laid_out` gives x."""
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return y.contiguous()
    if y.stride() == x.stride():
        return y
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


def flat(x: Tensor) -> Tensor:
    """(B, C, *spatial) as (B, C, S), a view."""
    return x.view(*x.shape[:2], math.prod(x.shape[2:]))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    keep: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of x's shape, and mean and rstd (B, G)."""
    y, mean, rstd = backend_module(backend).forward(
        flat(laid_out(cast(x, dtype))),
        groups,
        parameter(weight, dtype),
        parameter(bias, dtype),
        eps,
        activation,
    )
    # no view to autograd, as in layer_norm
    return torch.ops.aten._unsafe_view(y, x.shape), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    """dx of x's shape and layout; dy and x of one dtype."""
    dtype = x.dtype
    x = laid_out(x)
    dx = backend_module(backend).backward(
        flat(like_layout(dy, x)),
        flat(x),
        mean,
        rstd,
        parameter(weight, dtype),
        parameter(bias, dtype),
        activation,
    )
    return dx.view(x.shape)


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, activation, keep, _, backend = inputs
    save_norm(ctx, x, (weight, bias), output[1:], keep, backend, activation)


def rule(ctx: Any, *grad_outputs: Any) -> tuple:
    """The gradients of mean and rstd never come: no caller sees them."""
    dy = grad_outputs[0]
    run: Callable = backward if is_plain(dy) else torch.ops.a3fta.group_norm_backward
    return (norm_rule(ctx, dy, run), *(None,) * 8)


class GroupNormFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.group_norm."""

    operator = "group_norm"

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
        return torch.ops.a3fta.group_norm(*inputs)[0]
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return record(GroupNormFunction, *inputs)
    return forward(*inputs)[0]


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, str activation, "
    "str keep, ScalarType dtype, str backend) -> (Tensor y, Tensor mean, Tensor rstd)"
)
_library.define(
    "group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, str activation, str backend) -> Tensor dx"
)
_library.impl("group_norm", forward, "CompositeExplicitAutograd")
_library.impl("group_norm_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::group_norm", lib=_library)
def _(x: Tensor, weight: Any, bias: Any, groups: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = rest[-2]
    mean = x.new_empty(x.shape[0], groups, dtype=acc_dtype(dtype))
    return torch.empty_like(laid_out(x), dtype=dtype), mean, torch.empty_like(mean)


@torch.library.register_fake("a3fta::group_norm_backward", lib=_library)
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(laid_out(x))


def _autocast(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, _, backend = rest
    dtype = norm_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.a3fta.group_norm(x, *others, dtype, backend)


_library.impl("group_norm", _autocast, "AutocastCUDA")
torch.library.register_autograd("a3fta::group_norm", rule, setup_context=save, lib=_library)
