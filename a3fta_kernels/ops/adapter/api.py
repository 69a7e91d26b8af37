"""The public `adapter`: checks, layout, and the choice of backend."""

from __future__ import annotations

from torch import Tensor

from ...backends import resolve
from ..rule import autocast_dtype, cast, without_autocast
from ..validate import check_adapter, check_base, check_input
from . import contract
from .reference import adapter as reference


def adapter(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    base: Tensor | None = None,
    scale: float | Tensor = 1.0,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The A3FTA adapter with its residual, in one pass.

        a  = h @ w_down.T + b_down
        z  = act(a) * (1 + gamma) + beta
        h' = base + scale * (z @ w_up.T + b_up),  base = h where there is none

    Args:
        h: (..., C) attention output, heads merged; any strides; fp32, fp16 or bf16 (fp64 too on
            `reference` and on `native` on the CPU). May be empty.
        w_down, b_down: (R, C) and (R,).
        w_up, b_up: (C, R) and (C,). Adapter tensors may be of another floating dtype: they are
            cast to h's, and their gradients come back in their own.
        base: (..., N) in h's dtype (under autocast: any), for an adapter beside a layer, whose
            output this is; w_up is then (N, R) and b_up (N,).
        scale: a number, or a tensor of one element, which then gets a gradient.
        activation: identity, relu, gelu, gelu_tanh or silu.
        gamma, beta: (B, R) with B = h.shape[0], per sample.
        backend: auto, reference, triton or native.

    Returns:
        h' of h's (or base's) shape and h's (under autocast: the autocast) dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once, in every tensor argument.
    """
    check_input(h)
    outputs = check_base(h, base)
    check_adapter(
        h, h.shape[-1], w_down, w_up, b_down, b_up, scale, activation, gamma, beta,
        outputs=outputs,
    )  # fmt: skip
    h = cast(h, autocast_dtype(h))
    base = cast(base, h.dtype)
    if isinstance(scale, Tensor):
        scale = scale.reshape(())  # (1, 1) would add dimensions to all it meets
    chosen = resolve(backend, h.device, h.dtype)
    if chosen == "reference":
        return reference(
            h, w_down, w_up, b_down, b_up,
            base=base, scale=scale, activation=activation, gamma=gamma, beta=beta,
        )  # fmt: skip
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    flat = h.reshape(-1, h.shape[-1])
    flat_base = None if base is None else base.reshape(-1, outputs)
    with without_autocast(h):
        y = contract.apply(
            flat, w_down, w_up, b_down, b_up, gamma, beta, tensor, flat_base, number, activation,
            chosen,
        )  # fmt: skip
    return y.view(*h.shape[:-1], outputs)
