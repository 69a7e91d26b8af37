"""Small models of every family that PEFT's tests use, adapted by `inject` and by PEFT alike."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.peft import A3FTAConfig, A3FTALinear

from .. import models

BACKEND = {"backend": "reference"}
FAMILIES = ("sd15", "sdxl", "flux", "sd3")


def stock(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "sd3":
        return models.sd3().to(dtype).eval()
    return models.build(name, dtype=dtype)


def run(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if name != "sd3":
        return models.run(model, name, dtype=dtype)
    inputs = models.sd3_inputs()
    floats = {k: v.to(dtype) for k, v in inputs.items() if v.is_floating_point()}
    return model(**inputs | floats).sample


def output(model: nn.Module, name: str = "sd15") -> Tensor:
    with torch.no_grad():
        return run(model, name)


def injected(
    name: str = "sd15", adapters: dict[str, int] | None = None, dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:  # fmt: skip
    """A model with adapters by `inject`: name -> the seed of its weights."""
    model = stock(name, dtype)
    for adapter, seed in (adapters or {"a": 2}).items():
        config = a3fta.AdapterConfig(**{"rank": 4, **options})
        a3fta.inject(model, config, adapter, backend="reference")
        models.randomize(model, adapter, seed=seed)
    return model


def added(model: Any, source: Any, adapter: str = "a") -> Any:
    """`model` with that adapter of `source` by PEFT."""
    layer = next(iter(a3fta.projections(source).values())).adapters[adapter]
    free = None
    if layer.config.targets is not None:
        free = copy.deepcopy(source)
        a3fta.eject(free)
    config = A3FTAConfig.from_adapter_config(layer.config, free, **BACKEND)
    model.add_adapter(config, adapter_name=adapter)
    fill(model, source, adapter)
    return model


def tensors(source: Any, adapter: str = "a") -> dict[str, Tensor]:
    """The adapter's tensors as PEFT names them in its files."""
    return {
        f"{layer}.a3fta_adapters.{parameter}": tensor.detach().clone()
        for layer, projection in a3fta.projections(source).items()
        for parameter, tensor in projection.adapters[adapter].state_dict().items()
    }


def fill(model: Any, source: Any, adapter: str = "a") -> None:
    result = peft.set_peft_model_state_dict(model, tensors(source, adapter), adapter)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if f"a3fta_adapters.{adapter}." in key]


def layers(model: nn.Module) -> dict[str, A3FTALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, A3FTALinear)}


def by_peft(name: str = "sd15", adapters: dict[str, int] | None = None, **options: Any) -> Any:
    """The model that `injected` gives, by PEFT: all adapters act."""
    adapters = adapters or {"a": 2}
    source = injected(name, adapters, **options)
    model = stock(name, options.get("dtype", torch.float32))
    for adapter in adapters:
        added(model, source, adapter)
    model.set_adapter(list(adapters))
    return model


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}
