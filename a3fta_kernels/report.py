"""InjectionReport: what `inject` found and did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .backends import resolve
from .ops.adapter_linear import choice, contract
from .ops.validate import FLOATS
from .projection import AdaptedProjectionMixin, Columns, span


@dataclass(frozen=True)
class LayerReport:
    """One adapted projection."""

    channels: int
    rank: int
    backend: str  # reference, triton or native; "auto" where the weight is not at hand
    fused: bool  # adapter and projection in one op
    why_not_fused: str  # "" where fused
    parameters: int
    outputs: int = 0  # of the projection
    # the ways of adapter_linear, by the number of rows; empty where another way computes it
    paths: tuple[choice.Span, ...] = ()
    columns: Columns = None  # (start, length) of its input, where the adapter has not all of it


@dataclass(frozen=True)
class InjectionReport:
    """What `inject` found and did.

    layers: the adapted projections by name. families: the family, and how many layers of it.
    processors: attention layer -> our processor's class. left_processors: attention layers whose
    processor is not known and stays; the adapter acts there too. unadapted: attention layers
    without an adapter (of a model outside the table also layers that may consume attention), with
    the reason. attention: the engine of every adapted attention layer, or
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
        shapes = Counter(
            (r.channels, r.outputs, r.columns or (), r.rank, r.backend, r.paths)
            for r in self.layers.values()
        )
        for (width, outputs, columns, rank, backend, paths), count in sorted(shapes.items()):
            said = f"C={width}" if outputs == width else f"C={width} N={outputs}"
            if columns:
                said += f" (input columns {columns[0]} to {sum(columns) - 1})"
            lines.append(f"  {count} x {said} R={rank}, backend {backend}{_by_rows(paths)}")
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
    paths: tuple[choice.Span, ...] = ()
    if weight.device.type != "meta":
        dtype = weight.dtype if weight.dtype in FLOATS else adapter.w_down.dtype
        backend = resolve(backend, weight.device, dtype)
        if backend != "reference" and not reason:
            paths = contract.paths_by_rows(backend, weight, adapter.rank)
    parameters = sum(p.numel() for p in adapter.parameters())
    return LayerReport(
        span(layer, layer.columns)[1], adapter.rank, backend, not reason, reason, parameters,
        layer.out_features, paths, layer.columns,
    )  # fmt: skip


def _by_rows(paths: tuple[choice.Span, ...]) -> str:
    """How the path is chosen: ", path fused (by rule), from 2,048 rows concat (measured)"."""
    words = {choice.MEASURED: " (measured)", choice.RULE: " (by rule)", choice.ONLY: ""}
    said = [
        f"{f'from {rows:,} rows ' if rows > 1 else 'path '}{chosen.path}{words[chosen.source]}"
        for rows, chosen in paths
    ]
    return "".join(f", {text}" for text in said)


def _reasons(values: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(v for v in values if v).items())
