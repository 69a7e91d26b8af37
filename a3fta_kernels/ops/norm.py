"""What group_norm and layer_norm share: parameters that are frozen, dtypes, what is kept of x.

Both compute y = act(weight * xhat + bias) with xhat = (x - mean) * rstd, and of x alone a gradient:

    dxhat = dy * act'(weight * xhat + bias) * weight
    dx    = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))

with means over what shares a mean: a group, a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_device, check_dtype, check_shape, check_tensor, describe
from .quantize import contract as quantize
from .rule import acc_dtype, autocasts, cast
from .validate import FLOATS, KEEPS


def check_norm(
    x: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float, keep: str
) -> None:
    """Checks all but x, against x of so many channels."""
    if keep in KEEPS and type(eps) is float and eps >= 0 and _fit(x, channels, weight, bias):
        return
    check_choice("keep", keep, KEEPS)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {describe(eps)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        check_tensor(name, value)
        check_shape(name, value, (channels,), "(C,) = (channels,)")
        check_dtype(name, value, FLOATS)
        check_device(name, value, x.device, "x")


def _fit(x: Tensor, channels: int, *parameters: Tensor | None) -> bool:
    """Whether the usual call is right, in one look; False leaves it to the checks one by one."""
    for p in parameters:
        if p is not None and not (
            isinstance(p, Tensor)
            and p.shape == (channels,)
            and p.dtype in FLOATS
            and p.device == x.device
        ):
            return False
    return True


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype of y: x's own. Under autocast on a GPU PyTorch normalises in float32; on a CPU it
    does as without."""
    if x.is_cuda and x.dtype != torch.float64 and autocasts(x):
        return torch.float32
    return x.dtype


def common_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The narrowest dtype that holds x and its parameters."""
    dtype = x.dtype
    for p in parameters:
        if p is not None:
            dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def trains(*parameters: Tensor | None) -> bool:
    """Whether autograd would want a gradient of a parameter, which the kernels do not have."""
    wanted = False
    for p in parameters:
        wanted = wanted or (p is not None and p.requires_grad)
    return wanted and torch.is_grad_enabled()


def check_frozen(backend: str, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if trains(parameter):
            raise ValueError(
                f"{name}: expected a frozen tensor on backend {backend!r}, whose kernels have no "
                "gradient for it, got one that requires grad; use backend='auto' or 'reference'"
            )


def parameter(p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As kernels read it: contiguous, in x's dtype or in that of the sums."""
    if p is None:
        return None
    if p.dtype != dtype and p.dtype != acc_dtype(dtype):
        p = p.to(acc_dtype(dtype))
    return p.contiguous()


def keep_input(x: Tensor, keep: str, backend: str) -> tuple[Tensor, ...]:
    """What stays of x until the backward: x, or its 8-bit codes and their ranges."""
    if keep == "input":
        return (x,)
    return quantize.narrow(x, backend)


def kept_input(kept: Sequence[Tensor], backend: str, dtype: torch.dtype) -> Tensor:
    """x again, or what its codes stand for, in the dtype it is computed in."""
    if len(kept) == 1:
        return cast(kept[0], dtype)
    codes, ranges = kept
    return quantize.widen(codes, ranges, dtype, backend)


def save_norm(
    ctx: Any,
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    statistics: tuple[Tensor, ...],
    keep: str,
    backend: str,
    *options: Any,
) -> None:
    """Keeps x or its codes, mean and rstd, and the parameters themselves: nothing else.

    Inputs 1 and 2 of the op are weight and bias.
    """
    for name, needed in zip(("weight", "bias"), ctx.needs_input_grad[1:3], strict=True):
        if needed:
            raise ValueError(
                f"{name}: expected a frozen tensor, the kernels have no gradient for it; "
                "use backend='reference'"
            )
    kept = keep_input(x, keep, backend)
    ctx.save_for_backward(*kept, *statistics, *parameters)
    held = ("x",) if len(kept) == 1 else ("codes", "ranges")
    ctx.saved_names = (*held, "mean", "rstd", "weight", "bias")
    ctx.options = (x.dtype, len(kept), backend, options)


def norm_rule(ctx: Any, dy: Tensor, backward: Callable[..., Tensor]) -> Tensor:
    """dx in x's dtype, of `backward(dy, x, mean, rstd, *parameters, *options, backend)`."""
    dtype, count, backend, options = ctx.options
    saved = ctx.saved_tensors
    x = kept_input(saved[:count], backend, dy.dtype)
    return cast(backward(dy, x, *saved[count:], *options, backend), dtype)
