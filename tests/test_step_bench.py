"""`bench_step.py` on a tiny U-Net: what it measures, checks, compares and names."""

from __future__ import annotations

import importlib.util
import json
import math
import time

import pytest
import torch

pytest.importorskip("diffusers")

import a3fta_kernels as a3fta
from benchmarks import bench_step, step_measure, step_methods, step_models
from benchmarks.step_measure import Found, Limits, measure_batch, rounds
from benchmarks.step_methods import (
    ANCHOR,
    BESIDE,
    CHECKPOINTING,
    COMPILE,
    EAGER,
    EQUAL,
    FLOOR,
    FULL,
    FUSED,
    GRAPH,
    LEVELS,
    LORA,
    STOCK,
    XFORMERS,
    Batch,
    Cell,
    batches,
    build,
)  # fmt: skip
from benchmarks.variants import CannotRun

from .graphs import stand_in

(TINY,) = step_models.QUICK
PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def limits(count: int = 1) -> Limits:
    return Limits(0.0, count, time.perf_counter() + 600)


def trunk(device, dtype=torch.float32):
    return TINY.trunk(device, dtype)


@pytest.fixture(scope="module")
def measured():
    """A batch with every kind of cell, on the CPU."""
    cells = (
        ANCHOR, Cell(FUSED, STOCK), Cell(FUSED, "exact"), Cell(FUSED, "recompute"),
        Cell(FUSED, "block"), Cell(FUSED, CHECKPOINTING), Cell(FLOOR, STOCK), Cell(FULL, STOCK),
    )  # fmt: skip
    device = torch.device("cpu")
    return measure_batch(TINY, trunk(device), Batch("adapters", cells), device, limits()), cells


@PEFT
def test_every_cell_is_measured(measured):
    found, cells = measured
    assert found.absent == {} and set(found.rows) == set(cells)
    for cell, row in found.rows.items():
        assert row["rounds"] == 1 and row["q20_us"] <= row["q50_us"] <= row["q80_us"]
        assert row["beside"].keys() == {str(c) for c in cells}
        assert row["beside"][str(cell)] == row["q50_us"] > 0
        assert row["counts"]["operators"] > 100 and row["saved_bytes"] > 0
        assert (row["peak_bytes"] is None) is (cell.method == FLOOR)


@PEFT
def test_memory_goes_the_way_it_should(measured):
    rows = measured[0].rows

    def of(variant: str, what: str, method: str = FUSED) -> int:
        return rows[Cell(method, variant)][what]

    for what in ("saved_bytes", "peak_bytes"):
        assert of("block", what) < of("recompute", what) < of("exact", what) < of(STOCK, what)
        assert of(CHECKPOINTING, what) < of(STOCK, what)
    # a full fine-tuning holds two moments for every weight, and every gradient
    weights = of(STOCK, "weights_bytes")
    assert of(STOCK, "resident_bytes", FULL) >= 2 * weights
    assert of(STOCK, "peak_bytes", FULL) >= 3 * weights
    adapters = of(STOCK, "trainable_parameters")
    assert of(STOCK, "resident_bytes") == pytest.approx(3 * 4 * adapters, rel=0.02)
    assert of(STOCK, "trainable_parameters", FULL) * 4 <= weights
    assert of(STOCK, "trainable_parameters", FLOOR) == 0


