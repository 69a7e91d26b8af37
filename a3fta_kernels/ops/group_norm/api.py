"""The public `group_norm`: checks, memory format, and the choice of backend."""

from __future__ import annotations

from torch import Tensor

from ...backends import resolve
from ...checks import check_choice, check_dtype, check_tensor, describe
from ..norm import check_frozen, check_norm, norm_dtype, trains
from ..validate import FLOATS
from . import contract
from .reference import group_norm as reference


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
    keep: str = "input",
    backend: str = "auto",
) -> Tensor:
    """Group normalisation of a frozen layer and its activation, in one op.

        y = act(weight * xhat + bias),  xhat = (x - mean) / sqrt(var + eps)

    mean and var over each sample's C / num_groups channels and all positions. What is kept for the
    backward is x and one mean and one rstd per group: no activation's input, no xhat.

    Args:
        x: (B, C, *spatial), spatial of any rank, none included; fp32, fp16 or bf16 (fp64 too on
            `reference` and on `native` on the CPU). May be empty. Contiguous and channels-last
            tensors are read as they are, others are copied.
        num_groups: a divisor of C.
        weight, bias: (C,), of any floating dtype; frozen. One that requires grad takes the backend
            `reference`, or is refused where a kernel backend is named.
        eps: added to the variance.
        activation: identity or silu.
        keep: what the backward has. "input": x itself; "int8": its 8-bit copy, `ops.quantize` of x,
            whose gradient differs a little. On `reference` PyTorch keeps what it keeps.
        backend: auto, reference, triton or native.

    Returns:
        y of x's shape, memory format and dtype; float32 under autocast on a GPU, as in PyTorch,
        where x is still kept in its own.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once, in x.
    """
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, *spatial), got {tuple(x.shape)}")
    check_dtype("x", x, FLOATS)
    channels = x.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
        raise ValueError(f"num_groups: expected a positive integer, got {describe(num_groups)}")
    if channels == 0 or channels % num_groups != 0:
        raise ValueError(
            f"num_groups: expected a divisor of x's {channels} channels, got {num_groups}"
        )
    check_choice("activation", activation, contract.ACTIVATIONS)
    check_norm(x, channels, weight, bias, eps, keep)
    dtype = norm_dtype(x)
    chosen = resolve(backend, x.device, dtype)
    own = trains(weight, bias)
    if own and backend not in ("auto", "reference"):
        check_frozen(chosen, weight=weight, bias=bias)
    if own or backend == "reference":
        return contract.like_layout(
            reference(x.to(dtype), num_groups, weight, bias, eps=eps, activation=activation), x
        )
    return contract.apply(x, weight, bias, num_groups, float(eps), activation, keep, dtype, chosen)
