"""InjectionReport: what `inject` found and did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .backends import resolve
from .ops.validate import FLOATS
from .projection import AdaptedProjectionMixin


@dataclass(frozen=True)
class LayerReport:
    """One adapted projection."""

    channels: int
    rank: int
    backend: str  # reference, triton or native; "auto" where the weight is not at hand
    fused: bool  # adapter and projection in one op
    why_not_fused: str  # "" where fused
    parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` found and did.

    layers: the adapted projections by name. families: the family, and how many layers of it.
    processors: attention layer -> our processor's class. left_processors: attention layers whose
    processor is not known and stays; the adapter acts there too. unadapted: attention layers
    without an adapter, with the reason. attention: the engine of every adapted attention layer, or
    the processor that stays; `set_attention` chooses it. parameters_added: of this adapter;
    parameters_total: of the model without adapters.
    """

    name: str
    layers: dict[str, LayerReport]
    families: dict[str, int]
    processors: dict[str, str]
    left_processors: dict[str, str]
    unadapted: dict[str, str]
    parameters_added: int
    parameters_total: int
    attention: dict[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.parameters_added / max(self.parameters_total, 1)
        families = ", ".join(f"{name} ({count} layers)" for name, count in self.families.items())
        lines = [
            f"adapter {self.name!r}: {len(self.layers)} projections of {families}",
            f"  parameters: {self.parameters_added:,} added to {self.parameters_total:,} "
            f"({share:.2f} %)",
        ]
        shapes = Counter((r.channels, r.rank, r.backend) for r in self.layers.values())
        for (channels, rank, backend), count in sorted(shapes.items()):
            lines.append(f"  {count} x C={channels} R={rank}, backend {backend}")
        for reason, count in _reasons(r.why_not_fused for r in self.layers.values()):
            lines.append(f"  {count} x adapter apart from the projection: {reason}")
        for kind, count in _reasons(self.processors.values()):
            lines.append(f"  {count} x processor {kind}")
        for engine, count in _reasons(self.attention.values()):
            lines.append(f"  {count} x attention by {engine}")
        for kind, count in _reasons(self.left_processors.values()):
            lines.append(f"  {count} x processor {kind} left as it is")
        for reason, count in _reasons(self.unadapted.values()):
            lines.append(f"  {count} x attention without an adapter: {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def describe_layer(layer: AdaptedProjectionMixin, name: str) -> LayerReport:
    adapter: Any = layer.adapters[name]
    reason = layer.unfused_reason() or ""
    backend, weight = layer.backend, layer.weight
    if weight.device.type != "meta":
        dtype = weight.dtype if weight.dtype in FLOATS else adapter.w_down.dtype
        backend = resolve(backend, weight.device, dtype)
    parameters = sum(p.numel() for p in adapter.parameters())
    return LayerReport(layer.in_features, adapter.rank, backend, not reason, reason, parameters)


def _reasons(values: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(v for v in values if v).items())
