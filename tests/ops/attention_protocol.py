"""The kernels' protocol of `cross_attention_adapter` in plain PyTorch: a backend for its rule.

It shows the rule, the registration and the processors where no Triton is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from a3fta_kernels.ops.activations import activate, activation_grad
from a3fta_kernels.ops.adapter_linear.up import merged, up_grads
from a3fta_kernels.ops.rule import AdapterGrads, cast

__all__ = ["backward", "forward", "merged", "up_grads"]


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def probabilities(q, k, mask, heads, attention_scale):
    s = split(q, heads) @ split(k, heads).transpose(-1, -2) * attention_scale
    if mask is not None:
        mask = (
            torch.zeros_like(s).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
        s = s + mask
    return s.softmax(-1).masked_fill((s == -torch.inf).all(-1, keepdim=True), 0.0)


def per_row(x: Tensor, batch: int, length: int) -> Tensor:
    return x.view(batch, 1, -1).expand(batch, length, -1).reshape(batch * length, -1)


def forward(
    q, k, v, mask, weight, bias, w_down, v_up, b_down, gamma, beta, residual, heads,
    attention_scale, activation,
):  # fmt: skip
    batch, length, _ = q.shape
    b_down = cast(b_down, q.dtype)
    h = merge(probabilities(q, k, mask, heads, attention_scale) @ split(v, heads)).flatten(0, 1)
    a = h @ w_down.t() + (0 if b_down is None else b_down)
    z = activate(a, activation)
    if gamma is not None:
        z = z * (1 + per_row(gamma, batch, length))
    if beta is not None:
        z = z + per_row(beta, batch, length)
    y = h @ weight.t() + z @ v_up.t()
    y = y if bias is None else (y + bias).to(y.dtype)  # bias may be wider
    return y if residual is None else y + residual, h, a


def backward(
    dy, h, a, q, k, v, mask, weight, w_down, v_up, gamma, beta, heads, attention_scale,
    activation, need_q, need_kv, need_dw,
):  # fmt: skip
    batch, length, _ = q.shape
    dz = dy @ v_up
    wide = dz if gamma is None else dz * (1 + per_row(gamma, batch, length))
    da = activation_grad(wide, a, activation)
    dh = split((dy @ weight + da @ w_down).view(q.shape), heads)
    p = probabilities(q, k, mask, heads, attention_scale)
    dp = dh @ split(v, heads).transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * attention_scale
    dq = merge(ds @ split(k, heads))
    dk = merge(ds.transpose(-1, -2) @ split(q, heads)) if need_kv else None
    dv = merge(p.transpose(-1, -2) @ dh) if need_kv else None
    z = activate(a, activation)
    z = z if gamma is None else z * (1 + per_row(gamma, batch, length))
    z = z if beta is None else z + per_row(beta, batch, length)
    by_sample = (batch, length, -1)
    return dq, dk, dv, AdapterGrads(
        None, da.t() @ h, dy.t() @ z, da.sum(0), dy.sum(0),
        None if gamma is None else (dz * activate(a, activation)).view(by_sample).sum(1),
        None if beta is None else dz.view(by_sample).sum(1),
    )  # fmt: skip
