"""The largest batch that trains in a memory, beside what `a3fta plan` says:
`python benchmarks/bench_largest.py`.

PyTorch may use the memory of a smaller device, less what CUDA itself takes here; whole steps of
A3FTA then run with the predicted batch, and with larger ones while they fit or smaller ones until
they do. Cases and predictions are those of predict_step.py. On a GPU that nothing else uses: what
others hold would count as CUDA's. Writes results/largest_<device>.json.

    --only PATTERN      cases that match ("SDXL 1024x1024, 24 GiB | exact")
    --without PATTERN   leaves such cases out
    --list              names them and measures nothing

Exit status is not zero where a case failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from a3fta_kernels.train.errors import is_out_of_memory  # noqa: E402
from benchmarks import measure, predict_step, step_measure  # noqa: E402
from benchmarks.bench_step import add_options, asked, environment, parsed  # noqa: E402
from benchmarks.predict_step import CASES, DTYPE, GIB, Case  # noqa: E402
from benchmarks.run import write  # noqa: E402
from benchmarks.step_methods import FUSED, Cell, build  # noqa: E402
from benchmarks.variants import CannotRun  # noqa: E402

# of the prediction, by which a batch is raised or lowered
SHARE = 1 / 32


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the largest batch that trains in a memory")
    add_options(parser, quick="one level of each model")
    parser.set_defaults(device="cuda")
    options, device = parsed(parser, arguments)
    if options.device != "cuda":
        parser.error(f"--device: expected cuda, whose memory it fills, got {options.device}")
    plan = [
        (case, level)
        for case in CASES
        for level in case.levels[: 1 if options.quick else None]
        if asked(f"{case} | {level}", options)
    ]
    if not plan:
        parser.error(f"--only {options.only!r}, --without {options.without!r}: no case is left")
    if options.list:
        print("\n".join(f"{case} | {level}" for case, level in plan))
        return 0
    return run(plan, device, options)


def run(plan: list[tuple[Case, str]], device: torch.device, options: argparse.Namespace) -> int:
    about = environment(device) | {"quick": options.quick}
    about |= {"commit": options.commit} if options.commit else {}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"largest_{measure.file_stem(device)}{'-quick' * options.quick}.json"
    end = time.perf_counter() + 60 * options.minutes
    predicted = {(r["model"], r["gib"], r["level"]): r for r in predict_step.read()["largest"]}
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    for case, level in plan:
        label = {"model": case.model.name, "gib": case.gib, "level": level}
        known = predicted.get((case.model.name, case.gib, level))
        try:
            if time.perf_counter() > end:
                raise CannotRun("the minutes were over")
            if known is None:
                raise CannotRun("not predicted: python -m benchmarks.predict_step")
            rows.append(known | measured(case, level, known["batch"], device))
            said = f"batch {rows[-1]['largest']}, predicted {known['batch']}"
        except Exception as error:  # one that fails must not hide the others
            absent.append(label | {"reason": step_measure.reason(error)})
            said = absent[-1]["reason"]
        print(f"{case} | {level}: {said}", flush=True)
        step_measure.release(device)
        write(options.out / name, {"environment": about, "absent": absent, "rows": rows})
    print(f"written: {options.out / name}")
    return int(any(row["reason"].startswith("failed: ") for row in absent))


def measured(case: Case, level: str, predicted: int, device: torch.device) -> dict[str, Any]:
    """The largest batch; the bytes that its step takes, and those that CUDA takes."""
    index, trunk = torch.cuda.current_device(), case.model.trunk(device, DTYPE)
    # libraries are loaded and tiles chosen with all of the memory
    if peak_of(case, level, max(1, predicted), trunk, device) is None:
        raise CannotRun(f"batch {max(1, predicted)} does not fit into all of this device")
    step_measure.release(device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    share = (case.gib * GIB - context) / total
    if not 0 < share <= 1:
        raise CannotRun(f"of {case.gib} GiB, {context / GIB:.1f} are CUDA's, and {total / GIB:.1f} "
                        "are there")  # fmt: skip
    peaks: dict[int, int] = {}
    try:
        torch.cuda.set_per_process_memory_fraction(share, index)

        def fits(batch: int) -> bool:
            taken = peak_of(case, level, batch, trunk, device)
            if taken is not None:
                peaks[batch] = taken
            return taken is not None

        found = largest(predicted, fits)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
    return {"largest": found, "peak_bytes": peaks.get(found), "context_bytes": context}


def largest(predicted: int, fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, up to a 32nd of the prediction; 0 where none does."""
    step = max(1, round(predicted * SHARE))
    batch = max(1, predicted)
    if fits(batch):
        while fits(batch + step):
            batch += step
        return batch
    while batch > 1:
        batch = max(1, batch - step)
        if fits(batch):
            return batch
    return 0


def peak_of(
    case: Case, level: str, batch: int, trunk: nn.Module, device: torch.device
) -> int | None:
    """Bytes that PyTorch holds at the peak of two steps; None where they do not fit."""
    step_measure.release(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        inputs = replace(case.model, batch=batch).inputs(device, DTYPE)
        step = build(Cell(FUSED, level), trunk, inputs)
        for _ in range(2):  # the optimizer's states are there from the first on
            step.run()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None
        raise
    return torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    sys.exit(main())
