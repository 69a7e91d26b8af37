"""Words of REPORT.md that all its sections use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MIB = 2**20


def source(about: dict[str, Any], rows: Iterable[dict[str, Any]] = ()) -> str:
    """What stands below a title: where, with what, and of which commits this was measured."""
    gpu = "capability" in about
    device = about["device"] if gpu else f"CPU: {about['device']}, {about['threads']} threads"
    keys = ("driver", "cuda") if gpu else ()
    keys += ("torch", "triton") if gpu else ("torch",)
    keys += ("diffusers", "peft")
    versions = [f"{k} {about[k]}" for k in keys if about.get(k)]
    commits = sorted({row.get("commit", about["commit"]) for row in rows} or {about["commit"]})
    told = f"commit{'s' * (len(commits) > 1)} {' and '.join(commits)}"
    found = [device, *versions, told, about["date"]]
    # a CPU is shared with whatever else ran there
    if not gpu and about.get("load", 0) > 0.5:
        found.append(f"other work beside (load {about['load']})")
    return ", ".join(found)


def place(about: dict[str, Any]) -> str:
    """The device by name, or that it is a CPU."""
    return about["device"] if "capability" in about else "CPU"


def mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:,.0f}"


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).replace("--", "-")
