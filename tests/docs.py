"""The code of a page of documentation, run as a reader would: block after block, in one session."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str = "python") -> list[tuple[int, str]]:
    """The page's blocks of that language: (line of the page that is their first, code)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def run(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]
) -> dict[str, Any]:
    """Runs every python block of the page in order, in `folder`, in the namespace `names`, which
    is returned. Tracebacks name the page and its line."""
    monkeypatch.chdir(folder)
    code = blocks(page)
    assert code, f"{page} has no python blocks"
    for line, block in code:
        exec(compile("\n" * (line - 1) + block, str(ROOT / page), "exec"), names)
    return names
