"""The autograd rule of `adapter_bank`, its torch.library registration, and the backend protocol.

Adapters of one activation lie in a bank; each sample of a batch has one of them, or none. Per
sample b, with k = index[b], s = scale[k] and everything in h's dtype:

    a  = h @ w_down[k].T + b_down[k];  z = act(a)
    y  = base + s * (z @ w_up[k].T + b_up[k]);  y = base where k is -1
    da = s * (dy @ w_up[k]) * act'(a)
    dh = dy + da @ w_down[k]                     with a base apart: da @ w_down[k], dbase = dy
    dw_down[k] += da.T @ h;      db_down[k] += sum(da)
    dw_up[k]   += s * dy.T @ z;  db_up[k]   += s * sum(dy)
    dscale[k]  += <dy.T @ z, w_up[k]> + <sum(dy), b_up[k]>

base is h, or a tensor apart from it, h (M, C) and base (M, N).

One launch over all samples, each block of rows with the weights of its own: grouped as in Punica
(Chen et al., MLSys 2024) and S-LoRA (Sheng et al., MLSys 2024), with the activation between the two
products, which LoRA does not have. Adapters of smaller rank are padded with zeros: act(0) is 0 for
all of our activations, and the columns of w_up that would read it are zero besides.

The backward is batched products of PyTorch, on every backend: it is there so that a bank can train,
serving is what the op is for. It keeps h and the bank, and computes a anew.

A backend is a module with RANK_LIMIT and one function, without autograd. h, residual (M, C), rows
as `rule.rows`; the bank contiguous, in h's dtype, of a rank up to RANK_LIMIT; scale (K,) in the
accumulation dtype; index (B,) int32. Sample b owns the rows b * M/B to (b + 1) * M/B. A sample
whose index is neither -1 nor of the bank becomes NaN, or is refused. M may be 0.

    forward(h, residual, w_down, w_up, b_down, b_up, scale, index, activation) -> y

with `residual` in the place of h's own: h, except with a base apart and where a larger rank takes
several turns. N is C there: of a base of another width the narrower is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate, activation_grad
from ..rule import (
    acc_dtype,
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

_SIGNATURE = (
    "Tensor h, Tensor w_down, Tensor w_up, Tensor index, Tensor? b_down, Tensor? b_up, "
    "Tensor? scale"
)
_OPTIONS = "str activation, str backend"
# what `save` keeps, in order; base comes after them
SAVED = tuple(part.split()[1] for part in _SIGNATURE.split(", "))

backend_module = loader(__package__)


def forward(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    index: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: Tensor | None,
    base: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    """y (M, N); casts the bank to h's dtype."""
    dtype, rank, outputs = h.dtype, w_down.shape[1], w_up.shape[1]
    if outputs != h.shape[1]:
        assert base is not None
        wide = max(outputs, h.shape[1])
        h, base, w_down = (_widened(x, wide) for x in (h, base, w_down))
        w_up = _widened(w_up.mT, wide).mT
        b_up = None if b_up is None else _widened(b_up, wide)
    module = backend_module(backend)
    factors = _factors(scale, w_down, acc_dtype(dtype))
    places = index.to(torch.int32).contiguous()
    h = rows(h)
    y = h if base is None else rows(base)
    for start in range(0, rank, module.RANK_LIMIT):
        part = slice(start, start + module.RANK_LIMIT)
        y = module.forward(
            h,
            y,
            cast(w_down[:, part], dtype).contiguous(),
            cast(w_up[:, :, part], dtype).contiguous(),
            None if b_down is None else cast(b_down[:, part], dtype).contiguous(),
            None if b_up is None or start > 0 else cast(b_up, dtype).contiguous(),
            factors,
            places,
            activation,
        )
    return y if y.shape[1] == outputs else y[:, :outputs].contiguous()


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))


