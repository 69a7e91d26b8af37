"""The public `cross_attention_adapter`: checks, layout, and the choice of how it is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import BackendUnavailableError, resolve
from ...checks import check_device, check_dtype, check_shape, check_tensor, describe
from ..adapter_linear import adapter_linear
from ..adapter_linear.api import check_linear
from ..rule import autocast_dtype, autocasts, cast, without_autocast
from ..validate import FLOATS, check_adapter, check_input
from . import contract, limits
from .attention import attention
from .reference import cross_attention_adapter as reference


def cross_attention_adapter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    heads: int,
    mask: Tensor | None = None,
    attention_scale: float | None = None,
    residual: Tensor | None = None,
    scale: float | Tensor = 1.0,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention to few keys, the adapter, and the frozen linear layer that consumes both.

        h  = softmax(q k^T * attention_scale + mask) v, for each head, heads side by side
        h' = h + scale * (z @ w_up.T + b_up),  z = act(h @ w_down.T + b_down) * (1 + gamma) + beta
        y  = h' @ weight.T + bias [+ residual]

    Args:
        q: (B, Lq, C) with C = heads * head_dim; any strides; fp32, fp16 or bf16 (fp64 too where
            `adapter_linear` takes it).
        k, v: (B, Lk, C) in q's dtype, at least one key.
        mask: broadcastable to (B, heads, Lq, Lk): added to the scores, in q's dtype, or bool,
            True where a key takes part. A row without any key has h = 0, as in PyTorch.
        attention_scale: default head_dim ** -0.5.
        w_down, w_up, weight, bias, b_down, b_up, residual, scale, activation, gamma, beta: as in
            `adapter_linear` for h (B, Lq, C).
        backend: forward it is `F.scaled_dot_product_attention` and `adapter_linear` everywhere.
            triton has a backward of its own, in fp16 and bf16, for up to 512 keys (256 above
            head_dim 64, 192 above 128), head_dim 160 and rank 64. Where that cannot run
            (`unfused_reason` says why), auto and the other backends have that of the two.

    Returns:
        y (B, Lq, N), contiguous, in q's (under autocast: the autocast) dtype, promoted with
        residual's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once, in q, k, v and every tensor of the adapter and residual. k and v cost
    their backward only where they require a gradient. A mask that requires one, and weight or
    bias, are served by the composition.
    """
    check_input(q, "q")
    _check_attention(q, k, v, heads, mask, attention_scale)
    check_adapter(q, q.shape[-1], w_down, w_up, b_down, b_up, scale, activation, gamma, beta, "q")
    dtype = autocast_dtype(q)
    check_linear(q, weight, bias, residual, "q")
    chosen = resolve(backend, q.device, dtype)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    if isinstance(scale, Tensor):
        scale = scale.reshape(())  # (1, 1) would add dimensions to all it meets

    reason = unfused_reason(q, k, heads, w_down.shape[0], mask, backend)
    if torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        reason = "the projection itself trains"
    if reason is None:
        return apply_prepared(
            q, k, v, w_down, w_up, weight, bias, b_down, b_up, heads, mask, attention_scale,
            residual, scale, activation, gamma, beta, None, None,
        )  # fmt: skip
    if backend == "triton":
        raise BackendUnavailableError(f"backend 'triton' of cross_attention_adapter: {reason}")
    if chosen == "reference":
        return reference(
            q, k, v, w_down, w_up, weight.to(dtype), None if bias is None else bias.to(dtype),
            b_down, b_up, heads=heads, mask=mask, attention_scale=attention_scale,
            residual=residual, scale=scale, activation=activation, gamma=gamma, beta=beta,
        )  # fmt: skip
    h = attention(q, k, v, heads=heads, mask=mask, attention_scale=attention_scale)
    return adapter_linear(
        h, w_down, w_up, weight, bias, b_down, b_up, residual=residual, scale=scale,
        activation=activation, gamma=gamma, beta=beta, backend=chosen,
    )  # fmt: skip


def unfused_reason(
    q: Tensor, k: Tensor, heads: int, rank: int, mask: Tensor | None, backend: str
) -> str | None:
    """Why the kernels cannot take such a call; None where they can."""
    dtype = autocast_dtype(q)
    chosen = resolve(backend, q.device, dtype)
    if chosen != "triton":
        return f"backend {chosen!r} has no kernel for it"
    reason = limits.refusal(dtype, q.shape[-1] // heads, k.shape[1], rank)
    if reason is not None:
        return reason
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "its mask requires a gradient"
    return None


def apply_prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b_down: Tensor | None,
    b_up: Tensor | None,
    heads: int,
    mask: Tensor | None,
    attention_scale: float | None,
    residual: Tensor | None,
    scale: float | Tensor,
    activation: str,
    gamma: Tensor | None,
    beta: Tensor | None,
    v_up: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:
    """The op with the kernels' backward; `v_up` and `v_bias`: V and its bias, where they are made.

    Arguments are not checked: `unfused_reason` has to be None.
    """
    batch, length, channels = q.shape
    if mask is not None:
        mask = mask.expand(batch, heads, length, k.shape[1])
    if attention_scale is None:
        attention_scale = (channels // heads) ** -0.5
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    # a wider residual (autocast) is added outside, so that the sum keeps its dtype
    fused = residual if residual is not None and residual.dtype == q.dtype else None
    with without_autocast(q):
        y = contract.apply(
            q, k, v, mask, weight, w_down, w_up, b_down, b_up, gamma, beta, tensor, fused, bias,
            v_up, v_bias, number, attention_scale, heads, activation,
        )  # fmt: skip
    return y if residual is None or fused is not None else y + residual


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None,
    attention_scale: float | None,
) -> None:
    if q.dim() != 3:
        raise ValueError(f"q: expected shape (B, Lq, C), got {tuple(q.shape)}")
    batch, length, channels = q.shape
    if type(heads) is not int or heads < 1 or channels % heads:
        raise ValueError(
            f"heads: expected an int that divides q's {channels} channels, got {describe(heads)}"
        )
    check_tensor("k", k)
    if k.dim() != 3 or k.shape[1] == 0:
        raise ValueError(f"k: expected shape (B, Lk, C) with a key, got {tuple(k.shape)}")
    shape = (batch, k.shape[1], channels)
    check_shape("k", k, shape, "(B, Lk, C) beside q (B, Lq, C)")
    check_tensor("v", v)
    check_shape("v", v, shape, "that of k")
    allowed = FLOATS if autocasts(q) else (q.dtype,)
    for name, value in (("k", k), ("v", v)):
        check_device(name, value, q.device, "q")
        check_dtype(name, value, allowed, "that of q")
    check_tensor("mask", mask, optional=True)
    if mask is not None:
        check_device("mask", mask, q.device, "q")
        check_dtype("mask", mask, (torch.bool, *allowed), "bool or that of q")
        full = (batch, heads, length, k.shape[1])
        padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        fits = zip(padded, full, strict=False)
        if mask.dim() > 4 or any(have not in (1, want) for have, want in fits):
            raise ValueError(
                f"mask: expected a shape that broadcasts to (B, heads, Lq, Lk) = {full}, "
                f"got {tuple(mask.shape)}"
            )
    if attention_scale is not None and (
        isinstance(attention_scale, bool) or not isinstance(attention_scale, (int, float))
    ):
        raise TypeError(f"attention_scale: expected a number, got {describe(attention_scale)}")
