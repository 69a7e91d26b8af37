"""What the autograd rule of every op shares: layouts, the scale, and the choice of entry."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_AS_IT_IS = contextlib.nullcontext()


class AdapterGrads(NamedTuple):
    """What a backend's `backward` returns; a field is None where it was not asked for.

    Weight gradients are in the accumulation dtype (fp64 for fp64, else fp32).
    `g_up` and `dy_sum` do not hold the scale yet: what comes after puts it in.
    """

    dh: Tensor | None  # (M, K), dtype of h
    dw_down: Tensor | None = None  # (R, C)
    g_up: Tensor | None = None  # (N, R): dy.T @ z
    da_sum: Tensor | None = None  # (R,)
    dy_sum: Tensor | None = None  # (N,)
    dgamma: Tensor | None = None  # (B, R)
    dbeta: Tensor | None = None  # (B, R)


def loader(package: str | None) -> Callable[[str], ModuleType]:
    """`backend_module` of the op in `package`: imports a backend when it is first asked for."""
    return functools.cache(lambda name: importlib.import_module(f".{name}", package))


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x: Tensor) -> Tensor:
    """A (M, C) tensor whose rows a kernel can read: unit column stride, rows apart.

    Column slices keep their storage; expanded and transposed tensors are copied.
    """
    m, c = x.shape
    if (c == 1 or x.stride(1) == 1) and (m <= 1 or x.stride(0) >= c):
        return x
    return x.contiguous()


def is_plain(x: Tensor) -> bool:
    """True where the cheap eager entry is right: no tracing, no dispatch mode, no subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
    )


def record(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`, which looks through all inputs for what torch.func left there: as
    much work on the host as the rest of its way into C++."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*inputs)


def scaled(x: Tensor, scale: float, scale_tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * scale_tensor * x, rounded once to `dtype`."""
    if scale_tensor is not None:
        wide = acc_dtype(dtype)
        return (x.to(wide) * (scale_tensor.to(wide) * scale)).to(dtype)
    if scale != 1.0:
        return (x.to(acc_dtype(dtype)) * scale).to(dtype)
    return cast(x, dtype)


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """x * factor, x itself where the factor is the number 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x * factor


@overload
def cast(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # asking first is cheaper than a `to` that has nothing to do
    return x if x is None or x.dtype == dtype else x.to(dtype)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def cast_together(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Each tensor in `dtype`, None as it is; on a GPU two kernels cast all that need it.

    There each copy is contiguous and begins at a multiple of 128 bytes.
    """
    sources = [t for t in tensors if t is not None and t.dtype != dtype]
    if len(sources) < 3 or sources[0].device.type != "cuda":
        return [cast(t, dtype) for t in tensors]
    targets = iter(cast_by_two_kernels(sources, dtype))
    return [t if t is None or t.dtype == dtype else next(targets) for t in tensors]


def cast_by_two_kernels(sources: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    # torch._foreach_copy_ is one, and slower: few blocks serve tensors as small as an adapter's
    step = 128 // dtype.itemsize
    parts: list[Tensor] = []
    places = []
    for t in sources:
        places.append(len(parts))
        parts.append(t if t.dim() == 1 else t.reshape(-1))
        gap = -t.numel() % step
        if gap:
            parts.append(t.new_empty(gap))
    copies = torch.cat(parts).to(dtype).split([part.numel() for part in parts])
    return [copies[i].view(t.shape) for i, t in zip(places, sources, strict=True)]


def autocast_dtype(h: Tensor) -> torch.dtype:
    """The dtype an op computes in: h's own, or autocast's where that is on."""
    if h.dtype != torch.float64 and autocasts(h):
        return torch.get_autocast_dtype(h.device.type)
    return h.dtype


def autocasts(h: Tensor) -> bool:
    """Whether autocast is on for h's device; torch raises where it does not know the device."""
    device = h.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(h: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off: the op has cast what it takes, its own products keep their dtypes."""
    if autocasts(h):
        return torch.autocast(h.device.type, enabled=False)
    return _AS_IT_IS


def op_grads(
    grads: Sequence[Tensor | None], inputs: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor]:
    """What the op of a backward returns: each gradient in its input's dtype; an empty tensor where
    none is needed, as an op's list holds no None."""
    return [
        cast(g, x.dtype) if need and g is not None and x is not None else inputs[0].new_empty(0)
        for g, x, need in zip(grads, inputs, needs, strict=True)
    ]


def fake_op_grads(inputs: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    """`op_grads` where only shapes are asked for."""
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need
        else inputs[0].new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    ]


def refuse_second_derivative() -> None:
    """Called in a backward: raises where autograd was asked for a graph of it."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: expected False, the kernels have no second derivative; got True. "
            "Use backend='reference', which has it; in a model beside attention='math', as "
            "PyTorch's attention kernels have none either"
        )
