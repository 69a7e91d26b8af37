"""LeanReport: what `lean` changed, and what it left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LeanReport:
    """What `lean` did.

    levels: the lean modules by name, with their level. kinds: their stock classes. left: modules
    of a kind that lean knows, or blocks it does not, that stay as they are, with the reason.
    """

    level: str
    norms: str
    levels: dict[str, str]
    kinds: dict[str, str]
    left: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        narrow = ", inputs of norms in 8 bits" if self.norms == "int8" else ""
        lines = [f"lean {self.level!r}{narrow}: {len(self.levels)} modules"]
        by_kind = Counter((self.kinds[name], level) for name, level in self.levels.items())
        for (kind, level), count in sorted(by_kind.items()):
            lines.append(f"  {count} x {kind}, {level}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in sorted(reasons.items()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  left alone: {names[0]}{more}: {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
