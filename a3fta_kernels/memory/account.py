"""Ledger: the bytes that a forward keeps for its backward, entry by entry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Entry:
    """One storage that is saved, named by the operator that saved it first.

    module: path of the module whose forward ran, "(model)" for the model itself. operator: what
    saved it. tensor: its role there. shape, dtype: of the saved tensor, which may be a part of
    the storage; bytes: of the whole storage. also: "module: operator.tensor" of what else keeps it.
    """

    module: str
    operator: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """Bytes saved for backward. entries: in the order of the forward, each storage once.

    Not part of `total`: parameters, the bytes of all weights and buffers, and trainable, of those
    that train; released: what autograd saved and let go of again before the forward ended, such as
    the inputs of a checkpoint in which nothing trains. notes: what was counted other than the
    model is set up.
    """

    entries: tuple[Entry, ...]
    parameters: int = 0
    trainable: int = 0
    released: int = 0
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def total(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Bytes by the first `depth` parts of the module's path (None: all), largest first."""
        if depth is not None and (type(depth) is not int or depth < 1):
            raise ValueError(
                f"depth: expected a whole number of at least 1, or None, got {depth!r}"
            )
        return self._sums(lambda e: ".".join(e.module.split(".")[:depth]))

    def by_operator(self) -> dict[str, int]:
        """Bytes by the operator that saved, largest first."""
        return self._sums(lambda e: e.operator)

    def by_tensor(self) -> dict[str, int]:
        """Bytes by operator and role, as `group_norm.input`, largest first."""
        return self._sums(lambda e: f"{e.operator}.{e.tensor}")

    def _sums(self, key: Callable[[Entry], str]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for entry in self.entries:
            sums[key(entry)] = sums.get(key(entry), 0) + entry.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def table(self, rows: int = 20) -> list[tuple[str, str, str, int, int]]:
        """The largest sums as (module, operator, tensor, count, bytes), module without numbers.

        Layers that differ in a number alone share a row, `blocks.*.norm1`; count is of storages.
        """
        found: dict[tuple[str, str, str], list[int]] = {}
        for e in self.entries:
            parts = ("*" if part.isdigit() else part for part in e.module.split("."))
            found.setdefault((".".join(parts), e.operator, e.tensor), []).append(e.bytes)
        ranked = sorted(found.items(), key=lambda item: -sum(item[1]))
        return [(*key, len(sizes), sum(sizes)) for key, sizes in ranked[:rows]]

    def to_json(self, indent: int | None = None) -> str:
        """Everything, with the sums by operator and by module."""
        return json.dumps(
            {
                "total": self.total,
                "parameters": self.parameters,
                "trainable": self.trainable,
                "released": self.released,
                "notes": self.notes,
                "by_operator": self.by_operator(),
                "by_module": self.by_module(2),
                "entries": [asdict(entry) for entry in self.entries],
            },
            indent=indent,
        )

    def __str__(self) -> str:
        lines = [
            f"{mib(self.total)} saved for backward in {len(self.entries)} tensors, beside "
            f"{mib(self.parameters)} of weights ({mib(self.trainable)} train)"
        ]
        for title, sums in (("operator", self.by_operator()), ("module", self.by_module(2))):
            lines.append(f"  by {title}:")
            lines += _lines(sums.items(), self.total)
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _lines(sums: Iterable[tuple[str, int]], total: int, rows: int = 8) -> list[str]:
    ranked = list(sums)
    shown = ranked[:rows]
    rest = sum(size for _, size in ranked[rows:])
    if rest:
        shown.append((f"{len(ranked) - rows} others", rest))
    return [f"    {mib(n):>12} {100 * n / max(total, 1):5.1f} %  {name}" for name, n in shown]


def mib(n: float) -> str:
    """Bytes to read: "1,234 MiB"; one digit behind the point below 10; below 0.1 MiB in KiB."""
    value = n / 2**20
    if 0 < value < 0.1:
        return f"{n / 2**10:,.1f} KiB"
    return f"{value:,.0f} MiB" if value >= 10 or value == 0 else f"{value:,.1f} MiB"


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "12 GB", "12000MB", "1.5TiB" or a plain number of bytes.

    Raises ValueError for anything else, and for nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** _UNITS[(match[2] or "").upper()])
    if size < 1:
        raise ValueError(f"expected a size such as 12GiB, 12GB or 12000MB, got {text!r}")
    return size
