"""The autograd rule of `cross_attention_adapter`, its registration, and the kernels' protocol.

With heads split and V, s, W as in adapter_linear/contract.py, for every head:

    p  = softmax(q k^T * attention_scale + mask);  h = p v
    a, z, y, and dz, da, P and the adapter's gradients as in adapter_linear
    dh = dy @ W + da @ w_down
    ds = p * (dh v^T - sum over keys of p * dh v^T)
    dq = ds k * attention_scale;  dk = ds^T q * attention_scale;  dv = p^T dh

Kept for the backward: q, k, v, mask, h, a and V. dk and dv are computed where asked for, the mask
has no gradient.

The kernels (triton.py) know nothing of autograd; unit stride along channels, else any. `merged` and
`up_grads` are adapter_linear's, and

    forward(q, k, v, mask, weight, bias, w_down, v_up, b_down, gamma, beta, residual, heads,
            attention_scale, activation) -> (y, h, a)
    backward(dy, h, a, q, k, v, mask, weight, w_down, v_up, gamma, beta, heads, attention_scale,
             activation, need_q, need_kv, need_dw) -> (dq, dk, dv, AdapterGrads with g_up = P)

q (B, Lq, C); k, v (B, Lk, C); mask (B, heads, Lq, Lk), bool or in q's dtype; weight (N, C); v_up
(N, R) is V; `bias` as in adapter_linear; y, dy, residual (M, N), M = B * Lq; h (M, C); a (M, R).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..adapter_linear.contract import parameter_grads
from ..rule import (
    autocast_dtype,
    cast,
    fake_op_grads,
    is_plain,
    op_grads,
    record,
    refuse_second_derivative,
    rows,
)

_SIGNATURE = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor weight, Tensor w_down, Tensor w_up, "
    "Tensor? b_down, Tensor? b_up, Tensor? gamma, Tensor? beta, Tensor? scale_tensor, "
    "Tensor? residual, Tensor? bias, Tensor? v_up, Tensor? v_bias, float scale, "
    "float attention_scale, int heads, str activation"
)
_OPTIONS = 4  # trailing arguments of _SIGNATURE that are no tensors
_NAMES = tuple(part.split()[1] for part in _SIGNATURE.split(", ")[:-_OPTIONS])
_SAVED = _NAMES[: _NAMES.index("residual")]
SAVED = ("h", "a", "v_up", *_SAVED)  # what `save` keeps, in order
_WANTED = tuple(name for name in _SAVED if name not in ("mask", "weight"))


@functools.cache
def kernels() -> ModuleType:
    return importlib.import_module(".triton", __package__)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale_tensor: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    v_up: Tensor | None,
    v_bias: Tensor | None,
    scale: float,
    attention_scale: float,
    heads: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, Lq, N), h, a (M, R) and V (N, R). `v_up`, `v_bias`: as `merged` makes them, or None."""
    dtype = q.dtype
    weight = rows(cast(weight, dtype))
    if v_up is None:
        w_down, v_up, v_bias = kernels().merged(
            weight, cast(bias, dtype), w_down, w_up, b_up, scale_tensor, scale, 0
        )
    y, h, a = kernels().forward(
        channels_dense(q),
        channels_dense(k),
        channels_dense(v),
        mask,
        weight,
        v_bias,
        cast(w_down, dtype).contiguous(),
        v_up,
        b_down,
        cast(gamma, dtype),
        cast(beta, dtype),
        None if residual is None else rows(residual.reshape(-1, residual.shape[-1])),
        heads,
        attention_scale,
        activation,
    )
    return y.view(*q.shape[:2], weight.shape[0]), h, a, v_up


