"""docs/designs.md: its tables are those of DESIGNS and AdapterConfig, and what they say is so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import DESIGNS, AdapterConfig
from a3fta_kernels.processors import FAMILIES

from ..placed import net

PAGE = (Path(__file__).resolve().parents[2] / "docs/designs.md").read_text(encoding="utf-8")
# one value of each option that is not the default; `merges` is asked of linear adapters
VALUES: dict[str, Any] = {
    "rank": 3, "activation": "silu", "scale": 0.5, "design": "gated", "bias": False,
    "dropout": 0.5, "targets": "to_out", "rank_pattern": {"to_out": 2}, "dtype": None,
    "train": "adapter+attention", "layer_norm": True, "drop_path": 0.5, "time_window": (0, 500),
    "time_rank": 1, "placement": "post",
}  # fmt: skip


def table(title: str) -> dict[str, list[str]]:
    """Name -> the other cells, of the table under that heading."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {first.strip("`| "): rest for first, *rest in rows}


def fused(**options: Any) -> bool:
    report = a3fta.inject(net(), AdapterConfig(**{"rank": 2} | options))
    return report.layers["attention.to_out.0"].fused


def merges(**options: Any) -> bool:
    model = net()
    a3fta.inject(model, AdapterConfig(**{"rank": 2, "activation": "identity"} | options))
    try:
        a3fta.merge(model)
    except ValueError:
        return False
    return True


def test_designs():
    rows = table("Designs")
    assert list(rows) == list(DESIGNS)
    for design, (formula, start, source, *said) in rows.items():
        assert "z" in formula and "= 0" in start and re.search(r"20\d\d", source)
        assert said == ["yes" if way(design=design) else "no" for way in (fused, merges)], design


def test_options():
    rows = table("Options")
    assert list(rows) == [field.name for field in dataclasses.fields(AdapterConfig)] == list(VALUES)
    for option, cells in rows.items():
        assert len(cells) == 4, option
        options = {option: VALUES[option]}
        whether = {"yes": True, "no": False, "not in training": False, "pre": False}
        assert whether[cells[2]] == fused(**options), option
        in_some = {"in eval mode", "the table above", "pre, post"}
        assert merges(**options) == (cells[3] in {"yes", *in_some}), option


def test_placements():
    assert fused(placement="pre") and not fused(placement="parallel")
    assert merges(placement="pre") and not merges(placement="parallel")
    joined = re.search(r"hands\s+them\s+over\s+as\s+one\s+\(([^)]*)\)", PAGE)[1]
    names = set(re.findall(r"`(\w+)`", joined))
    assert names == {name for name, family in FAMILIES.items() if family.joins}


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_in_eval_mode(option):
    model = net().train()
    a3fta.inject(model, AdapterConfig(rank=2, activation="identity", **{option: 0.5}))
    with pytest.raises(ValueError, match=option):
        a3fta.merge(model)
    a3fta.merge(model.eval())
