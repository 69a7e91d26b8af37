"""`bench_inference.py` on a tiny U-Net: what it measures, checks, compares and names."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import bench_inference
from benchmarks.bench_inference import BATCH, CELLS, FROZEN, Call, check, own
from benchmarks.step_measure import Wrong
from benchmarks.step_models import QUICK

PEFT = importlib.util.find_spec("peft") is not None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    status = bench_inference.main(["--quick", "--device", "cpu", "--out", str(out)])
    return status, json.loads((out / "inference_cpu-quick.json").read_text())


def test_every_cell_is_right_and_measured(measured):
    status, found = measured
    assert status == 0
    missing = {row["cell"]: row["reason"] for row in found["absent"]}
    assert all("PEFT" in cell and why == "peft is not installed" for cell, why in missing.items())
    assert not (PEFT and missing)
    rows = {row["cell"]: row for row in found["rows"]}
    assert set(rows) | set(missing) == {str(cell) for cell in CELLS}
    base = rows[FROZEN.name]
    for row in rows.values():
        assert row["rounds"] == 3 and row["q20_us"] <= row["q50_us"] <= row["q80_us"]
        assert row["of_frozen"] == pytest.approx(row["q50_us"] / base["q50_us"], rel=1e-2)
        assert row["images_per_second"] == pytest.approx(BATCH / 30e-6 / row["q50_us"], rel=1e-2)
    assert found["environment"]["commit"] and found["environment"]["quick"]


def test_what_is_folded_costs_no_operator_and_one_call_serves_all(measured):
    counts = {row["cell"]: row["counts"]["operators"] for row in measured[1]["rows"]}
    frozen, ours = counts[FROZEN.name], counts["A3FTA r64"]
    assert counts["A3FTA r64, linear, merged"] <= frozen < ours
    assert counts["A3FTA r64, frozen for inference"] < ours
    assert counts["A3FTA r64, an adapter per image"] < 2 * frozen
    assert counts["A3FTA r64, an adapter per image, one by one"] > 3 * frozen


def test_replayed_cells_are_measured_on_a_gpu_alone(capsys):
    names = {}
    for device in ("cpu", "cuda"):
        assert bench_inference.main(["--device", device, "--list"]) == 0
        names[device] = capsys.readouterr().out
    assert "graph" not in names["cpu"]
    assert "| A3FTA r64, graph\n" in names["cuda"] and "frozen base, graph" in names["cuda"]


def test_a_graph_has_the_weights_that_it_reads(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    nothing = contextlib.nullcontext()
    for name, value in (
        ("Stream", Stream), ("current_stream", Stream), ("stream", lambda _: nothing),
        ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
        ("graph", lambda *_, **__: nothing),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    class Model(torch.nn.Module):
        def forward(self, x, return_dict):
            return (x,)

    model = Model()
    alive = weakref.ref(model)
    replay = bench_inference._replayed(bench_inference.once)(model, {"x": torch.ones(2)})
    del model
    gc.collect()
    assert alive() is not None and replay().tolist() == [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_replayed_calls_are_right(tmp_path):
    options = ["--quick", "--device", "cuda", "--out", str(tmp_path), "--only", "graph"]
    assert bench_inference.main(options) == 0
    (file,) = tmp_path.glob("*.json")
    rows = {row["cell"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["A3FTA r64, graph"]["peak_bytes"] is None
    assert rows["A3FTA r64, graph"]["counts"]["kernels"] > 0


def tiny():
    (model,) = QUICK
    device = torch.device("cpu")
    trunk = model.trunk(device, torch.float32).eval()
    inputs = bench_inference.replace(model, batch=BATCH).inputs(device, torch.float32)
    del inputs["target"]
    return trunk, inputs


def test_every_image_has_an_adapter_of_its_own_that_acts():
    trunk, inputs = tiny()
    cell = next(cell for cell in CELLS if cell.name.endswith("an adapter per image"))
    same = {
        name: x[:1].expand_as(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()
    }
    with torch.no_grad():
        y = cell.prepare(own(trunk, cell), same)()
        plain = trunk(**same, return_dict=False)[0]
    far = [(y[i] - y[j]).norm() / y[i].norm() for i in range(BATCH) for j in range(i)]
    assert min(far) > 1e-2 and (y - plain).norm() / plain.norm() > 1e-2


def test_a_cell_that_writes_to_weights_has_its_own():
    trunk, inputs = tiny()
    before = {name: p.clone() for name, p in trunk.named_parameters()}
    for cell in CELLS:
        if "PEFT" in cell.name and not PEFT:
            continue
        with torch.no_grad():
            Call(cell.prepare(own(trunk, cell), inputs)).run()
        assert all(p.equal(before[name]) for name, p in trunk.named_parameters()), cell


def test_another_result_of_a_group_is_wrong():
    cell = next(cell for cell in CELLS if cell.group == "gelu")
    truths = {}
    y = torch.ones(8)
    check(cell, y, truths, torch.float32)
    check(cell, y + 1e-6, truths, torch.float32)
    with pytest.raises(Wrong, match=r"0\.001 off what its group gives, at most 0\.0001"):
        check(cell, 1.001 * y, truths, torch.float32)
    with pytest.raises(Wrong, match="not finite"):
        check(FROZEN, torch.tensor([1.0, float("nan")]), truths, torch.float32)


def test_one_that_fails_is_named_and_hides_no_other(tmp_path, monkeypatch, capsys):
    def broken(model, inputs):
        raise RuntimeError("no such kernel\nand more")

    bad = bench_inference.Cell("A3FTA, broken", broken)
    monkeypatch.setattr(bench_inference, "CELLS", (FROZEN, bad))
    assert bench_inference.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "inference_cpu-quick.json").read_text())
    assert [row["cell"] for row in found["rows"]] == [FROZEN.name]
    assert found["absent"][0]["reason"] == "failed: RuntimeError: no such kernel"
    assert "no such kernel" in capsys.readouterr().out


def test_cells_are_asked_for_by_pattern(capsys):
    listing = ["--list", "--device", "cuda", "--only", "SDXL.*linear", "--without", "merged"]
    assert bench_inference.main(listing) == 0
    assert capsys.readouterr().out.splitlines() == [
        "SDXL 1024x1024, batch 4 | frozen base", "SDXL 1024x1024, batch 4 | A3FTA r64, linear",
    ]  # fmt: skip
    for wrong, told in ((["--only", "("], "--only: expected"), (["--only", "SD9"], "no cell is")):
        with pytest.raises(SystemExit):
            bench_inference.main([*wrong, "--device", "cpu"])
        assert told in capsys.readouterr().err
