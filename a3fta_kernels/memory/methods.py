"""Ways to fine-tune a model, as `a3fta ledger` and `a3fta plan` compare them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters import AdapterConfig
from ..backends import native_status
from ..checks import check_choice


@dataclass(frozen=True)
class Method:
    """`apply(model, rank, dtype)` makes a model on the meta device train; rank: the default."""

    title: str
    rank: int | None
    apply: Callable[[nn.Module, int, torch.dtype], None]


def _a3fta(model: nn.Module, rank: int, dtype: torch.dtype, placement: str = "pre") -> None:
    from ..inject import inject  # imports diffusers

    inject(model, AdapterConfig(rank=rank, placement=placement), backend=backend())


def backend() -> str:
    """What the adapters are counted as: the compiled library, which saves what Triton does, or
    the reference where there is none, which keeps h' besides."""
    return "native" if native_status().available else "reference"


def _lora(model: nn.Module, rank: int, dtype: torch.dtype) -> None:
    _lora_fp32(model, rank, dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _lora_fp32(model: nn.Module, rank: int, dtype: torch.dtype) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)  # on the meta device


def _full(model: nn.Module, rank: int, dtype: torch.dtype) -> None:
    model.requires_grad_(True)


METHODS = {
    "a3fta": Method("A3FTA adapters", 64, _a3fta),
    "parallel": Method(
        "A3FTA adapters beside attention", 64, functools.partial(_a3fta, placement="parallel")
    ),
    "lora": Method("PEFT LoRA on q, k, v, out, in the model's dtype", 16, _lora),
    "lora-fp32": Method("PEFT LoRA on q, k, v, out, in fp32", 16, _lora_fp32),
    "full": Method("every weight trains", None, _full),
}


def adapt(model: nn.Module, method: str, rank: int | None, dtype: torch.dtype) -> int | None:
    """Makes `model`, on the meta device, train by a method of METHODS; returns the rank it has.

    Raises ValueError for an unknown method, and what `inject` raises for a model without a
    known attention layer.
    """
    check_choice("method", method, METHODS)
    known = METHODS[method]
    rank = known.rank if rank is None or known.rank is None else rank
    known.apply(model, rank or 0, dtype)
    return rank
