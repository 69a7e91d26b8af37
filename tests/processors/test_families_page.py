"""docs/families.md: its table is that of FAMILIES and of the small models; its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest

import a3fta_kernels as a3fta
from a3fta_kernels.processors import FAMILIES, clock

from .. import docs
from ..models.zoo import ZOO

PAGE = (Path(__file__).resolve().parents[2] / "docs/families.md").read_text(encoding="utf-8")


class Row(NamedTuple):
    models: str
    layers: str
    processors: str
    blocks: str
    timestep: str
    limits: str


def table() -> dict[str, Row]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {named(first)[0]: Row(*rest) for first, *rest in cells}


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = table()
TIMESTEPS = {
    clock.steps: "0 to 1000",
    clock.share: "0 to 1",
    clock.share_left: "1 to 0",
    clock.steps_left: "1000 to 0",
    clock.log_sigma: "ln(sigma) / 4",
    clock.cosmos: "Cosmos 1: ln(sigma) / 4; 2, 2.5: 0 to 1",
    clock.sana: "0 to 1000; Sprint: 0 to 1",
}


def test_every_family_has_a_row():
    assert list(ROWS) == [name for name in FAMILIES if not FAMILIES[name].by_structure]


@pytest.mark.parametrize("family", ROWS)
def test_row(family):
    """Every model of the row has a small one, of which all cells are so."""
    row, used, kinds = ROWS[family], set(), set()
    reads_more, blocks = False, set()
    models, layers, limits = named(row.models), named(row.layers), []
    assert all(isinstance(getattr(diffusers, model), type) for model in models)
    for small in (small for small in ZOO.values() if small.family == family):
        model = small.build()
        kind = type(model).__name__
        kinds.add(kind)
        report = a3fta.inject(model, a3fta.AdapterConfig(rank=2))
        assert (row.processors == "ours") == bool(report.processors)
        assert (row.processors == "stock") == bool(report.left_processors)
        for layer, found in report.layers.items():
            general = "." + re.sub(r"\.\d+(?=\.)", ".*", layer)
            suffixes = {name for name in layers if general.endswith(f".{name}")}
            assert suffixes, f"{layer} is not in the row of {family}"
            used |= suffixes
            reads_more |= found.columns is not None
        blocks |= set(small.lean or ())
        limits += [*small.idle.values(), *small.other.values(), small.forgets, small.refuses]
        limits += [small.reads_numbers, small.takes_sizes]
        if small.lean is None:
            limits.append("`lean` knows no module of it")
        if not getattr(model, "_supports_gradient_checkpointing", False):
            limits.append(f"no gradient checkpointing: `{kind}`")
    assert kinds == set(models) - {"MotionAdapter"}  # which has no forward of its own
    assert row.timestep == TIMESTEPS[FAMILIES[family].timesteps]
    assert used == set(layers)
    assert reads_more == ("first columns" in row.layers)
    assert set(named(row.blocks)) == blocks
    assert all(limit in row.limits for limit in limits), (row.limits, limits)
    assert any(limits) == (row.limits != "-")


def test_its_code_runs(tmp_path, monkeypatch):
    docs.run("docs/families.md", tmp_path, monkeypatch, {})
