"""The benchmark harness on a workload of no size: what it checks, counts and writes."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from a3fta_kernels import ops
from benchmarks import floors, harness, measure, run, targets, variants
from benchmarks.variants import CannotRun, Subject, Variant
from benchmarks.workloads import (
    BENCHES,
    CPU,
    DIRECTIONS,
    ELEMENTWISE,
    GPU,
    Workload,
    directions,
    possible,
    workloads,
)
from tests.oracle import compare

TINY = Workload("none", 1, 48, 24, r=4, residual=True)
TINIES = {
    "adapter": TINY,
    "adapter_bank": Workload("none", 4, 12, 24, r=4, adapters=2),
    "adapter_linear": TINY,
    "cross_attention_adapter": Workload("none", 2, 20, 24, r=4, heads=3, keys=7),
    "block": Workload("none", 2, 20, 24, r=4, heads=3, keys=7, text=12),
    "geglu": Workload("none", 2, 20, 24, r=0),
    "quantize": Workload("none", 2, 20, 24, r=0),
    "group_norm": Workload("none", 2, 20, 32, r=0, last=True),
    "layer_norm": Workload("none", 2, 20, 24, r=0),
}


@pytest.fixture
def settings(device, monkeypatch):
    monkeypatch.setattr(harness, "workloads", lambda op, *_: [(TINIES[op], torch.float32)])
    monkeypatch.setattr(harness, "directions", lambda *_: DIRECTIONS)
    return harness.Settings(device, quick=True, minutes=5.0, seconds=0.0)


def group(op: str, direction: str) -> harness.Group:
    return harness.Group(op, TINIES[op], torch.float32, direction)


def measured(group: harness.Group, settings: harness.Settings) -> dict[str, dict]:
    return harness.Prepared(group, settings).measure(group.direction)


@pytest.mark.parametrize("op", BENCHES)
def test_every_variant_is_measured(settings, op):
    if op == "block":
        pytest.importorskip("diffusers")
    prepared = harness.Prepared(group(op, "forward"), settings)
    for direction in possible(op):
        found = prepared.measure(direction)
        at = group(op, direction)
        wanted = {e.variant for e in harness.entries(op, settings) if e.group == at}
        assert set(found) == wanted >= {"eager"}
        for name, result in found.items():
            if name == "peft" and importlib.util.find_spec("peft") is None:
                assert result == {"skip": "peft: peft is not installed"}
                continue
            assert "error" not in result and "skip" not in result, (name, result)
            assert len(result["samples"]) >= 7 and min(result["samples"]) > 0
    # h, a and z in eager; the op keeps h and a; a block keeps more; quantize has no derivative
    rows = TINIES[op].m * 4
    if len(possible(op)) > 1:
        assert found["eager"]["saved_bytes"] >= rows * (TINIES[op].c + 2 * TINIES[op].r)
    if op == "geglu":
        assert found["eager"]["saved_bytes"] == rows * 3 * TINIES[op].c


def test_variants_of_each_bench():
    w, cpu = TINIES["cross_attention_adapter"], torch.device("cpu")

    def named(op: str, direction: str) -> set[str]:
        return set(variants.names(op, w, torch.float32, direction, cpu.type))

    assert "clone" in named("adapter", "backward") and "peft" not in named("adapter", "backward")
    assert named("adapter_linear", "backward") >= {"eager", "peft", "frozen", "read"}
    assert "read" not in named("adapter_linear", "forward")
    assert named("cross_attention_adapter", "forward") >= {"eager", "sdpa+auto", "peft", "frozen"}
    assert named("block", "forward") >= {"eager", "peft", "frozen"}


def test_the_backward_alone_is_the_rest_of_the_step(device):
    subject = Subject.make("adapter_linear", TINY, torch.float32, device)
    eager, dy = variants.build("eager", subject, ""), torch.randn(subject.y_shape, device=device)
    backward, both = (
        harness.call_of(direction, eager, [subject.inputs], [dy])
        for direction in ("backward", "forward+backward")
    )
    for _ in range(2):  # the activations are kept
        for ours, theirs in zip(backward(0), both(0), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_copies_move_the_bytes_they_stand_for(device):
    for op, direction in (("adapter", "forward"), ("adapter", "backward")):
        size = floors.copied(op, TINY, direction, torch.float32)["clone"]
        subject = Subject.make(op, TINY, torch.float32, device)
        clone = variants.build("clone", subject, direction)
        y = harness.call_of(direction, clone, [{}], [torch.zeros(1, device=device)])(0)
        assert 2 * y.nbytes == size == (2 if direction == "forward" else 3) * 48 * 24 * 4


def test_the_specification_of_cross_attention_is_plain_attention():
    w = TINIES["cross_attention_adapter"]
    inputs = Subject.make("cross_attention_adapter", w, torch.float64, torch.device("cpu")).inputs
    q, k, v = (inputs[n].unflatten(-1, (3, 8)).transpose(1, 2) for n in "qkv")
    h = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    rest = {n: x for n, x in inputs.items() if n not in ("q", "k", "v", "heads")}
    exact = variants.EAGER["adapter_linear"](h=h, **rest)
    torch.testing.assert_close(variants.EAGER["cross_attention_adapter"](**inputs), exact)
    assert not inputs["k"].requires_grad and inputs["q"].requires_grad


def test_a_fused_cross_attention_is_taken_once_it_is_there(monkeypatch):
    taken = []

    def fused(backend: str, **inputs):
        taken.append(backend)
        return variants.EAGER["cross_attention_adapter"](**inputs)

    monkeypatch.setattr(ops, "cross_attention_adapter", fused, raising=False)
    monkeypatch.setattr(variants, "why_not", lambda *_: None)
    w = TINIES["cross_attention_adapter"]
    names = variants.names("cross_attention_adapter", w, torch.float32, "forward", "cpu")
    assert {"native", "triton", "auto"} <= set(names)
    subject = Subject.make("cross_attention_adapter", w, torch.float32, torch.device("cpu"))
    variants.build("triton", subject, "forward").run(**subject.inputs)
    assert taken == ["triton"]


def test_blocks_differ_in_nothing_but_the_backend():
    pytest.importorskip("diffusers")
    subject = Subject.make("block", TINIES["block"], torch.bfloat16, torch.device("cpu"))
    before = [p.clone() for p in subject.block.parameters()]
    eager, exact = variants.build("eager", subject, ""), subject.exact()
    for name, p in eager.leaves(subject.inputs).items():
        if name != "x":
            torch.testing.assert_close(exact.leaves({})[name], p.double())
            assert p.dtype == torch.float32 and p.abs().min() >= 0 and p.abs().max() > 0
    assert exact.leaves({}).keys() == eager.leaves(subject.inputs).keys() - {"x"}
    assert not any(p.requires_grad for p in subject.block.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, subject.block.parameters(), strict=True))


def test_peft_trains_as_many_ranks():
    pytest.importorskip("peft")
    subject = Subject.make("adapter_linear", TINY, torch.bfloat16, torch.device("cpu"))
    leaves = variants.build("peft", subject, "forward").leaves(subject.inputs)
    assert {tuple(x.shape) for n, x in leaves.items() if "lora" in n} == {(4, 24), (24, 4)}
    assert all(x.dtype == torch.bfloat16 and x.any() for x in leaves.values())


def test_what_is_missing_is_skipped_with_its_reason(settings, monkeypatch):
    def missing(*_):
        raise CannotRun("peft is not installed")

    monkeypatch.setattr(variants, "lora", missing)
    found = measured(group("adapter_linear", "forward"), settings)
    assert found["peft"] == {"skip": "peft: peft is not installed"}
    assert "samples" in found["frozen"]


def test_a_wrong_variant_is_an_error_and_hides_no_other(settings, monkeypatch):
    plain = variants.build

    def build(name: str, *rest):
        return Variant(lambda h, **_: h + 1) if name == "clone" else plain(name, *rest)

    monkeypatch.setattr(variants, "build", build)
    found = measured(group("adapter", "forward"), settings)
    assert "AssertionError" in found["clone"]["error"] and "samples" in found["eager"]


def test_a_batch_of_several_samples_is_held_to_the_same_bar(device):
    """A result of one sample in the place of another is wrong, however much samples differ."""
    w = Workload("none", 4, 8, 16, r=4)
    settings = harness.Settings(device, quick=True, minutes=5.0, seconds=0.0)
    prepared = harness.Prepared(harness.Group("adapter", w, torch.float32, "forward"), settings)
    exact, bars = prepared.truth
    with pytest.raises(AssertionError):
        compare("y", exact.y.roll(1, 0), [b.y for b in bars], exact.y, torch.float32, 2.0)
    eager = variants.build("eager", prepared.subject, "")
    prepared._assert_correct(eager)
    with pytest.raises(AssertionError):
        prepared._assert_correct(Variant(lambda **inputs: eager.run(**inputs).roll(1, 0)))


def test_variants_can_be_left_out(settings):
    settings.without = "native|compile"
    names = {e.variant for e in harness.entries("adapter", settings)}
    assert "eager" in names and not names & {"native", "compile"}


def test_no_group_starts_when_the_time_is_over(settings):
    settings.minutes = -1.0
    entry = harness.entries("adapter", settings)[0]
    with pytest.raises(pytest.skip.Exception, match="not measured"):
        harness.Runner(settings).result(entry)


def test_a_group_that_cannot_be_prepared_fails_once(settings, monkeypatch):
    tried = []

    def prepare(*_):
        tried.append(1)
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(harness, "Prepared", prepare)
    runner = harness.Runner(settings)
    for entry in harness.entries("adapter", settings)[:2]:
        with pytest.raises(pytest.fail.Exception, match="OutOfMemoryError: too large"):
            runner.result(entry)
    assert len(tried) == 1


def test_a_workload_is_prepared_once_for_all_directions(settings):
    runner = harness.Runner(settings)
    prepared = set()
    for entry in harness.entries("adapter", settings):
        runner.result(entry)
        prepared.add(id(runner.prepared))
    assert len(prepared) == 1


@pytest.mark.parametrize(("seconds", "spent", "rounds"), [(0, 1, 7), (1, 0.001, 200), (1, 0.1, 11),
                                                          (1, 1.5, 7), (0.1, 2, 3)])  # fmt: skip
def test_rounds_that_take_long_are_few(monkeypatch, seconds, spent, rounds):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def clock() -> float:
        now[0] += spent
        return spent

    assert len(measure.interleave({"one": clock}, seconds)["one"]) == rounds


def test_counts_see_operators_and_not_views():
    x = torch.randn(8, 8)
    assert measure.count(lambda i: x.t() @ x, torch.device("cpu")) == {"operators": 1}
    assert measure.count(lambda i: (x + 1).relu(), torch.device("cpu")) == {"operators": 2}


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    h, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: (h @ w) + (h @ w), [w]) == h.nbytes


def test_work_of_a_workload():
    w = Workload("none", 2, 8, 4, r=2)
    assert floors.flop("adapter", w, "forward") == 4 * 16 * 4 * 2
    assert floors.flop("adapter", w, "backward") == 8 * 16 * 4 * 2
    assert floors.moved("adapter", w, "forward", torch.float32) == (2 * 16 * 4 + 2 * 4 * 2) * 4
    for op in BENCHES:
        w = TINIES[op]
        half, forward, backward, both = (
            floors.moved(op, w, d, t)
            for d, t in zip(
                ("forward+backward", *DIRECTIONS),
                (torch.bfloat16, *[torch.float32] * 3),
                strict=True,
            )
        )
        narrow = 2 * (w.m * w.c + 4 * 8) if op == "quantize" else 0  # 960 codes are 8 blocks
        assert 2 * (half - narrow) == both - narrow and both >= forward + backward - narrow
        parts = [floors.flop(op, w, d) for d in DIRECTIONS]
        assert parts[2] == parts[0] + parts[1]
        assert (parts[2] > 0) == (op not in ELEMENTWISE)


def test_the_arithmetic_an_adapter_adds():
    w = Workload("none", 4, 1024, 1280, r=64)
    assert floors.arithmetic_ratio(w) == pytest.approx(1 + 3 * 64 / 1280 + 64 / 4096)
    single = Workload("none", 1, 4608, 3072, k=15360)
    assert floors.arithmetic_ratio(single) < 1 + 3 * 64 / 15360 + 64 / 4608


def test_the_floors_of_a_device_are_a_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["floors", "--copy", "1e12", "--flop", "1e14"])
    floors.main()
    text = capsys.readouterr().out
    assert text.startswith("Computed, not measured") and "1e+12 bytes/s" in text
    (line,) = [x for x in text.splitlines() if "| adapter | 16384x640-r64 | forward |" in x]
    moved = 2 * 16384 * 640 * 2 + 2 * 640 * 64 * 2
    assert f"| {moved / 2**20:.1f} |" in line and f"| {moved / 1e6:.1f} |" in line
    assert "| bytes |" in line
    rows = [x for x in text.splitlines() if x.startswith("| ")][1:]
    assert len(rows) == sum(len(possible(op)) * len(GPU[op]) for op in BENCHES)


def test_the_notes_hold_the_floors_of_the_code():
    text = (run.ROOT / "benchmarks" / "NOTES.md").read_text().splitlines()
    rows = floors.table(floors.H200, telling=True)
    assert len(rows) > 20 and [line for line in text if line in rows] == rows


@pytest.mark.parametrize("op", BENCHES)
def test_names_of_workloads_differ(op):
    for shapes in (CPU[op], GPU[op]):
        assert len({w.name(op) for w in shapes}) == len(shapes)


def test_both_ranks_are_timed_on_a_gpu():
    for op in set(BENCHES) - set(ELEMENTWISE):
        found = [w.r for w, _ in workloads(op, "cuda", quick=False)]
        assert found.count(64) == found.count(16) > 0
        sixteen = [w for w, _ in workloads(op, "cuda", False, rank=16)]
        assert {w.r for w in sixteen} == {16}
        # what the targets are stated for is timed
        for target in targets.TARGETS:
            for w in sixteen if target.op == op else ():
                assert target.direction in directions(op, w, "cuda")


def test_ratios_and_file(tmp_path):
    row = {"op": "adapter", "workload": "w", "dtype": "float32", "direction": "forward"}
    rows = run.ratios(
        [
            row | {"variant": "eager", "q50_us": 10.0, "floor_us": 2.0},
            row | {"variant": "native", "q50_us": 5.0, "floor_us": 2.0},
            row | {"variant": "clone", "q50_us": 1.0},
        ]
    )
    assert [r["x_eager"] for r in rows] == [1.0, 2.0, 10.0]
    assert rows[1]["of_floor"] == 0.4 and "of_floor" not in rows[2]
    environment = {"device": "d", "commit": "c", "torch": "t", "quick": False}
    found = {"environment": environment, "ceilings": {"copy_bytes_per_s": 1e9}, "rows": rows}
    path = tmp_path / "d.json"
    run.write(path, found)
    assert json.loads(path.read_text()) == found

    linear = found | {"rows": [rows[0] | {"op": "adapter_linear"}]}
    assert [r["op"] for r in run.merged(path, linear)["rows"]] == [
        "adapter", "adapter", "adapter", "adapter_linear"
    ]  # fmt: skip
    again = found | {"rows": [rows[1] | {"q50_us": 4.0}]}
    assert [r["q50_us"] for r in run.merged(path, again)["rows"]] == [10.0, 4.0, 1.0]
    # of another commit: groups that were not measured stay, and say of which they are
    later = again | {"environment": environment | {"commit": "later"}}
    found = run.merged(path, later)["rows"]
    assert [(r["variant"], r["commit"]) for r in found] == [("native", "later")]
    later["rows"] = [rows[0] | {"op": "adapter_linear"}]
    found = run.merged(path, later)["rows"]
    assert [r["commit"] for r in found] == ["c", "c", "c", "later"]
    other = linear | {"environment": environment | {"torch": "another"}}
    assert [r["op"] for r in run.merged(path, other)["rows"]] == ["adapter_linear"]


def test_rows_of_a_killed_run_are_kept(tmp_path):
    environment = {"device": "d", "commit": "c", "torch": "t", "quick": False}
    row = {"op": "adapter", "workload": "w", "dtype": "float32", "direction": "forward"}
    lines = [
        {"environment": environment},
        *(
            {"row": row | {"variant": v, "q50_us": us}, "ceilings": {"copy_bytes_per_s": 1e9}}
            for v, us in (("eager", 4.0), ("native", 2.0))
        ),
    ]
    path, rows = tmp_path / "d.json", tmp_path / "d.rows"
    rows.write_text("\n".join(map(json.dumps, lines)) + '\n{"row": {"op": "ad')
    found = run.collect(path)
    assert found["environment"] == environment
    assert [(r["variant"], r["x_eager"]) for r in found["rows"]] == [
        ("eager", 1.0),
        ("native", 2.0),
    ]
    assert json.loads(path.read_text()) == found and not rows.exists()
    assert run.collect(path) is None and path.exists()
    rows.write_text(json.dumps(lines[0]) + "\n")
    assert run.collect(path) is None and json.loads(path.read_text()) == found


def test_each_row_is_written_as_soon_as_it_is_there(settings, tmp_path):
    settings.rows, settings.ceilings = tmp_path / "rows", measure.ceilings(settings.device)
    runner = harness.Runner(settings)

    class Benchmark:
        def pedantic(self, function, rounds):
            for _ in range(rounds):
                function()

    for entry in harness.entries("adapter", settings)[:2]:
        harness.report(entry, Benchmark(), runner)
    first, second = map(json.loads, settings.rows.read_text().splitlines())
    assert (first["row"]["variant"], first["row"]["direction"]) == ("eager", "forward")
    assert 0 < first["row"]["q20_us"] <= first["row"]["q50_us"] <= first["row"]["q80_us"]
    terms = first["row"]["terms_us"]
    assert first["row"]["floor_us"] == max(terms["bytes"], terms["arithmetic"])
    assert second["row"]["variant"] != "eager" and second["ceilings"] == first["ceilings"]
    (launches,) = first["row"]["counts"].values()
    assert terms["launches"] == pytest.approx(1e6 * launches * first["ceilings"]["launch_s"])
