"""Gradients of lean levels beside those of the stock modules, on the same weights and batch."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.memory import levels

EXACT = ("exact", "block")
EIGHT_BITS = ("compressed", "block-int8")
LEVELS: dict[str, dict[str, str]] = {
    "stock": {"level": "off"},
    **{name: levels.LEVELS[name].lean or {} for name in (*EXACT, *EIGHT_BITS)},
}

Batch = tuple[Tensor, ...]  # noisy, t, labels, target


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    noisy, t, labels, target = batch
    return F.mse_loss(model(noisy, t, class_labels=labels).sample, target)


def set_level(model: nn.Module, level: str) -> None:
    a3fta.lean(getattr(model, "unet", model), **LEVELS[level])


def gradients(model: nn.Module, level: str, batch: Batch) -> dict[str, Tensor]:
    """By tensor, flat and in float64, of a copy of the model at a level."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    set_level(model, level)
    loss_of(model, batch).backward()
    return {
        name: p.grad.flatten().double()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """1 where both are zero, as w_down's gradient is before the first step; 0 where one is."""
    norms = a.norm() * b.norm()
    return float(a @ b / norms) if norms > 0 else float(not a.any() and not b.any())


def probe(model: nn.Module, step: int, batch: Batch, other: Batch) -> dict[str, Any]:
    """Gradients of all levels, and those of another batch, beside the stock ones.

    Of every tensor: the cosine, the relative error where there is one, and the norm of its
    gradient as a share of the whole gradient's.
    """
    stock = gradients(model, "stock", batch)
    elsewhere = gradients(model, "stock", other)
    whole = torch.cat(list(stock.values()))
    found: dict[str, Any] = {
        "step": step,
        "other batch": statistics.median(cosine(elsewhere[n], g) for n, g in stock.items()),
        "levels": {},
    }
    for level in (*EXACT, *EIGHT_BITS):
        grads = gradients(model, level, batch)
        assert grads.keys() == stock.keys()
        tensors = [
            {
                "tensor": name,
                "cosine": cosine(grads[name], g),
                "error": float((grads[name] - g).norm() / g.norm()) if g.any() else None,
                "share": float(g.norm() / whole.norm()),
            }
            for name, g in stock.items()
        ]
        found["levels"][level] = {
            "whole": cosine(torch.cat(list(grads.values())), whole),
            "tensors": tensors,
        }
    return found
