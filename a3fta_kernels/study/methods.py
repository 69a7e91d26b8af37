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
_LORA_JOINT = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


Prepare = Callable[[nn.Module], list[nn.Parameter]]


@dataclass(frozen=True)
class Method:
    """`prepare(model)` makes it ready and returns what trains; none: nothing does.

    trials: learning rates that are tried, the same number for every method. pull: L2-SP's.
    rival: of a design that reaches further, the method that reaches as far without A3FTA.
    """

    label: str
    prepare: Prepare
    trials: tuple[float, ...] = ()
    pull: float = 0.0
    rival: str = ""


def _nothing(model: nn.Module) -> list[nn.Parameter]:
    model.requires_grad_(False)
    return []


def _full(model: nn.Module) -> list[nn.Parameter]:
    return list(model.requires_grad_(True).parameters())


def _only(model: nn.Module, chosen: list[nn.Parameter]) -> list[nn.Parameter]:
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _affine(model: nn.Module) -> list[nn.Parameter]:
    """Gains and shifts of all norms, and all biases."""
    return _only(model, [p for p in model.parameters() if p.ndim == 1])


def _attention(model: nn.Module) -> list[nn.Parameter]:
    """The linear layers that A3FTA's second mode trains beside its adapters, without adapters."""
    config = AdapterConfig(rank=1, train="adapter+attention")
    chosen = list(plan_injection(model, config, "attention", "auto").attention.values())
    return _only(model, chosen)


def _out(model: nn.Module) -> list[nn.Parameter]:
    """The linear layers behind attention, which adapters stand in front of."""
    targets = plan_injection(model, AdapterConfig(rank=1), "out", "auto").targets.values()
    return _only(model, [parameter for layer in targets for parameter in layer.parameters()])


def _scratch(model: nn.Module) -> list[nn.Parameter]:
    """Everything, from new weights: what pre-training is worth."""
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return _full(model)


def _lora(*targets: str) -> Prepare:
    """On layers whose names end so: PEFT finds them by that."""

    def prepare(model: nn.Module) -> list[nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        joint = [name for name in _LORA_JOINT if name in names]
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=[*targets, *joint])
        inject_adapter_in_model(config, model.requires_grad_(False))
        return [p for name, p in model.named_parameters() if ".lora_" in name]

    return prepare


def _adapter(**options: Any) -> Prepare:
    config = AdapterConfig(**{"rank": RANK, **options})

    def prepare(model: nn.Module) -> list[nn.Parameter]:
        inject(model, config)
        return list(trainable_parameters(model))

    return prepare


def _together(*prepares: Prepare) -> Prepare:
    """One after the other. Each freezes all else, also what those before it train: at the end all
    of that trains again."""

    def prepare(model: nn.Module) -> list[nn.Parameter]:
        chosen = [parameter for one in prepares for parameter in one(model)]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    return prepare


_WHOLE = (3e-5, 1e-4, 3e-4, 1e-3)
_ATTENTION = (3e-4, 1e-3, 3e-3, 1e-2)
_SMALL = (1e-3, 3e-3, 1e-2, 3e-2)
_QKV = ("to_q", "to_k", "to_v")

METHODS = {
    "base": Method("base, not tuned", _nothing),
    "full": Method("full tuning", _full, _WHOLE),
    "attention": Method("attention only", _attention, _ATTENTION),
    "l2sp": Method("L2-SP", _full, _WHOLE, PULL),
    "lora": Method(f"PEFT LoRA r{LORA_RANK}, qkvo", _lora(*_QKV, "to_out.0"), _SMALL),
    "identity": Method("A3FTA identity", _adapter(activation="identity"), _SMALL),
    "gelu": Method("A3FTA GELU", _adapter(), _SMALL),
    "film": Method("A3FTA time-aware", _adapter(design="film"), _SMALL),
    "adapter+attention": Method(
        "A3FTA + attention", _adapter(train="adapter+attention"), _ATTENTION
    ),
}
# what a plan compares where it does not say
HEADLINE = tuple(METHODS)
METHODS |= {
    "full-slow": Method("full tuning, slower", _full, (1e-5, 3e-5, 1e-4, 3e-4)),
    "lora-slow": Method(
        f"PEFT LoRA r{LORA_RANK}, qkvo, slower rates", _lora(*_QKV, "to_out.0"), _ATTENTION
    ),
    "affine": Method("norms and biases", _affine, _ATTENTION),
    "out": Method("the layer behind attention", _out, _ATTENTION),
    "scratch": Method("full tuning of new weights", _scratch, _WHOLE),
    "lora+affine": Method(
        "LoRA + norms and biases", _together(_affine, _lora(*_QKV, "to_out.0")), _ATTENTION
    ),
}
# measured beside the candidates of a search, and none of them
CONTROLS = tuple(METHODS)
METHODS |= {
    "rank-8": Method("A3FTA, rank 8", _adapter(rank=8), _SMALL),
    "rank-64": Method("A3FTA, rank 64", _adapter(rank=64), _SMALL),
    "post": Method("A3FTA behind the projection", _adapter(placement="post"), _SMALL),
    "parallel": Method("A3FTA beside attention", _adapter(placement="parallel"), _SMALL),
    "parallel-8": Method(
        "A3FTA beside attention, rank 8", _adapter(placement="parallel", rank=8), _SMALL
    ),
    "parallel-64": Method(
        "A3FTA beside attention, rank 64", _adapter(placement="parallel", rank=64), _SMALL
    ),
    "parallel-film": Method(
        "A3FTA beside attention, time-aware", _adapter(placement="parallel", design="film"), _SMALL
    ),
    "gated": Method("A3FTA gated", _adapter(design="gated"), _SMALL),
    "rescaled": Method("A3FTA rescaled", _adapter(design="rescaled"), _SMALL),
    "time_scaled": Method("A3FTA time-scaled", _adapter(design="time_scaled"), _SMALL),
    "time_rank": Method("A3FTA, rank 8 to 32 over time", _adapter(time_rank=8), _SMALL),
    "layer_norm": Method("A3FTA, normed", _adapter(layer_norm=True), _SMALL),
    "dropout": Method("A3FTA, dropout", _adapter(dropout=0.1, drop_path=0.1), _SMALL),
    "film+attention": Method(
        "A3FTA time-aware + attention", _adapter(design="film", train="adapter+attention"),
        _ATTENTION, rival="attention",
    ),
    "gelu+lora": Method(
        "A3FTA + LoRA on qkv", _together(_adapter(), _lora(*_QKV)), _ATTENTION, rival="lora-slow"
    ),
    "film+lora": Method(
        "A3FTA time-aware + LoRA on qkv", _together(_adapter(design="film"), _lora(*_QKV)),
        _ATTENTION, rival="lora-slow",
    ),
    "gelu+affine": Method(
        "A3FTA + norms and biases", _together(_affine, _adapter()), _ATTENTION, rival="affine"
    ),
    "film+affine": Method(
        "A3FTA time-aware + norms and biases", _together(_affine, _adapter(design="film")),
        _ATTENTION, rival="affine",
    ),
    "film+lora+affine": Method(
        "A3FTA time-aware + LoRA on qkv + norms and biases",
        _together(_affine, _adapter(design="film"), _lora(*_QKV)), _ATTENTION,
        rival="lora+affine",
    ),
}  # fmt: skip
BASELINE = "base"


def method(name: str) -> Method:
    """Raises ValueError, naming those there are."""
    check_choice("method", name, METHODS)
    return METHODS[name]
