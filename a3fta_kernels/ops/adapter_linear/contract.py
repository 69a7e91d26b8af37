"""The autograd rule of `adapter_linear`, its registration, and the backend protocol.

With s = scale, W = weight, Ws = W[:, start : start + C] and hs the same columns of h:

    V  = s * Ws @ w_up                   (N, R), made in every forward and kept for its backward
    a  = hs @ w_down.T + b_down          saved, with hs
    z  = act(a) * (1 + gamma) + beta
    y  = h @ W.T + z @ V.T + (bias + s * Ws @ b_up) [+ residual]
    dz = dy @ V;  da = dz * (1 + gamma) * act'(a);  P = dy.T @ z
    dh = dy @ W;  dh[:, start : start + C] += da @ w_down
    dw_down = da.T @ hs;  db_down = sum(da)
    dw_up   = s * G,  db_up = s * g,  ds = <G, w_up> + <g, b_up>,  G = Ws.T @ P,  g = Ws.T @ sum(dy)
    dresidual = dy

h' = h + adapter(h) and its gradient are never formed. The weight and bias are frozen: they have
no gradient here.

A backend is a module with these names, without autograd. Tensors are 2-D with unit column
stride; row strides are free. `bias` of forward already holds s * Ws @ b_up, as `merged` made it.

    paths(device_type) -> tuple of path names
    RANK_LIMITS: the largest rank of a path, for paths that have one
    merged(weight, bias, w_down, w_up, b_up, scale_tensor, scale, start) -> (w_down, v, v_bias)
    forward(h, weight, bias, w_down, v, b_down, gamma, beta, residual, start, activation, path)
        -> (y, a)
    backward(dy, hs, a, weight, w_down, v, gamma, beta, start, activation, path, need_dh, need_dw)
        -> AdapterGrads, with g_up = P
    up_grads(Ws, w_up, b_up, P, dy_sum, scale_tensor, scale, need_scale) -> gradients by name

h (M, K); hs (M, C); weight (N, K); y, dy, residual (M, N); v (N, R); a (M, R); w_down (R, C);
gamma, beta (B, R) or None. M may be 0. b_down comes in any dtype, and so do all of the adapter to
`merged` and `up_grads`; the rest has h's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...backends import BackendUnavailableError
from ..rule import (
    AdapterGrads,
    autocast_dtype,
    cast,
    fake_op_grads,
    is_plain,
    loader,
    op_grads,
    record,
    refuse_second_derivative,
    rows,
)
from . import choice

PATHS = ("skinny", "fused", "concat")

_SIGNATURE = (
    "Tensor h, Tensor weight, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, "
    "Tensor? gamma, Tensor? beta, Tensor? scale_tensor, Tensor? residual, Tensor? bias, "
    "Tensor? v, Tensor? v_bias, float scale, int start, str activation, str path, str backend"
)
_OPTIONS = 5  # trailing arguments of _SIGNATURE that are no tensors
_ARGUMENTS = tuple(part.split()[1] for part in _SIGNATURE.split(", "))
_NAMES, _OPTION_NAMES = _ARGUMENTS[:-_OPTIONS], _ARGUMENTS[-_OPTIONS:]
# what `save` keeps, in order; of h its columns hs
SAVED = ("a", "v", *_NAMES[: _NAMES.index("residual")])

backend_module = loader(__package__)


def paths_for(backend: str, device_type: str, rank: int) -> tuple[str, ...]:
    """The paths that `backend` has on such a device for this rank."""
    module = backend_module(backend)
    limits = module.RANK_LIMITS
    return tuple(p for p in module.paths(device_type) if rank <= limits.get(p, rank))


def take_path(path: str, backend: str, h: Tensor, weight: Tensor, rank: int) -> str:
    """The path of this call: the named one where the backend has it, else by choice.py.

    Called where sizes are numbers: inside the op, which a compiler does not trace.
    """
    device = h.device
    if path == "auto":
        shape = choice.Shape(h.shape[0], weight.shape[0], weight.shape[1], rank, h.dtype)
        return choice.choose(backend, device, paths_for(backend, device.type, rank), shape).path
    module = backend_module(backend)
    known = module.paths(device.type)
    if path not in known:
        raise BackendUnavailableError(
            f"path {path!r}: backend {backend!r} on {device.type} knows {', '.join(known)}"
        )
    limit = module.RANK_LIMITS.get(path, rank)
    if rank > limit:
        raise BackendUnavailableError(
            f"path {path!r}: backend {backend!r} takes ranks up to {limit}, got {rank}; "
            f"use path='auto' or one of {', '.join(paths_for(backend, device.type, rank))}"
        )
    return path


def paths_by_rows(backend: str, weight: Tensor, rank: int) -> tuple[choice.Span, ...]:
    """What path "auto" is for a layer with this weight, by the number of rows."""
    shape = choice.Shape(1, weight.shape[0], weight.shape[1], rank, weight.dtype)
    paths = paths_for(backend, weight.device.type, rank)
    return tuple(choice.spans(backend, weight.device, paths, shape))


def merged(
    backend: str,
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    start: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """w_down in dtype, V and its bias, as `forward` takes them."""
    weight, bias = rows(cast(weight, dtype)), cast(bias, dtype)
    run = backend_module(backend).merged
    return run(weight, bias, w_down, w_up, b_up, scale_tensor, scale, start)


def forward(
    h: Tensor,
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
    v: Tensor | None,
    v_bias: Tensor | None,
    scale: float,
    start: int,
    activation: str,
    path: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, N), a (M, R) and V (N, R). `v`, `v_bias`: as `merged` makes them, or None."""
    dtype = h.dtype
    weight = rows(cast(weight, dtype))
    path = take_path(path, backend, h, weight, w_down.shape[0])
    if v is None:
        w_down, v, v_bias = merged(
            backend, weight, bias, w_down, w_up, b_up, scale_tensor, scale, start, dtype
        )
    y, a = backend_module(backend).forward(
        rows(h),
        weight,
        v_bias,
        cast(w_down, dtype).contiguous(),
        v,
        b_down,
        cast(gamma, dtype),
        cast(beta, dtype),
        None if residual is None else rows(residual),
        start,
        activation,
        path,
    )
    return y, a, v


