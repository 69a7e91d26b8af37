"""A3FTALinear: the layer that PEFT puts around a linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapters import BottleneckAdapter
from ..forwards import has_hooks
from ..merging import check_linear, copied, folded, put
from ..projection import AdaptedProjectionMixin, Columns, Merged, span
from ..stack import Weighted
from ..whereabouts import unreadable_weight


class _Around(nn.Module):
    """The layer without adapters: what `AdaptedProjectionMixin` computes with where it must."""

    base_layer: nn.Linear

    def forward(self, h: Tensor) -> Tensor:
        return self.base_layer(h)


class A3FTALinear(AdaptedProjectionMixin, _Around, BaseTunerLayer):
    """A linear layer with adapters, as `AdaptedProjection` computes it; PEFT has them.

    Around a plain `nn.Linear` layer and adapter are one fused op. Around another one (quantized,
    with hooks), the adapter is an op, and then the layer is called. Around a layer that `inject`
    adapted, all adapters act in parallel.
    """

    foreign = True
    banks = None
    source: Tensor | None = None
    adapter_layer_names = ("a3fta_adapters",)
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Linear, columns: Columns = None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.columns = columns
        self.backend = "auto"
        self.frozen = None
        self.a3fta_adapters = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._merged: tuple[Merged, Merged] | None = None  # what was there, and what was written
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.train(base_layer.training)

    # the state that AdaptedProjectionMixin reads, as PEFT keeps it

    @property
    def adapters(self) -> nn.ModuleDict:  # type: ignore[override]
        return self.a3fta_adapters

    @property
    def weights(self) -> dict[str, float]:
        return {n: self.scaling[n] for n in self.active_adapters if n in self.a3fta_adapters}

    @property
    def enabled(self) -> bool:  # type: ignore[override]
        return not self._disable_adapters

    @property
    def merged(self) -> Merged | None:  # type: ignore[override]
        return None if self._merged is None else self._merged[0]

    def choose(self, weights: Mapping[str, float]) -> None:
        """PEFT does."""

    def active(self) -> list[Weighted]:
        if not self.enabled or self.merged is not None:
            return []
        return [(self.a3fta_adapters[n], weight) for n, weight in self.weights.items()]  # type: ignore[misc]

    def forward(
        self, h: Tensor, residual: Tensor | None = None, beside: Sequence[Weighted] = (),
        acted: bool = False,
    ) -> Tensor:  # fmt: skip
        if isinstance(self.base_layer, AdaptedProjectionMixin):
            if self.source is not None:
                self.base_layer.source, self.source = self.source, None
            return self.base_layer(h, residual, [*self.active(), *beside], acted)
        return super().forward(h, residual, beside, acted)

    def unreadable_reason(self) -> str | None:
        base = self.base_layer
        if type(base) is not nn.Linear:
            return f"the layer is of class {type(base).__name__}, not a plain Linear"
        if has_hooks(base):
            return "the layer carries hooks, which want its input"
        return unreadable_weight(base.weight)

    # the weight, and its keys in a state dict, are the base layer's
    _load_from_state_dict = nn.Module._load_from_state_dict  # type: ignore[assignment]

    # what PEFT and diffusers ask of a layer

    def update_layer(
        self, adapter_name: str, adapter: BottleneckAdapter, inference_mode: bool = False
    ) -> None:
        """Adds an adapter. It acts where its name is among the active ones."""
        adapter.train(self.training)
        self.a3fta_adapters[adapter_name] = adapter
        self.r[adapter_name] = adapter.rank
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """The adapter's mixing weight, beside its own scale."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        for name in self.weights:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; None: every active adapter acts with weight 1 again."""
        for name in self.weights:
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged_adapters:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters into the layer's weight, where the algebra allows it.

        Raises ValueError where it does not (an activation, dropout in training, a weight that is
        not plain), and with safe_merge where a number would not be finite. Nothing is changed then.
        """
        new = self.mergeable("the layer", safe_merge, adapter_names)
        if new is None:
            return
        names, written = new
        self._put(written)
        self.merged_adapters = names

    def mergeable(
        self, layer: str, finite: bool, adapter_names: list[str] | None
    ) -> tuple[list[str], Merged] | None:
        """The names of all adapters after a merge, and the weights; None for nothing to do."""
        added = check_adapters_to_merge(self, adapter_names)
        added = [name for name in added if name in self.a3fta_adapters]
        if not added:
            return None
        names = [*self.merged_adapters, *added]
        active: Any = [(self.a3fta_adapters[name], self.scaling[name]) for name in names]
        for name, (adapter, _) in zip(names, active, strict=True):
            check_linear(layer, name, adapter)
        reason = self.unreadable_reason()
        if reason is not None:
            raise ValueError(f"model: expected plain weights to merge into, got {layer}: {reason}")
        stock = self.merged or Merged(self.base_layer.weight, self.base_layer.bias)
        with torch.no_grad():
            new = folded(stock, span(self.base_layer, self.columns), active)
        if finite and not all(t.isfinite().all() for t in new if t is not None):
            raise ValueError(
                f"model: expected finite numbers after merging {', '.join(names)}, "
                f"got some that are not at {layer}"
            )
        return names, new

    def unmerge(self) -> None:
        """Puts the weights back: bit for bit, and what others (a LoRA) added since stays."""
        if self._merged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._put(self._merged[0])
        self._merged = None
        self.merged_adapters = []

    def _put(self, new: Merged) -> None:
        """Writes weights in the place of those that were written last, or of the stock ones."""
        now = copied(self.base_layer)
        kept, written = self._merged or (now, now)
        with torch.no_grad():
            put(self.base_layer, Merged(*map(_with_others, new, written, now)))  # type: ignore[arg-type]
        self._merged = kept, new

    def __repr__(self) -> str:
        return f"a3fta.{super().__repr__()}"


def _with_others(new: Tensor | None, written: Tensor | None, now: Tensor | None) -> Tensor | None:
    """`new`, bit for bit, but for what others made of `written` since."""
    if new is None or written is None or now is None:
        return new
    same = torch.isclose(now, written, rtol=0, atol=0, equal_nan=True)
    return torch.where(same, new, new + (now - written))
