"""The public `adapter_bank`: checks, layout, and the choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import resolve
from ...checks import check_choice, check_device, check_dtype, check_shape, check_tensor
from ..activations import ACTIVATIONS
from ..rule import autocast_dtype, is_plain, without_autocast
from ..validate import FLOATS, check_input
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
    scale: Tensor | None = None,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """Each sample with its own adapter of a bank of K, all samples in one pass.

        a    = h_b @ w_down[k].T + b_down[k]                        k = index[b]
        h'_b = h_b + scale[k] * (act(a) @ w_up[k].T + b_up[k])      k = -1: h'_b = h_b

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
        scale: (K,) floating, or None for 1.
        activation: of all adapters: identity, relu, gelu, gelu_tanh or silu.
        backend: auto, reference, triton or native.

    Returns:
        h' of h's shape and (under autocast: the autocast) dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.

    Differentiable once, in every tensor argument but index.
    """
    check_input(h)
    _check_bank(h, w_down, w_up, index, b_down, b_up, scale, activation)
    h = h.to(autocast_dtype(h))
    chosen = resolve(backend, h.device, h.dtype)
    if chosen == "reference":
        return reference(h, w_down, w_up, index, b_down, b_up, scale=scale, activation=activation)
    with without_autocast(h):
        y = contract.apply(
            h.reshape(-1, h.shape[-1]), w_down, w_up, index, b_down, b_up, scale, activation, chosen
        )
    return y.view(h.shape)


def _check_bank(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    index: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: Tensor | None,
    activation: str,
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
    tensors: dict[str, tuple[Tensor | None, tuple[int, ...], str]] = {
        "w_down": (w_down, (bank, rank, channels), "(K, R, C) = (adapters, rank, channels)"),
        "w_up": (w_up, (bank, channels, rank), "(K, C, R) = (adapters, channels, rank)"),
        "b_down": (b_down, (bank, rank), "(K, R) = (adapters, rank)"),
        "b_up": (b_up, (bank, channels), "(K, C) = (adapters, channels)"),
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
