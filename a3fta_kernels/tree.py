"""Finding one's way in a model: the denoiser of a pipeline, its adapted layers, its record."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

from .adapters import DESIGNS
from .checks import describe
from .projection import AdaptedProjectionMixin

_ENGINES = ("DeepSpeedEngine",)  # wrappers by name, of libraries that are not imported here

# what `inject` notes on the model it was given: plain names and stock objects, so that a deep
# copy of the model has a record of its own
RECORD = "_a3fta"

# what some uses ask of an adapter: the words, and its settings
_KINDS: dict[str, tuple[str, dict[str, Collection[Any]]]] = {
    "linear": ("linear adapters to {} (activation='identity')", {"activation": ["identity"]}),
    "in front": ("adapters in front of the projection to {}", {"placement": ["pre"]}),
    "not beside": (
        "adapters in front of the projection, or behind it, to {}", {"placement": ["pre", "post"]}
    ),
    "timeless": (
        "adapters that are the same at all timesteps to {}",
        {
            "design": [name for name, design in DESIGNS.items() if not design.timed],
            "time_window": [None], "time_rank": [None],
        },
    ),
    "of h itself": ("adapters that read h as it is to {}", {"layer_norm": [False]}),
    "whole": (
        "adapters without dropout to {}, or model.eval()", {"dropout": [0], "drop_path": [0]}
    ),
}  # fmt: skip


def denoiser(model: Any) -> nn.Module:
    """The module that is adapted: of a pipeline its U-Net or transformer, of a wrapper (DDP,
    DeepSpeed, torch.compile, PEFT) the model inside.
    """
    if not isinstance(model, nn.Module):
        for name in ("unet", "transformer"):
            part = getattr(model, name, None)
            if isinstance(part, nn.Module):
                return denoiser(part)
        raise TypeError(
            f"model: expected a diffusers model, or a pipeline with a unet or a transformer, "
            f"got {describe(model) if not hasattr(model, 'components') else type(model).__name__}"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return denoiser(model._orig_mod)
    engine = any(cls.__name__ in _ENGINES for cls in type(model).__mro__)
    if engine or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return denoiser(model.module)
    get_base_model: Any = getattr(model, "get_base_model", None)
    if get_base_model is not None and hasattr(model, "peft_config"):
        return denoiser(get_base_model())
    return model


def projections(model: Any) -> dict[str, AdaptedProjectionMixin]:
    """The adapted layers by name. A layer that PEFT wraps keeps the name it has without PEFT.

    Layers whose adapters PEFT has (`a3fta_kernels.peft`) are not among them.
    """
    return {
        plain_name(name): module
        for name, module in denoiser(model).named_modules()
        if isinstance(module, AdaptedProjectionMixin) and not module.foreign
    }


def holding(model: Any, name: str) -> dict[str, AdaptedProjectionMixin]:
    """The layers that have an adapter of that name; where there is none, those of PEFT's."""
    layers = {k: layer for k, layer in projections(model).items() if name in layer.adapters}
    return layers or {
        plain_name(key): module
        for key, module in denoiser(model).named_modules()
        if isinstance(module, AdaptedProjectionMixin) and module.foreign and name in module.adapters
    }


def plain_name(name: str) -> str:
    """The name of a module or parameter without the levels that PEFT puts in."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def adapted(model: Any) -> dict[str, AdaptedProjectionMixin]:
    """`projections`, or ValueError where there are none."""
    found = projections(model)
    if not found:
        raise ValueError(
            f"model: expected a model with adapters, got a {type(denoiser(model)).__name__} "
            f"without; call inject first"
        )
    return found


def adapter_names(layers: Iterable[AdaptedProjectionMixin]) -> list[str]:
    """The names of the adapters on these layers, in the order of injection."""
    names: dict[str, None] = {}
    for layer in layers:
        names.update(dict.fromkeys(layer.adapters))
    return list(names)


def check_known(
    argument: str, names: Iterable[str], layers: Iterable[AdaptedProjectionMixin]
) -> None:
    known = adapter_names(layers)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{argument}: expected adapters that the model has ({', '.join(known)}), "
                f"got {name!r}"
            )


def check_unmerged(layers: dict[str, AdaptedProjectionMixin], action: str) -> None:
    merged = [name for name, layer in layers.items() if layer.merged is not None]
    if merged:
        raise ValueError(
            f"model: expected unmerged adapters to {action}, got {len(merged)} merged layers "
            f"({merged[0]}, ...); call unmerge first"
        )


def check_one_batch(layers: dict[str, AdaptedProjectionMixin], action: str) -> None:
    if any(layer.banks is not None for layer in layers.values()):
        raise ValueError(
            f"model: expected no block of adapters_per_sample around a call to {action}; leave it "
            f"first"
        )


def check_kinds(
    argument: str, action: str, layer: str, name: str, adapter: Any, *kinds: str
) -> None:
    """Raises ValueError where the adapter of that name on this layer is not all of these kinds."""
    for kind in kinds:
        words, allowed = _KINDS[kind]
        values = {f: vars(adapter).get(f, getattr(adapter.config, f)) for f in allowed}
        given = [f"{f}={value!r}" for f, value in values.items() if value not in allowed[f]]
        if given and (adapter.training or kind != "whole"):
            raise ValueError(
                f"{argument}: expected {words.format(action)}, got adapter {name!r} with "
                f"{', '.join(given)} at {layer}"
            )


def records(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """What earlier injections noted, on the model or on parts of it that were injected alone."""
    for module in model.modules():
        record = module.__dict__.get(RECORD)
        if record is not None:
            yield module, record


def parameter_count(root: nn.Module) -> int:
    """The model's parameters; of layers whose weight is packed (quantized), those it stands for."""
    packed = {
        id(m.weight): m.out_features * m.in_features - m.weight.numel()
        for m in root.modules()
        if isinstance(m, nn.Linear)
    }
    return sum(p.numel() + packed.get(id(p), 0) for p in root.parameters())
