"""inject and eject: adapters into a model and out of it again, without a trace.

The other names of the interface (`set_adapters`, `merge`, ...) are here too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import nn

from . import attention_weights, processors
from .adapters import AdapterConfig
from .attention import engines_in_use, unfuse_qkv
from .checks import describe
from .conversion import adapt, check_restorable, restore
from .merging import merge, unmerge
from .placements import follow_input, unfollow_inputs
from .planning import Plan, adapter_device, plan_injection
from .projection import AdaptedProjectionMixin
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
from .timesteps import follow, unfollow
from .tree import (
    RECORD,
    adapted,
    check_known,
    check_one_batch,
    check_unmerged,
    denoiser,
    parameter_count,
    plain_name,
    projections,
    records,
)

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


def inject(
    model: Any,
    config: AdapterConfig | None = None,
    name: str = "default",
    *,
    backend: str = "auto",
    train: str | None = None,
) -> InjectionReport:
    """Puts an adapter on every attention layer, freezes the rest and swaps the processors.

    Args:
        model: a diffusers model, or a pipeline, whose denoiser is taken. It computes what it
            computed before until the adapter has trained.
        config: the adapter; None: AdapterConfig().
        name: of the adapter. A further one joins those the model has, in parallel, with weight 1.
        backend: auto, reference, triton or native, for these layers' ops.
        train: "adapter" or "adapter+attention", in place of the config's. With the latter the
            linear layers of attention train beside their adapters (q, k, v, out and, where text
            has its own, those): in the dtype that they have, so float32 is advised. They are part
            of this adapter: saved and loaded with it, and where it does not act (`disabled`,
            `set_adapters` without it) the model has the stock weights. Their stock values are
            kept on the CPU, as many bytes as they have; every switch copies these to the device,
            and a graph made on one side of it has its backward there (see `disabled`).
            Mixing weights of `set_adapters` are the adapter's alone. A layer that reads more than
            attention (Flux' single blocks) stays frozen.

    The first injection sets requires_grad=False on everything but adapters and PEFT's own
    parameters; `eject` restores it. Processors that are not known stay; the adapter acts there
    too, because it is part of the projection.

    Raises:
        TypeError, ValueError: bad arguments, an adapter of that name, no attention, a target or
            pattern that matches nothing, merged adapters, attention to train that is tied to
            other layers, fused, on disk or not plain. The model is unchanged then.
        BackendUnavailableError: the named backend cannot run here.
    """
    root = denoiser(model)
    plan = plan_injection(root, _training(config, train), name, backend)
    _apply(root, plan)
    for attention, processor in plan.processors.items():
        root.get_submodule(attention).set_processor(processor)  # type: ignore[operator]
    return _report(root, plan)


def _training(config: AdapterConfig | None, train: str | None) -> AdapterConfig | None:
    if train is None or not isinstance(config, AdapterConfig | None):
        return config
    return dataclasses.replace(config or AdapterConfig(), train=train)


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

    Raises ValueError for a name the model does not have, for merged adapters, and where attention
    that trained cannot be put back (on disk, sharded, parametrized). Nothing is changed then.
    """
    root = denoiser(model)
    layers = adapted(root)
    if name is not None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a string or None, got {describe(name)}")
        check_known("name", [name], layers.values())
    check_unmerged(layers, "eject")
    check_one_batch(layers, "eject")
    attention_weights.check_switchable(root, "eject", name)
    for layer in layers.values():
        check_restorable(layer)
    if name is None or all(list(layer.adapters) == [name] for layer in layers.values()):
        unfuse_qkv(root)
    attention_weights.end(root, name)
    for layer in layers.values():
        for gone in list(layer.adapters) if name is None else [name]:
            if gone in layer.adapters:
                del layer.adapters[gone]
        layer.choose({n: w for n, w in layer.weights.items() if n in layer.adapters})
        if len(layer.adapters) == 0:
            restore(layer)
    unfollow_inputs(root)
    if not projections(root):
        _restore_model(root)


def _apply(root: nn.Module, plan: Plan) -> None:
    # a parameter made in inference mode could not be trained
    with torch.inference_mode(False):
        fresh = {name: plan.adapter(name) for name in plan.targets}
    if RECORD not in root.__dict__:
        root.__dict__[RECORD] = {"trained": _freeze(root), "processors": {}}
    record = root.__dict__[RECORD]
    for attention in plan.processors:
        current = processors.processor_of(root.get_submodule(attention))
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
        layer.choose({**layer.weights, plan.name: 1.0})
        layer.backend = plan.backend
        if name in plan.inputs:
            attention_layer, given = plan.inputs[name]
            follow_input(attention_layer, layer, given.argument)
        layer.enabled = enabled
    if plan.attention:
        attention_weights.begin(record, plan.name, plan.attention)
        attention_weights.sync(root)
    if plan.config.timed:
        follow(root, plan.family.timesteps)


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
            if family.owns(processors.processor_of(module)):
                module.set_processor(stock)  # type: ignore[operator]
        unfollow(holder)
        del holder.__dict__[RECORD]


def _doubts(root: nn.Module, plan: Plan) -> list[str]:
    """What the report says of a model that no row of FAMILIES is about."""
    if not plan.family.by_structure:
        return []
    said = f"a {type(root).__name__} is outside the table of families: its layers were found by "
    said += "names and shapes"
    if plan.config.timed:
        said += ", and its timestep is taken to run from 0, clean, to 1000, noise"
    if plan.unadapted:
        said += f", and left in doubt: {', '.join(sorted(plan.unadapted))}. To adapt such a layer, "
        said += "name it in full in AdapterConfig.targets, in a list"
    return [said]


def _report(root: nn.Module, plan: Plan) -> InjectionReport:
    layers = projections(root)
    found = {name: describe_layer(layers[name], plan.name) for name in plan.targets}
    notes = _doubts(root, plan)
    meta = [name for name in found if layers[name].weight.device.type == "meta"]
    if meta:
        notes.append(
            f"{len(meta)} weights are on the meta device: their adapters are on "
            f"{adapter_device(layers[meta[0]])}"
        )
    if plan.attention:
        count_trained = sum(p.numel() for p in plan.attention.values())
        kept = sum(p.nbytes for p in plan.attention.values()) / 2**20
        notes.append(
            f"{count_trained:,} parameters of attention train too; their stock values are kept on "
            f"the CPU ({kept:.1f} MiB)"
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
        parameters_total=parameter_count(root) - adapters,
        attention=engines_in_use(root),
        notes=tuple(notes),
    )
