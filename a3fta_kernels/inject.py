"""inject and eject: adapters into a model and out of it again, without a trace.

The other names of the interface (`set_adapters`, `merge`, ...) are here too.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import processors
from .adapters import DESIGNS, AdapterConfig, BottleneckAdapter
from .attention import engines_in_use, unfuse_qkv
from .backends import BACKENDS, resolve
from .checks import check_choice, describe
from .forwards import check_forward
from .merging import merge, unmerge
from .processors import Family
from .projection import (
    AdaptedProjectionMixin,
    Columns,
    adapt,
    check_restorable,
    restore,
    span,
    why_not_adaptable,
)
from .report import InjectionReport, LayerReport, describe_layer
from .switch import (
    disable_adapters,
    disabled,
    enable_adapters,
    freeze_for_inference,
    set_adapters,
    set_trainable,
    trainable_parameters,
    unfreeze,
)
from .tree import (
    RECORD,
    adapted,
    check_known,
    check_unmerged,
    denoiser,
    plain_name,
    projections,
    records,
)
from .whereabouts import is_sharded

__all__ = [
    "InjectionReport",
    "LayerReport",
    "attn_processors",
    "disable_adapters",
    "disabled",
    "eject",
    "enable_adapters",
    "freeze_for_inference",
    "inject",
    "merge",
    "projections",
    "set_adapters",
    "set_trainable",
    "trainable_parameters",
    "unfreeze",
    "unmerge",
]


@dataclass
class Plan:
    """Everything `inject` will do, worked out before anything is touched."""

    name: str
    config: AdapterConfig
    backend: str
    family: Family
    targets: dict[str, nn.Linear]  # plain name -> the layer itself, inside PEFT's wrapper
    columns: dict[str, Columns]  # of the targets' input that the adapters act on
    ranks: dict[str, int]
    processors: dict[str, Any]  # attention name -> ours
    left: dict[str, str]
    unadapted: dict[str, str]

    def adapter(self, target: str, device: torch.device | str) -> BottleneckAdapter:
        """A new adapter for one of the targets."""
        linear = self.targets[target]
        return DESIGNS[self.config.design](
            span(linear, self.columns[target])[1],
            self.ranks[target],
            self.config,
            device=device,
            dtype=adapter_dtype(linear, self.config),
        )


def inject(
    model: Any,
    config: AdapterConfig | None = None,
    name: str = "default",
    *,
    backend: str = "auto",
) -> InjectionReport:
    """Puts an adapter on every attention layer, freezes the rest and swaps the processors.

    Args:
        model: a diffusers model, or a pipeline, whose denoiser is taken. It computes what it
            computed before until the adapter has trained.
        config: the adapter; None: AdapterConfig().
        name: of the adapter. A further one joins those the model has, in parallel, with weight 1.
        backend: auto, reference, triton or native, for these layers' ops.

    The first injection sets requires_grad=False on everything but adapters and PEFT's own
    parameters; `eject` restores it. Processors that are not known stay; the adapter acts there
    too, because it is part of the projection.

    Raises:
        TypeError, ValueError: bad arguments, an adapter of that name, no attention, a target or
            pattern that matches nothing, merged adapters. The model is unchanged then.
        BackendUnavailableError: the named backend cannot run here.
    """
    root = denoiser(model)
    plan = plan_injection(root, config, name, backend)
    _apply(root, plan)
    for attention, processor in plan.processors.items():
        root.get_submodule(attention).set_processor(processor)  # type: ignore[operator]
    return _report(root, plan)


def attn_processors(
    model: Any,
    config: AdapterConfig | None = None,
    name: str = "default",
    *,
    backend: str = "auto",
) -> dict[str, Any]:
    """As `inject`, for `model.set_attn_processor(...)`: adds the adapters, and returns the
    processor for every attention layer instead of setting it.

    Layers whose processor is not known keep it. Arguments and errors are those of `inject`.
    """
    root = denoiser(model)
    plan = plan_injection(root, config, name, backend)
    _apply(root, plan)
    return {
        f"{attention}.processor": plan.processors.get(attention, module.get_processor())
        for attention, module in root.named_modules()
        if hasattr(module, "get_processor")
    }


def eject(model: Any, name: str | None = None) -> None:
    """Removes one adapter, or with None all. After the last one the model is the stock model
    again, bit for bit: classes, state-dict names, processors, requires_grad.

    Raises ValueError for a name the model does not have, and for merged adapters.
    """
    root = denoiser(model)
    layers = adapted(root)
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string or None, got {describe(name)}")
        check_known("name", [name], layers.values())
    check_unmerged(layers, "eject")
    for layer in layers.values():
        check_restorable(layer)
    if name is None or all(list(layer.adapters) == [name] for layer in layers.values()):
        unfuse_qkv(root)
    for layer in layers.values():
        for gone in list(layer.adapters) if name is None else [name]:
            if gone in layer.adapters:
                del layer.adapters[gone]
                layer.weights.pop(gone, None)
        layer.frozen = None
        if len(layer.adapters) == 0:
            restore(layer)
    if not projections(root):
        _restore_model(root)


def plan_injection(root: nn.Module, config: AdapterConfig | None, name: str, backend: str) -> Plan:
    config = AdapterConfig() if config is None else config
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config: expected an AdapterConfig or None, got {describe(config)}")
    check_name(name)
    check_choice("backend", backend, ("auto", *BACKENDS))
    existing = projections(root)
    if any(name in layer.adapters for layer in existing.values()):
        raise ValueError(
            f"name: expected a name that the model does not have yet, got {name!r}; eject it "
            f"first, or choose another"
        )
    check_unmerged(existing, "inject another")
    family = processors.family_of(root)
    sites = [] if family is None else list(family.sites(root))
    if family is None or not sites:
        raise ValueError(
            f"model: expected a model with attention layers of a known family "
            f"({', '.join(processors.FAMILIES)}), got a {type(root).__name__} with none"
        )

    plan = Plan(name, config, backend, family, {}, {}, {}, {}, {}, {})
    for site in sites:
        _plan_site(plan, site)
    _check_patterns(plan, [plain_name(p) for site in sites for p in site.projections])
    for target, linear in plan.targets.items():
        if is_sharded(linear.weight):
            raise ValueError(
                f"model: expected whole weights, got a {type(linear.weight).__name__} in {target}: "
                f"an adapter that comes after fully_shard would be no part of it; inject first"
            )
        if not isinstance(linear, AdaptedProjectionMixin):
            check_forward(linear)
        if linear.weight.device.type != "meta":
            resolve(backend, linear.weight.device, _compute_dtype(linear))
    return plan


def _plan_site(plan: Plan, site: processors.Site) -> None:
    if not site.projections:
        plan.unadapted[site.name] = site.reason
        return
    reasons = []
    for full, layer in site.projections.items():
        name, linear = plain_name(full), _inside(layer)
        if not isinstance(linear, nn.Linear):
            reasons.append(f"its projection is a {type(linear).__name__}")
        elif not _is_target(plan.config.targets, name):
            reasons.append("not in targets")
        elif (unadaptable := why_not_adaptable(linear)) is not None:
            reasons.append(unadaptable)
        elif any(linear is other for other in plan.targets.values()):
            reasons.append("its projection is shared with another layer")
        else:
            plan.targets[name] = linear
            plan.columns[name] = site.columns
            plan.ranks[name] = plan.config.rank_for(name)
    if len(reasons) == len(site.projections):
        plan.unadapted[site.name] = reasons[0]
        return
    current = site.attention.get_processor()  # type: ignore[operator]
    ours = plan.family.processor_for(current)
    if ours is not None:
        plan.processors[site.name] = ours
    elif not plan.family.owns(current):
        plan.left[site.name] = type(current).__name__


def _check_patterns(plan: Plan, names: list[str]) -> None:
    targets = plan.config.targets
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    for target in wanted:
        entry = target if isinstance(targets, str) else (target,)
        if not any(_is_target(entry, name) for name in names):
            raise ValueError(
                f"targets: expected parts of the names of attention projections "
                f"(such as {names[0]}), got {target!r}, which matches none"
            )
    for pattern in plan.config.rank_pattern:
        if not any(re.search(pattern, name) for name in plan.targets):
            raise ValueError(
                f"rank_pattern: expected patterns that match an adapted layer "
                f"(such as {next(iter(plan.targets), names[0])}), got {pattern!r}"
            )
    if not plan.targets:
        raise ValueError(
            f"model: expected attention layers followed by a linear layer, got none: "
            f"{'; '.join(sorted(set(plan.unadapted.values())))}"
        )


def _is_target(targets: str | tuple[str, ...] | None, name: str) -> bool:
    if targets is None:
        return True
    if isinstance(targets, str):
        return re.search(targets, name) is not None
    return any(f".{target}." in f".{name}." for target in targets)


def check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {describe(name)}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name: expected letters, digits, - and _ (and no method of torch's ModuleDict), "
            f"got {name!r}"
        )


def _inside(layer: nn.Module) -> nn.Module:
    """The layer inside PEFT's wrappers."""
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