def backward(
    dy: Tensor,
    a: Tensor,
    v: Tensor,
    hs: Tensor,
    weight: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    start: int,
    activation: str,
    path: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients for h, w_down ... scale_tensor; an empty tensor where none is needed."""
    dtype = hs.dtype
    names = ("h", "w_down", "w_up", "b_down", "b_up", "gamma", "beta", "scale_tensor")
    need = dict(zip(names, needs, strict=True))
    weight = rows(cast(weight, dtype))
    module = backend_module(backend)
    grads = module.backward(
        rows(dy),
        rows(hs),
        a,
        weight,
        cast(w_down, dtype).contiguous(),
        v,
        cast(gamma, dtype),
        cast(beta, dtype),
        start,
        activation,
        take_path(path, backend, hs, weight, w_down.shape[0]),
        need["h"],
        any(needs[1:]),
    )
    weight_slice = weight[:, start : start + w_up.shape[0]]
    found = parameter_grads(module, grads, weight_slice, w_up, b_up, scale_tensor, scale, need)
    found["h"] = grads.dh
    inputs = (hs, w_down, w_up, b_down, b_up, gamma, beta, scale_tensor)
    return op_grads([found.get(name) for name in names], inputs, needs)


def parameter_grads(
    backend: ModuleType,
    grads: AdapterGrads,
    weight_slice: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    need: dict[str, bool],
) -> dict[str, Tensor | None]:
    """The adapter's gradients by name, in any dtype; `weight_slice` (N, C) is Ws."""
    found = {
        "w_down": grads.dw_down,
        "b_down": grads.da_sum,
        "gamma": grads.dgamma,
        "beta": grads.dbeta,
    }
    if need["w_up"] or need["b_up"] or need["scale_tensor"]:
        found |= backend.up_grads(
            weight_slice, w_up, b_up, grads.g_up, grads.dy_sum, scale_tensor, scale,
            need["scale_tensor"],
        )  # fmt: skip
    return found


def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps hs, a, V, the frozen weight and the adapter's own tensors: of size M x C only hs."""
    tensors, options = inputs[:-_OPTIONS], inputs[-_OPTIONS:]
    _, a, v = output
    h, weight, w_down, *rest = tensors[: _NAMES.index("residual")]
    length = w_down.shape[1]
    if length < h.shape[1]:
        # a copy: a view would keep all of h
        h = h.narrow(1, options[_OPTION_NAMES.index("start")], length).contiguous()
    ctx.save_for_backward(a, v, h, weight, w_down, *rest)
    ctx.options = options


def rule(ctx: Any, *grad_outputs: Any) -> tuple:
    """The gradients of a and V never come: no caller sees those outputs."""
    dy = grad_outputs[0]
    a, v, hs, weight, *adapter = ctx.saved_tensors
    need = dict(zip(_NAMES, ctx.needs_input_grad, strict=False))
    wanted = [n for n in _NAMES[: _NAMES.index("residual")] if n != "weight"]
    needs = [need[n] for n in wanted]
    run: Callable = backward if is_plain(dy) else torch.ops.a3fta.adapter_linear_backward
    grads = run(dy, a, v, hs, weight, *adapter, *ctx.options, needs)
    found = {n: g for n, g in zip(wanted, grads, strict=True) if need[n]}
    if need["residual"]:
        found["residual"] = dy
    return (*(found.get(n) for n in _NAMES), *([None] * _OPTIONS))


class AdapterLinearFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.adapter_linear."""

    operator, saved_names = "adapter_linear", SAVED

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
        return torch.ops.a3fta.adapter_linear(*inputs)[0]
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in inputs[:-_OPTIONS]
    ):
        return record(AdapterLinearFunction, *inputs)
    return forward(*inputs)[0]


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(f"adapter_linear({_SIGNATURE}) -> (Tensor y, Tensor a, Tensor v)")
_library.define(
    "adapter_linear_backward(Tensor dy, Tensor a, Tensor v, Tensor hs, Tensor weight, "
    "Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, Tensor? gamma, Tensor? beta, "
    "Tensor? scale_tensor, float scale, int start, str activation, str path, str backend, "
    "bool[] needs) -> Tensor[]"
)


def _forward_op(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, a, v = forward(*inputs)
    # an op may not return one of its inputs
    return y, a, v.clone() if v is inputs[_NAMES.index("v")] else v


_library.impl("adapter_linear", _forward_op, "CompositeExplicitAutograd")
_library.impl("adapter_linear_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::adapter_linear", lib=_library)
def _(h: Tensor, weight: Tensor, w_down: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    m, n, r = h.shape[0], weight.shape[0], w_down.shape[0]
    return h.new_empty(m, n), h.new_empty(m, r), h.new_empty(n, r)


@torch.library.register_fake("a3fta::adapter_linear_backward", lib=_library)
def _(dy: Tensor, a: Tensor, v: Tensor, hs: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    h = hs.new_empty(hs.shape[0], weight.shape[1])
    return fake_op_grads((h, *rest[:7]), rest[-1])


def _autocast(h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = autocast_dtype(h)
    at = _NAMES.index("residual") - 1
    residual = cast(rest[at], dtype)
    with torch.autocast(h.device.type, enabled=False):
        return torch.ops.a3fta.adapter_linear(h.to(dtype), *rest[:at], residual, *rest[at + 1 :])


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("adapter_linear", _autocast, _key)
torch.library.register_autograd("a3fta::adapter_linear", rule, setup_context=save, lib=_library)
