"""The public `layer_norm`: checks, layout, and the choice of backend."""

from __future__ import annotations

from torch import Tensor

from ...backends import resolve
from ..norm import check_frozen, check_norm, norm_dtype, trains
from ..validate import check_input
from . import contract
from .reference import layer_norm as reference


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    keep: str = "input",
    backend: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension, of a frozen layer.

        y = weight * xhat + bias,  xhat = (x - mean) / sqrt(var + eps)

    What is kept for the backward is x and one mean and one rstd per row.

    Args:
        x: (..., C), any strides; fp32, fp16 or bf16 (fp64 too on `reference` and on `native` on
            the CPU). May be empty.
        weight, bias: (C,), of any floating dtype; frozen. One that requires grad takes the backend
            `reference`, or is refused where a kernel backend is named.
        eps: added to the variance.
        keep: what the backward has. "input": x itself; "int8": its 8-bit copy, `ops.quantize` of x,
            whose gradient differs a little: its blocks of 128 elements span rows, so rows shorter
            than that share their range. On `reference` PyTorch keeps what it keeps.
        backend: auto, reference, triton or native.

    Returns:
        y of x's shape and dtype, contiguous; float32 under autocast on a GPU, as in PyTorch, where
        x is still kept in its own.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once, in x.
    """
    check_input(x, "x")
    check_norm(x, x.shape[-1], weight, bias, eps, keep)
    dtype = norm_dtype(x)
    chosen = resolve(backend, x.device, dtype)
    own = trains(weight, bias)
    if own and backend not in ("auto", "reference"):
        check_frozen(chosen, weight=weight, bias=bias)
    if own or backend == "reference":
        return reference(x.to(dtype), weight, bias, eps=eps).contiguous()
    return contract.apply(x, weight, bias, float(eps), keep, dtype, chosen)
