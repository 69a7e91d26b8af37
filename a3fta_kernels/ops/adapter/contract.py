"""The autograd rule of `adapter`, its torch.library registration, and the backend protocol.

With s = scale and every adapter tensor in h's dtype:

    a  = h @ w_down.T + b_down                        saved, with h
    z  = act(a) * (1 + gamma) + beta
    y  = base + z @ (s * w_up).T + s * b_up           base is h, or a tensor apart from it
    da = (dy @ (s * w_up)) * (1 + gamma) * act'(a)
    dh = dy + da @ w_down                             with a base apart: da @ w_down, dbase = dy
    dw_down = da.T @ h;  db_down = sum(da)
    dw_up   = s * G,  db_up = s * sum(dy),  ds = <G, w_up> + <sum(dy), b_up>,  G = dy.T @ z

A backend is a module with two functions, without autograd. Their tensors are 2-D with unit
column stride (`rule.rows`); row strides are free. `w_up` and `b_up` come with the scale inside.

    forward(h, w_down, w_up, b_down, b_up, gamma, beta, base, activation) -> (y, a)
    backward(dy, h, a, w_down, w_up, gamma, beta, activation, apart, need_dh, need_dw)
        -> AdapterGrads

h (M, C); base, y, dy (M, N), N = C without a base apart; a (M, R); w_down (R, C); w_up (N, R);
gamma, beta (B, R) or None, where sample b owns the rows b * M/B to (b + 1) * M/B. base is None
where it is h. M may be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import (
    acc_dtype,
    autocast_dtype,
    cast,
    cast_together,
    fake_op_grads,
    is_plain,
    loader,
    op_grads,
    record,
    refuse_second_derivative,
    rows,
    scaled,
    times,
)

_SIGNATURE = (
    "Tensor h, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, Tensor? gamma, "
    "Tensor? beta, Tensor? scale_tensor"
)
_OPTIONS = "float scale, str activation, str backend"
_NAMES = tuple(part.split()[1] for part in _SIGNATURE.split(", "))  # base comes after them
_TENSORS = len(_NAMES)
SAVED = ("a", *_NAMES)  # what `save` keeps, in order

backend_module = loader(__package__)


def forward(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale_tensor: Tensor | None,
    base: Tensor | None,
    scale: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and a (M, R); casts the adapter to h's dtype."""
    dtype = h.dtype
    if scale_tensor is None and scale == 1.0:
        w_down, w_up, b_down, b_up = cast_together((w_down, w_up, b_down, b_up), dtype)
    return backend_module(backend).forward(
        rows(h),
        cast(w_down, dtype).contiguous(),
        scaled(w_up, scale, scale_tensor, dtype).contiguous(),
        cast(b_down, dtype),
        None if b_up is None else scaled(b_up, scale, scale_tensor, dtype),
        cast(gamma, dtype),
        cast(beta, dtype),
        None if base is None else rows(base),
        activation,
    )


def backward(
    dy: Tensor,
    h: Tensor,
    a: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale_tensor: Tensor | None,
    apart: bool,
    scale: float,
    activation: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients for all tensors of the forward but base; an empty tensor where none is needed."""
    dtype = h.dtype
    need = dict(zip(_NAMES, needs, strict=True))
    grads = backend_module(backend).backward(
        rows(dy),
        rows(h),
        a,
        cast(w_down, dtype).contiguous(),
        scaled(w_up, scale, scale_tensor, dtype).contiguous(),
        cast(gamma, dtype),
        cast(beta, dtype),
        activation,
        apart,
        need["h"],
        any(needs[1:]),
    )
    wide = acc_dtype(dtype)
    factor = scale if scale_tensor is None else scale_tensor.to(wide) * scale
    dscale = None
    if scale_tensor is not None and need["scale_tensor"]:
        dscale = (grads.g_up * w_up.to(wide)).sum()
        if b_up is not None:
            dscale = dscale + grads.dy_sum @ b_up.to(wide)
        dscale = (dscale * scale).view(scale_tensor.shape)
    found = (
        grads.dh,
        grads.dw_down,
        times(grads.g_up, factor) if need["w_up"] else None,
        grads.da_sum,
        times(grads.dy_sum, factor) if need["b_up"] else None,
        grads.dgamma,
        grads.dbeta,
        dscale,
    )
    inputs = (h, w_down, w_up, b_down, b_up, gamma, beta, scale_tensor)
    return op_grads(found, inputs, needs)


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Keeps h, a and the adapter's own tensors: nothing else of size M x C."""
    *tensors, base, scale, activation, backend = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.options = (base is not None, scale, activation, backend)


def rule(ctx: Any, *grad_outputs: Any) -> tuple:
    """The gradient of the saved output `a` never comes: no caller sees it."""
    dy = grad_outputs[0]
    a, h, *adapter = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_TENSORS])
    found: list[Tensor | None] = [None] * _TENSORS
    if any(needs):
        run: Callable = backward if is_plain(dy) else torch.ops.a3fta.adapter_backward
        grads = run(dy, h, a, *adapter, *ctx.options, needs)
        found = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*found, dy if ctx.needs_input_grad[_TENSORS] else None, None, None, None)


class AdapterFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.adapter."""

    operator, saved_names = "adapter", SAVED

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
    """y (M, N) for the arguments of `forward`, differentiable."""
    if not is_plain(inputs[0]):
        return torch.ops.a3fta.adapter(*inputs)[0]
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs[: _TENSORS + 1]
    ):
        return record(AdapterFunction, *inputs)
    return forward(*inputs)[0]


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(f"adapter({_SIGNATURE}, Tensor? base, {_OPTIONS}) -> (Tensor y, Tensor a)")
_library.define(
    "adapter_backward(Tensor dy, Tensor h, Tensor a, "
    f"{_SIGNATURE.removeprefix('Tensor h, ')}, bool apart, {_OPTIONS}, bool[] needs) -> Tensor[]"
)
_library.impl("adapter", forward, "CompositeExplicitAutograd")
_library.impl("adapter_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::adapter", lib=_library)
def _(h: Tensor, w_down: Tensor, w_up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    m = h.shape[0]
    return h.new_empty(m, w_up.shape[0]), h.new_empty(m, w_down.shape[0])


@torch.library.register_fake("a3fta::adapter_backward", lib=_library)
def _(dy: Tensor, h: Tensor, a: Tensor, *rest: Any) -> list[Tensor]:
    return fake_op_grads((h, *rest[: _TENSORS - 1]), rest[-1])


def _autocast(h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    h = h.to(autocast_dtype(h))
    *adapter, base = rest[:_TENSORS]
    with torch.autocast(h.device.type, enabled=False):
        return torch.ops.a3fta.adapter(h, *adapter, cast(base, h.dtype), *rest[_TENSORS:])


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("adapter", _autocast, _key)
torch.library.register_autograd("a3fta::adapter", rule, setup_context=save, lib=_library)
