"""What is compared: each method makes a fresh denoiser ready to train.

L2-SP is Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with
Convolutional Networks" (2018): full tuning with a pull towards the pre-trained weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters import AdapterConfig
from ..checks import check_choice
from ..inject import inject, trainable_parameters
from ..planning import plan_injection

RANK, LORA_RANK, PULL = 32, 16, 0.01
# PEFT finds them by the ends of their names
_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_LORA_JOINT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass(frozen=True)
class Method:
    """`prepare(model)` makes it ready and returns what trains; none: nothing does.

    trials: learning rates that are tried, the same number for every method. pull: L2-SP's.
    """

    label: str
    prepare: Callable[[nn.Module], list[nn.Parameter]]
    trials: tuple[float, ...] = ()
    pull: float = 0.0


def _nothing(model: nn.Module) -> list[nn.Parameter]:
    model.requires_grad_(False)
    return []


def _full(model: nn.Module) -> list[nn.Parameter]:
    return list(model.requires_grad_(True).parameters())


def _attention(model: nn.Module) -> list[nn.Parameter]:
    """The linear layers that A3FTA's second mode trains beside its adapters, without adapters."""
    config = AdapterConfig(rank=1, train="adapter+attention")
    chosen = list(plan_injection(model, config, "attention", "auto").attention.values())
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _lora(model: nn.Module) -> list[nn.Parameter]:
    from peft import LoraConfig, inject_adapter_in_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    joint = [name for name in _LORA_JOINT if name in names]
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=[*_LORA_TARGETS, *joint])
    inject_adapter_in_model(config, model.requires_grad_(False))
    return [p for p in model.parameters() if p.requires_grad]


def _adapter(**options: Any) -> Callable[[nn.Module], list[nn.Parameter]]:
    config = AdapterConfig(**{"rank": RANK, **options})

    def prepare(model: nn.Module) -> list[nn.Parameter]:
        inject(model, config)
        return list(trainable_parameters(model))

    return prepare


_WHOLE = (3e-5, 1e-4, 3e-4, 1e-3)
_ATTENTION = (3e-4, 1e-3, 3e-3, 1e-2)
_SMALL = (1e-3, 3e-3, 1e-2, 3e-2)

METHODS = {
    "base": Method("base, not tuned", _nothing),
    "full": Method("full tuning", _full, _WHOLE),
    "attention": Method("attention only", _attention, _ATTENTION),
    "l2sp": Method("L2-SP", _full, _WHOLE, PULL),
    "lora": Method(f"PEFT LoRA r{LORA_RANK}, qkvo", _lora, _SMALL),
    "identity": Method("A3FTA identity", _adapter(activation="identity"), _SMALL),
    "gelu": Method("A3FTA GELU", _adapter(), _SMALL),
    "film": Method("A3FTA time-aware", _adapter(design="film"), _SMALL),
    "adapter+attention": Method(
        "A3FTA + attention", _adapter(train="adapter+attention"), _ATTENTION
    ),
}
BASELINE = "base"


def method(name: str) -> Method:
    """Raises ValueError, naming those there are."""
    check_choice("method", name, METHODS)
    return METHODS[name]