@PEFT
def test_the_trunk_is_shared_and_no_method_changes_it(device):
    base = trunk(device)
    before = {n: p.clone() for n, p in base.named_parameters()}
    own = {p.data_ptr() for p in base.parameters()}
    inputs = TINY.inputs(device, torch.float32)
    for cell in (ANCHOR, Cell(FUSED, "block"), Cell(FULL, STOCK)):
        step = build(cell, base, inputs)
        shared = own & {p.data_ptr() for p in step.model.parameters()}
        assert shared == (set() if cell.method == FULL else own)
        step.run()
        assert all(p.grad is None for p in step.model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert not any(p.requires_grad for p in base.parameters())


def test_the_floor_stops_at_the_first_attention_layer(device):
    step = build(Cell(FLOOR, STOCK), trunk(device), TINY.inputs(device, torch.float32))
    assert step.optimizer is None and not step.trained
    _, grads = step.gradients()
    (grad,) = grads.values()
    assert grad.shape == (1, 64, 32) and float(grad.abs().max()) > 0


@PEFT
@pytest.mark.parametrize(("model", "rank"), [(step_models.SD15, 16), (step_models.SDXL, 15)])
def test_lora_with_as_many_parameters(model, rank):
    from diffusers import UNet2DConditionModel

    def trained(unet) -> int:
        return sum(p.numel() for p in unet.parameters() if p.requires_grad)

    with torch.device("meta"):
        ours, lora = (UNet2DConditionModel(**model).requires_grad_(False) for _ in range(2))
        step_methods.lora(lora, rank)
    assert step_methods.equal_rank(ours) == rank
    a3fta.inject(ours, a3fta.AdapterConfig(rank=64), backend="reference")
    assert trained(lora) == pytest.approx(trained(ours), rel=0.02)


@PEFT
@pytest.mark.parametrize("cell", [Cell(LORA, GRAPH), Cell(FUSED, f"exact, {GRAPH}")], ids=str)
def test_a_captured_step_is_that_of_the_package(monkeypatch, cell):
    recordings = stand_in(monkeypatch)
    device = torch.device("cpu")
    inputs = TINY.inputs(device, torch.float32)
    plain = build(Cell(cell.method, STOCK), trunk(device), inputs)
    step = build(cell, trunk(device), inputs)
    for _ in range(2):  # before a step of the optimizer and after it
        truth, found = plain.gradients(), step.gradients()
        assert found[0] == pytest.approx(float(truth[0]), rel=1e-5)
        assert step_measure.cosine(found[1], truth[1]) > 0.99999
        before = [p.detach().clone() for p in step.trained.values()]
        plain.run(), step.run()
        assert not any(map(torch.equal, before, step.trained.values()))
        assert all(p.grad is None for p in step.trained.values())
    assert len(recordings) == 1
    assert step_measure.peak_on_gpu(step, device) == {"peak_bytes": None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
def test_captured_steps_are_right_and_measured():
    device = torch.device("cuda")
    (batch,) = (b for b in batches("cuda") if b.name == "captured")
    found = measure_batch(TINY, trunk(device), batch, device, limits())
    assert not [why for why in found.absent.values() if "not installed" not in why]
    graphs = [row for cell, row in found.rows.items() if cell.variant.endswith(GRAPH)]
    assert graphs and all(row["peak_bytes"] is None and row["q50_us"] > 0 for row in graphs)


def test_what_was_timed_stays_where_the_minutes_end(device):
    class Late(Limits):
        """Over when all cells are built."""

        asked = 0

        @property
        def over(self):
            self.asked += 1
            return self.asked > 2

    cells = (Cell(EAGER, STOCK), Cell(FUSED, STOCK))
    found = measure_batch(
        TINY, trunk(device), Batch("adapters", cells), device, Late(0.0, 3, math.inf)
    )
    assert set(found.rows) == set(cells) and not found.absent
    assert all(row["q50_us"] > 0 and "counts" not in row for row in found.rows.values())


def test_a_cell_that_computes_something_else_is_not_timed(device, monkeypatch):
    def lean(model, level, **rest):
        model.conv_out.register_forward_hook(lambda module, args, y: 1.01 * y)

    monkeypatch.setattr(step_methods.a3fta, "lean", lean)
    cells = (Cell(EAGER, STOCK), Cell(FUSED, STOCK), Cell(FUSED, "exact"))
    found = measure_batch(TINY, trunk(device), Batch("adapters", cells), device, limits())
    assert set(found.rows) == set(cells[:2])
    assert found.absent[cells[2]].startswith("failed: Wrong: its loss is ")
    assert str(cells[2]) not in found.rows[cells[0]]["beside"]


def test_gradients_that_point_elsewhere_are_wrong():
    grads = {"a": torch.ones(4), "b": torch.arange(3.0)}

    class Fixed:
        def __init__(self, grads):
            self.grads = grads

        def gradients(self):
            return torch.tensor(1.0), self.grads

    truths: dict = {}
    cell = Cell(FUSED, "exact")
    step_measure.check(cell, Fixed(grads), truths, torch.float32)
    step_measure.check(cell, Fixed(grads), truths, torch.float32)
    turned = grads | {"a": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    with pytest.raises(step_measure.Wrong, match=r"cosine of its gradients 0\.9"):
        step_measure.check(cell, Fixed(turned), truths, torch.float32)
    with pytest.raises(step_measure.Wrong, match="other parameters"):
        step_measure.check(cell, Fixed({"a": grads["a"]}), truths, torch.float32)
    step_measure.check(Cell(LORA, STOCK), Fixed(turned), truths, torch.float32)
    assert step_measure.cosine(grads, grads) == pytest.approx(1)


def test_a_loss_that_is_not_finite_is_wrong():
    class Broken:
        def gradients(self):
            return torch.tensor(math.nan), {}

    with pytest.raises(step_measure.Wrong, match="its loss is nan"):
        step_measure.check(ANCHOR, Broken(), {}, torch.float32)


def test_a_round_takes_one_step_of_every_cell_and_rotates():
    taken: list[int] = []
    cells = [Cell(FUSED, str(i)) for i in range(4)]

    def clock(i: int):
        def sample():
            taken.append(i)
            return float(len(taken)), 0.0

        return sample

    samples, failed = rounds({c: clock(i) for i, c in enumerate(cells)}, limits(6))
    assert not failed and len(taken) == 4 * 6
    turns = [taken[i : i + 4] for i in range(0, len(taken), 4)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns)
    assert [turn[0] for turn in turns] == [0, 1, 2, 3, 0, 1]
    assert all(len(s) == 6 for s in samples.values())


def test_a_cell_that_fails_in_a_round_leaves_and_is_named():
    calls: list[int] = []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nand more")
        return 1.0, 1.0

    good, bad = Cell(FUSED, STOCK), Cell(FUSED, "exact")
    samples, failed = rounds({good: lambda: (1.0, 1.0), bad: fails}, limits(5))
    assert failed == {bad: "failed: OutOfMemoryError: CUDA out of memory. Tried"}
    assert set(samples) == {good} and len(samples[good]) == 5 and len(calls) == 2


def test_what_time_did_not_reach_is_named(device):
    over = Limits(0.0, 1, time.perf_counter() - 1)
    found = measure_batch(TINY, trunk(device), batches("cpu")[0], device, over)
    assert not found.rows and set(found.absent.values()) == {"the minutes were over"}
    assert set(found.absent) == set(batches("cpu")[0].cells)


def test_what_is_not_installed_is_named(device, monkeypatch):
    monkeypatch.setattr(step_methods.importlib.util, "find_spec", lambda name: None)
    for cell in (Cell(FUSED, XFORMERS), ANCHOR):
        with pytest.raises(CannotRun, match="is not installed"):
            build(cell, trunk(device), {})
    assert step_measure.reason(CannotRun("peft is not installed")) == "peft is not installed"


def test_every_batch_compares_with_lora():
    for device in ("cpu", "cuda"):
        for batch in batches(device):
            assert batch.cells[0] == ANCHOR and len(set(batch.cells)) == len(batch.cells)
    cells = {c for batch in batches("cuda") for c in batch.cells}
    assert {v for m, v in cells if m == FUSED} >= {STOCK, CHECKPOINTING, COMPILE, XFORMERS, *LEVELS}
    assert {m for m, _ in cells} == {FLOOR, FULL, LORA, EQUAL, EAGER, FUSED, BESIDE}
    part = step_measure.needed(batches("cpu")[0], lambda cell: cell == Cell(FUSED, "exact"))
    assert part is not None and part.cells == (ANCHOR, Cell(FUSED, "exact"))
    assert step_measure.needed(batches("cpu")[0], lambda cell: False) is None


def row_of(cell: Cell, model) -> dict:
    return {"q20_us": 1.0, "q50_us": 2.0, "q80_us": 3.0, "trainable_parameters": 1, "rounds": 5,
            "peak_bytes": 1, "saved_bytes": 1, "beside": {}}  # fmt: skip


def run(monkeypatch, out, *arguments: str, fails: str = "", commit: str = "abc") -> tuple:
    """The command with cells that cost nothing; what it measured, and the file."""
    seen: list[tuple[str, Cell]] = []

    def fake(model, trunk, batch, device, limits):
        found = Found()
        for cell in batch.cells:
            seen.append((batch.name, cell))
            if fails and fails in str(cell):
                found.absent[cell] = "failed: Wrong: made up"
            else:
                found.rows[cell] = row_of(cell, model) | {"batch": batch.name, "mark": len(seen)}
        return found

    monkeypatch.setattr(step_measure, "measure_batch", fake)
    monkeypatch.setattr(step_models.Model, "trunk", lambda *_: torch.nn.Identity())
    code = bench_step.main(["--device", "cpu", "--out", str(out), "--commit", commit, *arguments])
    path = next(iter(out.glob("*.json")))
    return code, seen, json.loads(path.read_text())


def cells_of(rows: list[dict]) -> list[tuple]:
    return [(r["model"], r["method"], r["variant"]) for r in rows]


def test_no_cell_is_silently_dropped(monkeypatch, tmp_path, capsys):
    code, _, found = run(monkeypatch, tmp_path, fails="recompute")
    assert code == 1
    named = cells_of(found["rows"]) + cells_of(found["absent"])
    wanted = {
        (m.name, *c) for m in step_models.CPU for b in batches("cpu", m.brief) for c in b.cells
    }
    assert set(named) == wanted and len(named) == len(wanted)
    reasons = {r["variant"]: r["reason"] for r in found["absent"]}
    assert reasons["recompute"] == "failed: Wrong: made up"
    assert "--compile asks for it" in reasons[COMPILE]
    printed = capsys.readouterr().out
    for r in found["absent"]:
        assert f"{r['method']} | {r['variant']}: not measured: {r['reason']}" in printed


def test_rows_add_up(monkeypatch, tmp_path):
    quick = ("--quick", "--compile")
    code, seen, first = run(monkeypatch, tmp_path, *quick, "--only", "exact")
    assert code == 0 and not first["absent"] and all(b != "full" for b, _ in seen)
    code, seen, second = run(monkeypatch, tmp_path, *quick, "--only", r"\| full \|")
    assert {c.method for _, c in seen} == {LORA, FULL}
    assert set(cells_of(second["rows"])) > set(cells_of(first["rows"]))

    # the anchor's row stays that of the first batch, until that is measured again
    def anchor(found):
        return next(r for r in found["rows"] if (r["method"], r["variant"]) == ANCHOR)

    assert anchor(second) == anchor(first) and anchor(first)["batch"] == "adapters"
    _, seen, third = run(monkeypatch, tmp_path, *quick, "--only", "recompute$", fails="A3FTA")
    assert cells_of(third["absent"]) == [("tiny", m, "recompute") for m in (FUSED, BESIDE)]
    _, _, fourth = run(monkeypatch, tmp_path, *quick, "--only", "recompute$")
    assert not fourth["absent"] and ("tiny", FUSED, "recompute") in cells_of(fourth["rows"])
    # of another commit: what was not measured again stays, and says of which it is
    _, _, fifth = run(monkeypatch, tmp_path, *quick, "--only", "recompute$", commit="def")
    assert set(cells_of(fifth["rows"])) == set(cells_of(fourth["rows"]))
    assert {r["variant"] for r in fifth["rows"] if r["commit"] == "def"} >= {"recompute"}
    assert {r["commit"] for r in fifth["rows"] if r["variant"] == "exact"} == {"abc"}
    # another version of torch: nothing stays
    monkeypatch.setattr(torch, "__version__", "0.0")
    _, _, other = run(monkeypatch, tmp_path, *quick, "--only", "exact")
    assert set(cells_of(other["rows"])) == set(cells_of(first["rows"]))


def test_options(monkeypatch, tmp_path, capsys):
    _, seen, _ = run(monkeypatch, tmp_path, "--quick", "--without", "A3FTA|frozen|full")
    assert {c.method for _, c in seen} == {LORA}
    assert bench_step.main(["--device", "cuda", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names[-1] == f"SDXL 1024x1024, batch 1 | captured | {BESIDE} | exact, {GRAPH}"
    telling = [n for n in names if n.startswith("SDXL 1024x1024, batch 4 | adapters")]
    assert f"SDXL 1024x1024, batch 4 | adapters | {ANCHOR}" == telling[0]
    for wrong, said in ((["--only", "("], "regular expression"), (["--only", "x9"], "no cell")):
        with pytest.raises(SystemExit):
            bench_step.main(["--device", "cpu", *wrong])
        assert said in capsys.readouterr().err


def test_the_small_models_are_made_like_the_real_ones():
    real = {m.like: m for m in step_models.GPU[:2]}
    for small in step_models.CPU:
        shares = []
        for model in (small, real[small.like]):
            flop = step_models.arithmetic(model)
            shares.append({kind: n / sum(flop.values()) for kind, n in flop.items()})
        for kind in step_models.KINDS:
            assert shares[0][kind] == pytest.approx(shares[1][kind], abs=0.12), kind
