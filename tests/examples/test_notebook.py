"""The notebook runs from its first cell to the last, on fewer steps, and was saved clean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "first_ten_minutes.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]


def test_it_is_saved_without_results():
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_links_lead_somewhere():
    text = "".join("".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    for link in links:
        assert (PATH.parent / link).exists(), link


def test_every_cell_runs(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "notebook"}
    for number, code in enumerate(CODE):
        few = code.replace("STEPS, EVERY = 160, 20", "STEPS, EVERY = 6, 3")
        few = few.replace("steps=20", "steps=2")
        exec(compile(few, f"cell {number}", "exec"), names)
    pyplot.close("all")
    assert [step for step, *_ in names["curve"]] == [0, 3, 6]
    first, last = names["curve"][0][1], names["curve"][-1][1]
    assert last < first  # the twenty, already after six steps
    assert (tmp_path / "digits-adapter" / "adapter_model.safetensors").is_file()
