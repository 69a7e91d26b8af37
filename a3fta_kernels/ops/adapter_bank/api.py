"""The public `adapter_bank`: checks, layout, and the choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import resolve
from ...checks import check_choice, check_device, check_dtype, check_shape, check_tensor
from ..activations import ACTIVATIONS
from ..rule import autocast_dtype, cast, is_plain, without_autocast
from ..validate import FLOATS, check_base, check_input
from . import contract
from .reference import adapter_bank as reference


def adapter_bank(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    index: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    base: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """Each sample with its own adapter of a bank of K, all samples in one pass.

        a    = h_b @ w_down[k].T + b_down[k]                           k = index[b]
        h'_b = base_b + scale[k] * (act(a) @ w_up[k].T + b_up[k])      k = -1: h'_b = base_b

    base is h where there is none.

    Args:
        h: (B, ..., C) attention output, heads merged; any strides; fp32, fp16 or bf16 (fp64 too on
            `reference` and on `native` on the CPU). May be empty.
        w_down, b_down: (K, R, C) and (K, R), K and R at least 1. An adapter of a rank below R is
            padded with zeros.
        w_up, b_up: (K, C, R) and (K, C). The bank may be of another floating dtype: it is cast
            to h's, and its gradients come back in its own.
        index: (B,) int32 or int64, each -1 (no adapter) or 0 to K - 1. Other numbers raise on the
            CPU; on a GPU, where looking would wait for the device, that sample becomes NaN
            (`reference`: an assertion of the device).
        base: (B, ..., N) in h's dtype (under autocast: any), for adapters beside a layer, whose
            output this is; w_up is then (K, N, R) and b_up (K, N).
        scale: (K,) floating, or None for 1.
        activation: of all adapters: identity, relu, gelu, gelu_tanh or silu.
        backend: auto, reference, triton or native.

    Returns:
        h' of h's (or base's) shape and h's (under autocast: the autocast) dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once, in every tensor argument but index.
    """
    check_input(h)
    outputs = check_base(h, base)
    _check_bank(h, w_down, w_up, index, b_down, b_up, scale, activation, outputs)
    h = h.to(autocast_dtype(h))
    base = cast(base, h.dtype)
    chosen = resolve(backend, h.device, h.dtype)
    if chosen == "reference":
        return reference(
            h, w_down, w_up, index, b_down, b_up, base=base, scale=scale, activation=activation
        )
    flat = h.reshape(-1, h.shape[-1])
    flat_base = None if base is None else base.reshape(-1, outputs)
    with without_autocast(h):
        y = contract.apply(
            flat, w_down, w_up, index, b_down, b_up, scale, flat_base, activation, chosen
        )
    return y.view(*h.shape[:-1], outputs)


def _check_bank(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    index: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: Tensor | None,
    activation: str,
    outputs: int,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    if h.dim() < 2:
        raise ValueError(f"h: expected shape (B, ..., C), got {tuple(h.shape)}")
    check_tensor("w_down", w_down)
    if w_down.dim() != 3 or 0 in w_down.shape:
        raise ValueError(
            f"w_down: expected shape (K, R, C) with K and R of at least 1, "
            f"got {tuple(w_down.shape)}"
        )
    bank, rank, channels = len(w_down), w_down.shape[1], h.shape[-1]
    name = "C" if outputs == channels else "N"
    tensors: dict[str, tuple[Tensor | None, tuple[int, ...], str]] = {
        "w_down": (w_down, (bank, rank, channels), "(K, R, C) = (adapters, rank, channels)"),
        "w_up": (w_up, (bank, outputs, rank), f"(K, {name}, R) = (adapters, channels, rank)"),
        "b_down": (b_down, (bank, rank), "(K, R) = (adapters, rank)"),
        "b_up": (b_up, (bank, outputs), f"(K, {name}) = (adapters, channels)"),
        "scale": (scale, (bank,), "(K,) = (adapters,)"),
    }
    for name, (tensor, shape, meaning) in tensors.items():
        check_tensor(name, tensor, optional=name not in ("w_down", "w_up"))
        check_shape(name, tensor, shape, meaning)
        check_dtype(name, tensor, FLOATS)
        check_device(name, tensor, h.device, "h")
    check_tensor("index", index)
    check_shape("index", index, (h.shape[0],), "(B,) = (h.shape[0],)")
    check_dtype("index", index, (torch.int32, torch.int64))
    check_device("index", index, h.device, "h")
    if index.device.type == "cpu" and index.numel() > 0 and is_plain(index):
        low, high = (int(x) for x in index.aminmax())
        if low < -1 or high >= bank:
            raise ValueError(
                f"index: expected -1 or 0 to {bank - 1}, the adapters of the bank, "
                f"got {low if low < -1 else high}"
            )
