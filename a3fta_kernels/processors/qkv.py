"""Frozen projections of one input: q, k and v of self-attention, k and v of cross-attention.

    forward   y_i = x @ weight_i.T + bias_i        one product where the weights lie side by side
    backward  dx  = sum over i of dy_i @ weight_i  summed by the products, into one dx

x (..., K); weight_i (N_i, K); y_i (..., N_i). Layers that are not plain and frozen are called as
the modules they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..forwards import has_hooks
from ..ops.rule import autocast_dtype, cast, is_plain, record
from ..ops.validate import FLOATS

_JOINED = "_a3fta_joined"  # on a layer that `lay_side_by_side` moved


def project(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """layer(x) for each of the layers."""
    # the compiler sees the modules: it sums gradients in kernels of its own; so do torch.func and
    # forward-mode derivatives, which the function below does not have
    if not is_plain(x) or _transformed() or why_not_plain(layers) is not None:
        return tuple(layer(x) for layer in layers)
    weights: list[Any] = [layer._parameters["weight"] for layer in layers]
    biases = [layer._parameters["bias"] for layer in layers]
    tensors = [t for t in (*weights, *biases) if t is not None]
    grad = torch.is_grad_enabled()
    dtype = autocast_dtype(x)
    if any(t.dtype != dtype or (grad and t.requires_grad) for t in tensors):
        return tuple(layer(x) for layer in layers)
    x = cast(x, dtype)
    if grad and x.requires_grad:
        return record(FrozenProjections, x, *weights, *biases)
    return products(x, weights, biases)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def why_not_plain(layers: Sequence[nn.Module]) -> str | None:
    """Why the weights must not be read past the modules; None where they may."""
    if _has_any_global_hook():
        return "hooks on all modules are set"
    for layer in layers:
        if type(layer) is not nn.Linear:
            kind = type(layer)
            return f"a layer is a {kind.__module__}.{kind.__name__}, not a plain nn.Linear"
        state = layer.__dict__
        if has_hooks(layer):
            return "a layer carries hooks"
        weight = state["_parameters"].get("weight")
        if type(weight) is not nn.Parameter:
            return f"a weight is a {type(weight).__name__}, not a plain parameter"
        if weight.dtype not in FLOATS:
            return f"a weight is stored as {weight.dtype}"
    return None


class FrozenProjections(torch.autograd.Function):
    """`products`, and their dx without a sum apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        weights, biases = tensors[:count], tensors[count:]
        ctx.save_for_backward(*weights)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return products(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple:
        dx: Tensor | None = None
        weights = ctx.saved_tensors
        for dy, weight in zip(grad_outputs, weights, strict=True):
            if dy is None:
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if dx is not None:
            dx = dx.view(ctx.shape)
        return (dx, *[None] * (2 * len(weights)))


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """x @ weight_i.T + bias_i (..., N_i); column slices of one result from one product."""
    weight = joint(weights)
    bias = joint(biases) if weight is not None and biases[0] is not None else None
    if weight is None or (bias is None and any(b is not None for b in biases)):
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    return F.linear(x, weight, bias).split([w.shape[0] for w in weights], dim=-1)


def joint(parts: Sequence[Tensor | None]) -> Tensor | None:
    """A view of all parts as one tensor where they lie side by side, in order; else None.

    Asked of the tensors in every call: a move, a copy or a new parameter ends it.
    """
    first = parts[0]
    if first is None or first.untyped_storage().nbytes() <= first.nbytes:
        return None
    end, rows = first.data_ptr(), 0
    for part in parts:
        if (
            part is None
            or part.data_ptr() != end
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or not part.is_contiguous()
        ):
            return None
        end += part.nbytes
        rows += part.shape[0]
    room = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
    if end - first.data_ptr() > room:
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def lay_side_by_side(layers: Sequence[nn.Module]) -> None:
    """Moves the weights of plain layers, and their biases, into one piece of memory.

    Values and parameters stay. The storage of the first is the whole; each of the others has a
    storage of its own over its part, so that what saves models does not take them for one tensor.
    """
    for name in ("weight", "bias"):
        parameters = [layer._parameters[name] for layer in layers]
        found = [p for p in parameters if p is not None]
        if len(found) < len(layers) or joint(parameters) is not None:
            continue
        # a tensor made in inference mode could not be trained beside
        with torch.inference_mode(False):
            whole = torch.cat([p.detach() for p in found])
            parts = whole.split([p.shape[0] for p in found])
            for i, (parameter, part) in enumerate(zip(found, parts, strict=True)):
                parameter.data = part if i == 0 else torch.from_dlpack(part)
    for layer in layers:
        layer.__dict__[_JOINED] = True


def lay_apart(root: nn.Module) -> None:
    """Undoes every `lay_side_by_side` below `root`: each tensor in memory of its own size.

    Also where something parted the layers since, but left their memory shared.
    """
    for layer in root.modules():
        if layer.__dict__.pop(_JOINED, False):
            with torch.inference_mode(False):
                for parameter in layer._parameters.values():
                    if parameter is not None and not parameter.is_inference():
                        parameter.data = parameter.detach().clone()
