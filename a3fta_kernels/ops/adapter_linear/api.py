"""The public `adapter_linear`: checks, layout, and the choice of backend and path."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import BackendUnavailableError, resolve
from ...checks import check_choice, check_device, check_dtype, check_shape, check_tensor
from ..rule import autocast_dtype, autocasts, cast, without_autocast
from ..validate import FLOATS, check_adapter, check_input
from . import contract
from .reference import adapter_linear as reference


def adapter_linear(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    columns: tuple[int, int] | None = None,
    scale: float | Tensor = 1.0,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    path: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """The adapter and the frozen linear layer that consumes it, without forming h'.

        h' = h + scale * (z @ w_up.T + b_up),  z = act(h @ w_down.T + b_down) * (1 + gamma) + beta
        y  = h' @ weight.T + bias [+ residual]

    Args:
        h: (..., K) attention output; any strides; fp32, fp16 or bf16 (fp64 too on `reference`
            and on `native` on the CPU). May be empty.
        weight, bias: (N, K) and (N,) in h's dtype (under autocast: any). They are frozen. If one
            of them requires a gradient, path "auto" computes the plain composition, which has
            it; a named path raises.
        residual: (..., N), added to the result.
        columns: (start, length), the slice of h's columns that is attention: the adapter reads
            and writes only these, with C = length. Default: all, C = K.
        path: auto, or one of the ways the backend has on this device: "skinny" (the wide product
            by the library GEMM, narrow kernels beside it), "fused" (one kernel forward, which
            makes z on the way; Triton's takes ranks up to 64) or "concat" (z by a narrow kernel,
            then one GEMM over the columns of h and z). In the backward "fused" and "concat" make
            dh in one GEMM over the columns of dy and da. auto chooses by shape and device, by
            measurements where there are some, else by a rule: see choice.py.
        w_down, w_up, b_down, b_up, scale, activation, gamma, beta, backend: as in `adapter`.

    Returns:
        y (..., N), contiguous, in h's (under autocast: the autocast) dtype, promoted with
        residual's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here, or not by this path.

    Differentiable once, in every tensor argument (weight and bias: see above).
    """
    check_input(h)
    width = h.shape[-1]
    start, length = _columns(columns, width)
    check_adapter(h, length, w_down, w_up, b_down, b_up, scale, activation, gamma, beta)
    dtype = autocast_dtype(h)
    check_linear(h, weight, bias, residual)
    check_choice("path", path, ("auto", *contract.PATHS))
    chosen = resolve(backend, h.device, dtype)
    h = cast(h, dtype)
    if isinstance(scale, Tensor):
        scale = scale.reshape(())  # (1, 1) would add dimensions to all it meets

    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trains:
        if path != "auto":
            name = "weight" if weight.requires_grad else "bias"
            raise ValueError(
                f"{name}: expected a frozen tensor on path {path!r}, which has no gradient for "
                f"it; got requires_grad=True. Use path='auto'"
            )
        chosen = "reference"
    if chosen == "reference":
        if path != "auto":
            raise BackendUnavailableError(
                f"path {path!r}: the reference backend has no paths; use path='auto'"
            )
        return reference(
            h, w_down, w_up, weight.to(dtype), None if bias is None else bias.to(dtype),
            b_down, b_up, residual=residual, columns=columns, scale=scale,
            activation=activation, gamma=gamma, beta=beta,
        )  # fmt: skip

    return apply_prepared(
        h, w_down, w_up, weight, bias, b_down, b_up, residual, start, scale, activation, gamma,
        beta, path, chosen, None, None,
    )  # fmt: skip


def apply_prepared(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b_down: Tensor | None,
    b_up: Tensor | None,
    residual: Tensor | None,
    start: int,
    scale: float | Tensor,
    activation: str,
    gamma: Tensor | None,
    beta: Tensor | None,
    path: str,
    backend: str,
    v: Tensor | None,
    v_bias: Tensor | None,
) -> Tensor:
    """`adapter_linear` on a backend with paths; `v` and `v_bias` as `contract.merged` makes them.

    Arguments are not checked: for callers that hold a frozen layer whose V they made themselves.
    """
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    # a wider residual (autocast) is added outside, so that the sum keeps its dtype
    fused = residual if residual is not None and residual.dtype == h.dtype else None
    flat = None if fused is None else fused.reshape(-1, fused.shape[-1])
    with without_autocast(h):
        y = contract.apply(
            h.reshape(-1, h.shape[-1]), weight, w_down, w_up, b_down, b_up, gamma, beta, tensor,
            flat, bias, v, v_bias, number, start, activation, path, backend,
        )  # fmt: skip
    y = y.view(*h.shape[:-1], weight.shape[0])
    return y if residual is None or fused is not None else y + residual


def _columns(columns: tuple[int, int] | None, width: int) -> tuple[int, int]:
    if columns is None:
        return 0, width
    ok = isinstance(columns, (tuple, list)) and len(columns) == 2
    ok = ok and all(type(x) is int for x in columns)
    if not ok or columns[0] < 0 or columns[1] < 1 or columns[0] + columns[1] > width:
        raise ValueError(
            f"columns: expected (start, length) inside h's {width} columns, got {columns!r}"
        )
    return columns[0], columns[1]


def check_linear(
    h: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, like: str = "h"
) -> None:
    """Checks the projection's tensors against its input h, called `like` in messages."""
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    check_tensor("residual", residual, optional=True)
    if residual is None and _fits(h, weight, bias):
        return
    if weight.dim() != 2:
        raise ValueError(f"weight: expected a matrix, got shape {tuple(weight.shape)}")
    n, k = weight.shape[0], h.shape[-1]
    check_shape("weight", weight, (n, k), f"(N, K) = (out_features, {like}.shape[-1])")
    check_shape("bias", bias, (n,), "(N,) = (weight.shape[0],)")
    check_shape("residual", residual, (*h.shape[:-1], n), f"(..., N) beside {like} (..., K)")
    allowed = FLOATS if autocasts(h) else (h.dtype,)
    for name, value in (("weight", weight), ("bias", bias), ("residual", residual)):
        check_device(name, value, h.device, like)
        check_dtype(name, value, allowed, f"that of {like}")


def _fits(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the usual call is right, in one look; False leaves it to the checks one by one."""
    kind = (h.dtype, h.device)
    return (
        weight.dim() == 2
        and weight.shape[1] == h.shape[-1]
        and (weight.dtype, weight.device) == kind
        and (bias is None or (bias.dtype, bias.device, *bias.shape) == (*kind, weight.shape[0]))
    )
