"""A3FTAModel: where PEFT finds the layers, and puts A3FTALinear around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..backends import resolve
from ..forwards import inside
from ..placements import Input, follow_input, unfollow_inputs
from ..planning import new_adapter, read_beside
from ..processors import Family, Site, family_of
from ..projection import AdaptedProjectionMixin
from ..timesteps import check_timed, follow, unfollow
from ..tree import plain_name
from ..whereabouts import check_whole
from .config import A3FTAConfig
from .layer import A3FTALinear


class A3FTAModel(BaseTuner):
    """The tuner that PEFT makes for an `A3FTAConfig`."""

    prefix = "a3fta_"
    tuner_layer_cls = A3FTALinear

    family: Family
    sites: dict[str, Site]  # of the layers that consume attention, by their names without PEFT

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        self.family = family_of(model)
        self.sites = attention_sites(self.family, model)
        try:
            config: Any = self.peft_config[adapter_name]
            if config.target_modules is None:
                # a copy: the user may give the same config to another model
                targets = _targets(model, self.sites)
                self.peft_config[adapter_name] = dataclasses.replace(config, target_modules=targets)
            timed = config.to_adapter_config().timed
            if timed:
                check_timed(model)
            super().inject_adapter(model, adapter_name, *args, **options)
            if timed:
                follow(model, self.family.timesteps)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Checks every layer that will be adapted, while nothing is changed yet."""
        tuners = [f"{k}." for k, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        for key, module in model.named_modules():
            inner = key.startswith(tuple(tuners))
            if key and not inner and self._check_target_module_exists(peft_config, key):
                _check(key, inside(module), peft_config)
                if peft_config.placement == "parallel":
                    self._input(plain_name(key))

    def _input(self, name: str) -> tuple[nn.Module, Input]:
        """The attention layer of a layer that consumes it, and what a parallel adapter reads."""
        site = self.sites.get(name)
        if site is None:
            raise ValueError(
                f"placement: expected a layer that consumes attention, for a parallel adapter, got "
                f"{name}; choose 'pre' or 'post', or other target_modules"
            )
        return site.attention, read_beside(self.family, site, name)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str,
        parent: nn.Module, current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        # inside the layers of other methods, so that a LoRA reads h, whatever came first
        while isinstance(target, BaseTunerLayer) and not isinstance(target, A3FTALinear):
            around: Any = target
            parent, target_name, target = around, "base_layer", around.base_layer
        key = plain_name(current_key)
        known = isinstance(target, A3FTALinear)
        site = self.sites.get(key)
        layer = target if known else A3FTALinear(target, None if site is None else site.columns)
        layer.backend = peft_config.backend
        own, linear = peft_config.to_adapter_config(), inside(target)
        reads = None
        if own.placement == "parallel":
            attention, given = self._input(key)
            follow_input(attention, layer, given.argument)
            reads = given.channels
        adapter = new_adapter(own, linear, layer.columns, own.rank_for(key), reads)
        layer.update_layer(adapter_name, adapter, peft_config.inference_mode)
        if not known:
            setattr(parent, target_name, layer)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_all_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        if merge:
            self._check_all_merge(adapter_names, safe_merge)
        found = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unfollow(self.model)
        unfollow_inputs(self.model)
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        unfollow(self.model)
        unfollow_inputs(self.model)

    def _check_all_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raises for the layer that would, before the first one is merged."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, A3FTALinear):
                layer.mergeable(plain_name(name), safe_merge, adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # without the levels of other methods: the file fits the model without their layers
        return plain_name(super()._remove_adapter_name_from_key(key, adapter_name))


def attention_sites(family: Family, model: nn.Module) -> dict[str, Site]:
    """Where each layer that consumes attention belongs, by its name without PEFT; empty where none
    is found."""
    return {plain_name(full): site for site in family.sites(model) for full in site.projections}


def _targets(model: nn.Module, sites: Mapping[str, Site]) -> list[str]:
    if not sites:
        raise ValueError(
            f"target_modules: expected names of linear layers, as none of a {type(model).__name__} "
            f"is known to read attention, got None"
        )
    return list(sites)


def _check(name: str, linear: nn.Module, config: A3FTAConfig) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(
            f"target_modules: expected linear layers, got {name}, a {type(linear).__name__}"
        )
    if isinstance(linear, AdaptedProjectionMixin) and linear.merged is not None:
        raise ValueError(
            f"model: expected unmerged adapters to add another, got {name} with a merged one; "
            f"call a3fta_kernels.unmerge first"
        )
    weight: Tensor = linear.weight
    check_whole(name, weight)
    if weight.device.type != "meta" and weight.dtype.is_floating_point and weight.itemsize > 1:
        resolve(config.backend, weight.device, weight.dtype)
