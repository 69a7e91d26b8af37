"""The code of a page of documentation, run as a reader would: block after block, in one session."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str = "python") -> list[tuple[int, str]]:
    """The page's blocks of that language: (line of the page that is their first, code)."""
    text = (ROOT / page).read_text(encoding="utf-8")
    # of every language, or the end of one block would begin another
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in found
        if match[1] == language
    ]


def steps(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]
) -> Iterator[str]:
    """Runs the page's python blocks in order, in `folder`, in the namespace `names`: each `next`
    runs one and gives its code. Tracebacks name the page and its line."""
    code = blocks(page)
    assert code, f"{page} has no python blocks"
    for line, block in code:
        monkeypatch.chdir(folder)
        exec(compile("\n" * (line - 1) + block, str(ROOT / page), "exec"), names)
        yield block


def run(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]
) -> dict[str, Any]:
    """All steps at once; gives `names`."""
    for _ in steps(page, folder, monkeypatch, names):
        pass
    return names