def backward(
    dy: Tensor,
    h: Tensor,
    a: Tensor,
    v_up: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    attention_scale: float,
    heads: int,
    activation: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients for q, k, v, w_down ... scale_tensor; an empty tensor where none is needed."""
    dtype = q.dtype
    need = dict(zip(_WANTED, needs, strict=True))
    weight = rows(cast(weight, dtype))
    dq, dk, dv, grads = kernels().backward(
        rows(dy.reshape(-1, dy.shape[-1])),
        h,
        a,
        channels_dense(q),
        channels_dense(k),
        channels_dense(v),
        mask,
        weight,
        cast(w_down, dtype).contiguous(),
        v_up,
        cast(gamma, dtype),
        cast(beta, dtype),
        heads,
        attention_scale,
        activation,
        need["q"],
        need["k"] or need["v"],
        any(needs[3:]),
    )
    found = parameter_grads(kernels(), grads, weight, w_up, b_up, scale_tensor, scale, need)
    found |= {"q": dq, "k": dk, "v": dv}
    inputs = (q, k, v, w_down, w_up, b_down, b_up, gamma, beta, scale_tensor)
    return op_grads([found.get(name) for name in _WANTED], inputs, needs)


def channels_dense(x: Tensor) -> Tensor:
    """x (B, L, C) with unit stride along C; samples and rows may lie anywhere, or repeat."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Keeps q, k, v, mask, h, a, V, the frozen weight and the adapter's own tensors."""
    tensors, options = inputs[:-_OPTIONS], inputs[-_OPTIONS:]
    ctx.save_for_backward(*output[1:], *tensors[: len(_SAVED)])
    ctx.options = options


def rule(ctx: Any, *grad_outputs: Any) -> tuple:
    """The gradients of h, a and V never come: no caller sees those outputs."""
    dy = grad_outputs[0]
    need = dict(zip(_NAMES, ctx.needs_input_grad, strict=False))
    needs = [need[name] for name in _WANTED]
    found: dict[str, Tensor] = {}
    if any(needs):
        run: Callable = (
            backward if is_plain(dy) else torch.ops.a3fta.cross_attention_adapter_backward
        )
        grads = run(dy, *ctx.saved_tensors, *ctx.options, needs)
        found = {name: g for name, g in zip(_WANTED, grads, strict=True) if need[name]}
    if need["residual"]:
        found["residual"] = dy
    return (*(found.get(name) for name in _NAMES), *([None] * _OPTIONS))


class CrossAttentionAdapterFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; else torch.ops.a3fta.cross_attention_adapter."""

    operator, saved_names = "cross_attention_adapter", SAVED

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
    """y (B, Lq, N) for the arguments of `forward`, differentiable."""
    if not is_plain(inputs[0]):
        return torch.ops.a3fta.cross_attention_adapter(*inputs)[0]
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs[:-_OPTIONS]
    ):
        return record(CrossAttentionAdapterFunction, *inputs)
    return forward(*inputs)[0]


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(
    f"cross_attention_adapter({_SIGNATURE}) -> (Tensor y, Tensor h, Tensor a, Tensor v_up)"
)
_library.define(
    "cross_attention_adapter_backward(Tensor dy, Tensor h, Tensor a, Tensor v_up, Tensor q, "
    "Tensor k, Tensor v, Tensor? mask, Tensor weight, Tensor w_down, Tensor w_up, Tensor? b_down, "
    "Tensor? b_up, Tensor? gamma, Tensor? beta, Tensor? scale_tensor, float scale, "
    "float attention_scale, int heads, str activation, bool[] needs) -> Tensor[]"
)


def _forward_op(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, h, a, v_up = forward(*inputs)
    # an op may not return one of its inputs
    return y, h, a, v_up.clone() if v_up is inputs[_NAMES.index("v_up")] else v_up


_library.impl("cross_attention_adapter", _forward_op, "CompositeExplicitAutograd")
_library.impl("cross_attention_adapter_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::cross_attention_adapter", lib=_library)
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weight: Tensor, w_down: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = q.shape
    n, rank = weight.shape[0], w_down.shape[0]
    return (
        q.new_empty(batch, length, n),
        q.new_empty(batch * length, channels),
        q.new_empty(batch * length, rank),
        q.new_empty(n, rank),
    )


@torch.library.register_fake("a3fta::cross_attention_adapter_backward", lib=_library)
def _(
    dy: Tensor, h: Tensor, a: Tensor, v_up: Tensor, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None, weight: Tensor, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return fake_op_grads((q, k, v, *rest[:7]), rest[-1])


_CAST = ("q", "k", "v", "residual")


def _autocast(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = dict(zip(_NAMES, inputs, strict=False))
    dtype = autocast_dtype(given["q"])
    given |= {name: cast(given[name], dtype) for name in _CAST}
    if given["mask"] is not None and given["mask"].dtype != torch.bool:
        given["mask"] = given["mask"].to(dtype)
    with torch.autocast(given["q"].device.type, enabled=False):
        return torch.ops.a3fta.cross_attention_adapter(*given.values(), *inputs[-_OPTIONS:])


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("cross_attention_adapter", _autocast, _key)
torch.library.register_autograd(
    "a3fta::cross_attention_adapter", rule, setup_context=save, lib=_library
)
