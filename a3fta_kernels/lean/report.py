"""LeanReport: what `lean` changed, and what it left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .swapping import Settings


@dataclass(frozen=True)
class LeanReport:
    """What `lean` did.

    settings: those of the lean modules by name. kinds: their stock classes. left: modules of a
    kind that lean knows that stay as they are, with the reason.
    """

    level: str
    settings: dict[str, Settings]
    kinds: dict[str, str]
    left: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def levels(self) -> dict[str, str]:
        """The level of every lean module by name."""
        return {name: settings.level for name, settings in self.settings.items()}

    def __str__(self) -> str:
        lines = [f"lean {self.level!r}: {len(self.settings)} modules"]
        by_kind = Counter((self.kinds[name], str(s)) for name, s in self.settings.items())
        for (kind, settings), count in sorted(by_kind.items()):
            lines.append(f"  {count} x {kind}, {settings}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in sorted(reasons.items()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  left alone: {names[0]}{more}: {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