def _apply(root: nn.Module, plan: Plan) -> None:
    # a parameter made in inference mode could not be trained
    with torch.inference_mode(False):
        fresh = {
            name: plan.adapter(name, adapter_device(linear))
            for name, linear in plan.targets.items()
        }
    if RECORD not in root.__dict__:
        root.__dict__[RECORD] = {"trained": _freeze(root), "processors": {}}
    record = root.__dict__[RECORD]
    for attention in plan.processors:
        current = root.get_submodule(attention).get_processor()  # type: ignore[operator]
        record["processors"].setdefault(attention, current)
    # a model whose adapters are switched off stays so as a whole
    enabled = all(layer.enabled for layer in projections(root).values())
    for name, linear in plan.targets.items():
        layer = (
            linear
            if isinstance(linear, AdaptedProjectionMixin)
            else adapt(linear, plan.backend, plan.columns[name])
        )
        fresh[name].train(layer.training)
        layer.adapters[plan.name] = fresh[name]
        layer.weights[plan.name] = 1.0
        layer.backend = plan.backend
        layer.enabled = enabled
        layer.frozen = None


def _freeze(root: nn.Module) -> list[str]:
    """Freezes all but adapters and PEFT's parameters; returns the plain names of what trained."""
    ours = {id(p) for x in projections(root).values() for p in x.adapters.parameters()}
    tuners = [
        f"{name}." if name else ""
        for name, module in root.named_modules()
        if isinstance(module._modules.get("base_layer"), nn.Module)
    ]
    trained = []
    for name, parameter in root.named_parameters():
        rest = next((name[len(t) :] for t in reversed(tuners) if name.startswith(t)), None)
        if id(parameter) in ours or (rest is not None and not rest.startswith("base_layer.")):
            continue
        if parameter.requires_grad:
            trained.append(plain_name(name))
            parameter.requires_grad_(False)
    return trained


