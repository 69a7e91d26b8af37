"""What steps on a GPU will hold, before one runs: `python -m benchmarks.predict_step`.

On the meta device, by `a3fta.memory`: the peak of every cell of bench_step.py's table that is not
compiled, and of CASES the largest batch that `a3fta plan` finds. Writes
results/predicted.json, which bench_step.py and bench_largest.py put beside what they measure.
No GPU is needed, and none helps.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from a3fta_kernels import backends
from a3fta_kernels.memory import plan, step_peak

from . import measure
from .step_methods import (
    COMPILE,
    FLOOR,
    GRAPH,
    RANK,
    XFORMERS,
    Cell,
    Step,
    batches,
    build,
)  # fmt: skip
from .step_models import GPU, Model

PATH = Path(__file__).parent / "results" / "predicted.json"
GIB = 2**30
DTYPE = torch.bfloat16

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model of step_models.py, as `a3fta plan` knows it, and the memory of a device."""

    model: Model
    name: str
    gib: int
    levels: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model.name}, {self.gib} GiB"


SDXL, SD15 = GPU[:2]
CASES = (
    Case(SD15, "sd15", 12, ("stock", "exact", "block")),
    Case(SDXL, "sdxl", 24, ("exact", "block", "block-int8")),
)


def countable(cell: Cell) -> bool:
    """Whether fake tensors see what it holds."""
    return cell.method != FLOOR and not cell.variant.endswith((COMPILE, GRAPH, XFORMERS))


def peak_bytes(step: Step) -> int:
    """As bench_step.py measures it: above the trunk's weights, with what the method holds between
    steps; AdamW's two moments are not there yet."""
    inputs = {name: value for name, value in step.inputs.items() if name != "target"}
    moments = 2 * sum(p.nbytes for p in step.trained.values())
    return step_peak(step.model, **inputs).bytes + step.resident_bytes + moments


def peaks(model: Model) -> list[Row]:
    device = torch.device("meta")
    trunk, inputs = model.trunk(device, DTYPE), model.inputs(device, DTYPE)
    cells = [cell for batch in batches("cuda") for cell in batch.cells if countable(cell)]
    rows = []
    for cell in dict.fromkeys(cells):
        step = build(cell, trunk, inputs)
        rows.append(_label(model) | {
            "method": cell.method, "variant": cell.variant, "peak_bytes": peak_bytes(step),
        })  # fmt: skip
        print(f"{model} | {cell}: {rows[-1]['peak_bytes'] / 2**20:,.0f} MiB", flush=True)
    return rows


def largest(case: Case) -> list[Row]:
    """By level, the batch that fits, and what is set aside for other than tensors."""
    found = plan.make_plan(
        case.name, case.gib * GIB, case.model.config["sample_size"] * 8, "a3fta", RANK,
        levels=case.levels, precisions=["bf16"],
    )  # fmt: skip
    rows = [
        {"model": case.model.name, "gib": case.gib, "level": row.level, "batch": row.batch,
         "allowance_bytes": found.allowance}
        for row in found.rows
    ]  # fmt: skip
    for row in rows:
        print(f"{case} | {row['level']}: batch {row['batch']}", flush=True)
    return rows


def _label(model: Model) -> Row:
    dtype = str(DTYPE).removeprefix("torch.")
    return {"model": model.name, "batch_size": model.batch, "dtype": dtype}


def read(path: Path = PATH) -> dict[str, Any]:
    """What was predicted: "rows" by cell, "largest"; nothing where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "largest": []}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="peaks and batches, predicted")
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args(arguments)
    if not backends()["native"].available:
        parser.error(f"the compiled library is not here: {backends()['native'].reason}")
    import diffusers
    import peft

    about = {
        "commit": measure.commit(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "peft": peft.__version__,
    }  # fmt: skip
    found = {
        "environment": about,
        "largest": [row for case in CASES for row in largest(case)],
        "rows": [row for model in GPU for row in peaks(model)],
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