def _factors(scale: Tensor | None, w_down: Tensor, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return w_down.new_ones(len(w_down), dtype=dtype)
    return scale.to(dtype).contiguous()


def backward(
    dy: Tensor,
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    index: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: Tensor | None,
    apart: bool,
    activation: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients for all tensors of the forward but base; an empty tensor where none is needed."""
    dtype = h.dtype
    wide = acc_dtype(dtype)
    shape = (len(index), h.shape[0] // max(len(index), 1))
    x, dy = h.reshape(*shape, h.shape[1]), dy.reshape(*shape, dy.shape[1])
    k = index.clamp(min=0).long()
    has = (index >= 0)[:, None, None]
    down, up = w_down.to(dtype)[k], w_up.to(dtype)[k]
    s = _factors(scale, w_down, wide)[k][:, None, None]
    a = x @ down.mT if b_down is None else torch.baddbmm(b_down.to(dtype)[k][:, None], x, down.mT)
    # rounded once, after the factor, as where autograd goes through s * w_up
    dz = (dy @ up).to(wide) * s
    da = torch.where(has, activation_grad(dz, a.to(wide), activation), 0).to(dtype)

    def summed(per_sample: Tensor, like: Tensor) -> Tensor:
        """Those of each adapter together: on a GPU in no fixed order, where there are many."""
        kept = torch.where(has, per_sample.to(wide), 0).view(-1, *like.shape[1:])
        return torch.zeros(like.shape, dtype=wide, device=h.device).index_add_(0, k, kept)

    need = dict(zip(SAVED, needs, strict=True))
    found: dict[str, Tensor] = {}
    if need["h"]:
        found["h"] = (da @ down if apart else torch.baddbmm(dy, da, down)).view(h.shape)
    if need["w_down"]:
        found["w_down"] = summed(da.mT @ x, w_down)
    if need["b_down"] and b_down is not None:
        found["b_down"] = summed(da.sum(1, keepdim=True, dtype=wide), b_down)
    if need["w_up"] or need["scale"]:
        g_up = (dy.mT @ activate(a, activation)).to(wide)
        found["w_up"] = summed(g_up * s, w_up)
    if need["b_up"] or need["scale"]:
        dy_sum = dy.sum(1, keepdim=True, dtype=wide)
    if need["b_up"] and b_up is not None:
        found["b_up"] = summed(dy_sum * s, b_up)
    if need["scale"] and scale is not None:
        ds = (g_up * up).sum((1, 2), keepdim=True)
        if b_up is not None:
            ds = ds + (dy_sum * b_up.to(wide)[k][:, None]).sum(2, keepdim=True)
        found["scale"] = summed(ds, scale)
    inputs = (h, w_down, w_up, index, b_down, b_up, scale)
    return op_grads([found.get(name) for name in SAVED], inputs, needs)


def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps h and the bank's own tensors: nothing else."""
    *tensors, base, activation, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (base is not None, activation, backend)


def rule(ctx: Any, dy: Tensor) -> tuple:
    needs = list(ctx.needs_input_grad[: len(SAVED)])
    found: list[Tensor | None] = [None] * len(SAVED)
    if any(needs):
        run: Callable = backward if is_plain(dy) else torch.ops.a3fta.adapter_bank_backward
        grads = run(dy, *ctx.saved_tensors, *ctx.options, needs)
        found = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return (*found, dy if ctx.needs_input_grad[len(SAVED)] else None, None, None)


class AdapterBankFunction(torch.autograd.Function):
    """The cheap eager entry to the rule; compiled code takes torch.ops.a3fta.adapter_bank."""

    operator, saved_names = "adapter_bank", SAVED

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        save(ctx, inputs, inputs[0])
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        return rule(ctx, *grad_outputs)


def apply(*inputs: Any) -> Tensor:
    """y (M, N) for the arguments of `forward`, differentiable."""
    if not is_plain(inputs[0]):
        return torch.ops.a3fta.adapter_bank(*inputs)
    tensors = inputs[: len(SAVED) + 1]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return record(AdapterBankFunction, *inputs)
    return forward(*inputs)


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define(f"adapter_bank({_SIGNATURE}, Tensor? base, {_OPTIONS}) -> Tensor y")
_library.define(
    f"adapter_bank_backward(Tensor dy, {_SIGNATURE}, bool apart, {_OPTIONS}, bool[] needs) "
    "-> Tensor[]"
)
_library.impl("adapter_bank", forward, "CompositeExplicitAutograd")
_library.impl("adapter_bank_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::adapter_bank", lib=_library)
def _(h: Tensor, w_down: Tensor, w_up: Tensor, *_: Any) -> Tensor:
    return h.new_empty(h.shape[0], w_up.shape[1])


@torch.library.register_fake("a3fta::adapter_bank_backward", lib=_library)
def _(dy: Tensor, *rest: Any) -> list[Tensor]:
    return fake_op_grads(rest[: len(SAVED)], rest[-1])


def _autocast(h: Tensor, *rest: Any) -> Tensor:
    h = h.to(autocast_dtype(h))
    *bank, base, activation, backend = rest
    with torch.autocast(h.device.type, enabled=False):
        return torch.ops.a3fta.adapter_bank(h, *bank, cast(base, h.dtype), activation, backend)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("adapter_bank", _autocast, _key)
torch.library.register_autograd("a3fta::adapter_bank", rule, setup_context=save, lib=_library)