def _restore_model(root: nn.Module) -> None:
    for holder, record in list(records(root)):
        trained = set(record["trained"])
        for name, parameter in holder.named_parameters():
            if plain_name(name) in trained:
                parameter.requires_grad_(True)
        family = processors.family_of(holder)
        for attention, stock in record["processors"].items():
            module = holder.get_submodule(attention)
            if family is not None and family.owns(module.get_processor()):  # type: ignore[operator]
                module.set_processor(stock)  # type: ignore[operator]
        del holder.__dict__[RECORD]


def adapter_device(linear: nn.Linear) -> torch.device:
    """That of the weight; of an offloaded one the device that its hook computes on."""
    if linear.weight.device.type != "meta":
        return linear.weight.device
    hook = getattr(linear, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def adapter_dtype(linear: nn.Linear, config: AdapterConfig) -> torch.dtype:
    if config.dtype is not None:
        return config.dtype
    return torch.float64 if linear.weight.dtype == torch.float64 else torch.float32


def _compute_dtype(linear: nn.Linear) -> torch.dtype:
    dtype = linear.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def _report(root: nn.Module, plan: Plan) -> InjectionReport:
    layers = projections(root)
    found = {name: describe_layer(layers[name], plan.name) for name in plan.targets}
    notes = []
    meta = [name for name in found if layers[name].weight.device.type == "meta"]
    if meta:
        notes.append(
            f"{len(meta)} weights are on the meta device: their adapters are on "
            f"{adapter_device(layers[meta[0]])}"
        )
    count = Counter({plan.family.name: len(found)})
    ours = {name: repr(processor).split(" ")[0] for name, processor in plan.processors.items()}
    adapters = sum(p.numel() for x in layers.values() for p in x.adapters.parameters())
    return InjectionReport(
        name=plan.name,
        layers=found,
        families=dict(count),
        processors=ours,
        left_processors=dict(plan.left),
        unadapted=dict(plan.unadapted),
        parameters_added=sum(layer.parameters for layer in found.values()),
        parameters_total=_count(root) - adapters,
        attention=engines_in_use(root),
        notes=tuple(notes),
    )


def _count(root: nn.Module) -> int:
    """The model's parameters; of layers whose weight is packed (quantized), those it stands for."""
    packed = {
        id(m.weight): m.out_features * m.in_features - m.weight.numel()
        for m in root.modules()
        if isinstance(m, nn.Linear)
    }
    return sum(p.numel() + packed.get(id(p), 0) for p in root.parameters())
