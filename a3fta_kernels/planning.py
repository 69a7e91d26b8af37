"""What `inject` will do, worked out before anything is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from . import attention_weights, placements, processors
from .adapters import DESIGNS, AdapterConfig, BottleneckAdapter
from .backends import BACKENDS, resolve
from .checks import check_choice, describe
from .conversion import why_not_adaptable
from .forwards import check_forward, inside
from .ops.rule import acc_dtype
from .processors import Family
from .projection import AdaptedProjectionMixin, Columns, span
from .timesteps import check_timed
from .tree import check_one_batch, check_unmerged, plain_name, projections
from .whereabouts import check_in_memory, check_whole

# the way out where a model's structure does not tell
IN_FULL = (
    ". Name the linear layers that consume attention in full: "
    "AdapterConfig(targets=['blocks.0.attn.out', ...]) with the model's own names"
)


@dataclass
class Plan:
    """Everything `inject` will do."""

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
    attention: dict[str, nn.Parameter]  # what trains beside the adapters, by plain name
    # of the targets of parallel adapters: the attention layer, and what of it they read
    inputs: dict[str, tuple[nn.Module, placements.Input]]

    def adapter(self, target: str, device: str | None = None) -> BottleneckAdapter:
        """A new adapter for one of the targets, as `new_adapter`."""
        given = self.inputs.get(target)
        return new_adapter(
            self.config, self.targets[target], self.columns[target], self.ranks[target],
            None if given is None else given[1].channels, device,
        )  # fmt: skip


def new_adapter(
    config: AdapterConfig, linear: nn.Linear, columns: Columns, rank: int,
    reads: int | None = None, device: str | None = None,
) -> BottleneckAdapter:  # fmt: skip
    """An adapter for this layer, by default where it computes; `reads`: the channels of what a
    parallel one reads."""
    channels, outputs = span(linear, columns)[1], None
    if config.placement != "pre":
        channels, outputs = reads or linear.out_features, linear.out_features
    return DESIGNS[config.design](
        channels, rank, config, outputs=outputs, device=device or adapter_device(linear),
        dtype=config.dtype or acc_dtype(linear.weight.dtype),
    )  # fmt: skip


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
    check_one_batch(existing, "inject another")
    if config.timed:
        check_timed(root)
    family = processors.family_of(root)
    sites = list(family.sites(root))
    if family.by_structure and isinstance(config.targets, tuple):
        sites += processors.structure.named(root, config.targets, sites)
    if not sites:
        raise ValueError(
            f"model: expected a model with attention layers, got a {type(root).__name__} with none"
            f"{IN_FULL if family.by_structure else ''}"
        )

    plan = Plan(name, config, backend, family, {}, {}, {}, {}, {}, {}, {}, {})
    names: list[str] = []
    for site in sites:
        names += _plan_site(plan, site, root)
    attention_weights.check_free(root, plan.attention)
    if plan.attention:
        attention_weights.check_untied(root, plan.attention)
        check_in_memory(root, "inject")
    _check_patterns(plan, names)
    for target, linear in plan.targets.items():
        check_whole(target, linear.weight)
        if not isinstance(linear, AdaptedProjectionMixin):
            check_forward(linear)
        if linear.weight.device.type != "meta":
            resolve(backend, linear.weight.device, _compute_dtype(linear))
    return plan


def _plan_site(plan: Plan, site: processors.Site, root: nn.Module) -> list[str]:
    """Plain names of the layers that targets may mean there."""
    projections = dict(site.projections)
    in_full = plan.config.targets if isinstance(plan.config.targets, tuple) else ()
    for full, doubt in site.unsure.items():
        if plain_name(full) in in_full:
            projections[full] = root.get_submodule(full)
        else:
            plan.unadapted[plain_name(full)] = doubt
    if not projections:
        if not site.unsure:
            plan.unadapted[site.name] = site.reason
        return []
    reasons = []
    for full, layer in projections.items():
        name, linear = plain_name(full), inside(layer)
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
            if plan.config.placement == "parallel":
                plan.inputs[name] = site.attention, read_beside(plan.family, site, name)
    names = [plain_name(full) for full in projections]
    if len(reasons) == len(projections):
        plan.unadapted[site.name] = reasons[0]
        return names
    if plan.config.train != "adapter":
        outputs = {} if site.columns else {k: inside(x) for k, x in site.projections.items()}
        plan.attention |= attention_weights.find(site.name, site.attention, outputs)
    current = processors.processor_of(site.attention)
    ours = plan.family.processor_for(current)
    if ours is not None:
        plan.processors[site.name] = ours
    elif current is not None and not plan.family.owns(current):
        plan.left[site.name] = type(current).__name__
    return names


def read_beside(family: Family, site: processors.Site, name: str) -> placements.Input:
    """What a parallel adapter of the projection `name` reads; ValueError where nobody can tell."""
    if family.joins:
        raise ValueError(
            f"placement: expected a family whose attention hands over what it is given row by "
            f"row, for a parallel adapter, got {family.name}, which joins text and image in "
            f"between; choose 'pre' or 'post'"
        )
    around = f"{plain_name(site.name)}."
    attribute = name.removeprefix(around).partition(".")[0] if name.startswith(around) else ""
    found = placements.input_of(site.attention, attribute)
    if found is None:
        raise ValueError(
            f"placement: expected an attention layer whose query projection tells what it reads, "
            f"for a parallel adapter, got a {type(site.attention).__name__} at {name}; choose "
            f"'pre' or 'post', or other targets"
        )
    return found


def _check_patterns(plan: Plan, names: list[str]) -> None:
    targets = plan.config.targets
    if not names:
        _refuse_none(plan)
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    for target in wanted:
        entry = target if isinstance(targets, str) else (target,)
        if not any(_is_target(entry, name) for name in names):
            doubt = next((n for n in plan.unadapted if _is_target(entry, n)), None)
            raise ValueError(
                f"targets: expected parts of the names of attention projections "
                f"(such as {names[0]}), got {target!r}, which matches none"
                + (f" but {doubt}: {plan.unadapted[doubt]}" if doubt else "")
            )
    for pattern in plan.config.rank_pattern:
        if not any(re.search(pattern, name) for name in plan.targets):
            raise ValueError(
                f"rank_pattern: expected patterns that match an adapted layer "
                f"(such as {next(iter(plan.targets), names[0])}), got {pattern!r}"
            )
    if not plan.targets:
        _refuse_none(plan)


def _refuse_none(plan: Plan) -> NoReturn:
    doubts: dict[str, str] = {}
    for name, reason in plan.unadapted.items():
        doubts.setdefault(reason, name)
    said = "; ".join(f"{name}: {reason}" for reason, name in doubts.items())
    raise ValueError(
        f"model: expected attention layers followed by a linear layer, got none for sure "
        f"({said}){IN_FULL if plan.family.by_structure else ''}"
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


def adapter_device(linear: nn.Linear) -> torch.device:
    """That of the weight; of an offloaded one the device that its hook computes on."""
    if linear.weight.device.type != "meta":
        return linear.weight.device
    hook = getattr(linear, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def _compute_dtype(linear: nn.Linear) -> torch.dtype:
    dtype = linear.weight.dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
