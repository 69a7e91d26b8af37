"""Which path a shape takes: the rule's shape, the table's word, and where both are asked."""

from __future__ import annotations

import inspect
import itertools
import json

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from a3fta_kernels import ops
from a3fta_kernels.ops.adapter_linear import choice, contract
from a3fta_kernels.ops.adapter_linear.choice import MACHINES, MEASURED, RULE, Choice, Shape, Span
from benchmarks import choose
from benchmarks.workloads import GPU

from ..oracle import Case, run_id, runs

CUDA = torch.device("cuda")
BACKENDS = ("triton", "native")
DTYPES = (torch.bfloat16, torch.float32)
# (K, N) of the models that the benchmarks take their workloads from
WIDTHS = sorted({(w.width, w.n) for w in GPU["adapter_linear"]})
CLASSES = pytest.mark.parametrize("device_class", [*MACHINES, "sm_70"])


@pytest.fixture
def on(monkeypatch):
    """Makes every device one of a class, with a table of the test's own."""

    def put(device_class: str, table: dict | None = None) -> None:
        monkeypatch.setattr(choice, "device_class", lambda device: device_class)
        monkeypatch.setattr(choice, "table", lambda: table or {})
        choice._choose.cache_clear()

    yield put
    choice._choose.cache_clear()


def rule_spans(backend: str, k: int, n: int, rank: int, dtype: torch.dtype) -> list[Span]:
    paths = contract.PATHS
    if backend == "triton" and rank > 64:
        paths = ("skinny", "concat")
    return choice.spans(backend, CUDA, paths, Shape(1, n, k, rank, dtype))


def kernels(backend: str, path: str) -> int:
    return sum(choice.LAUNCHES[backend][path])


@CLASSES
def test_more_rows_never_go_back_to_fewer_launches(device_class, on):
    on(device_class)
    for (k, n), rank, dtype, backend in itertools.product(
        WIDTHS, (1, 16, 64, 128), DTYPES, BACKENDS
    ):
        found = [s.choice.path for s in rule_spans(backend, k, n, rank, dtype)]
        launches = [kernels(backend, path) for path in found]
        assert launches == sorted(launches) and len(set(found)) == len(found), (k, n, rank)


@CLASSES
def test_extremes(device_class, on):
    """A row takes the path with the fewest kernels, a large layer leaves its product to the
    library."""
    on(device_class)
    for (k, n), rank, dtype, backend in itertools.product(WIDTHS, (16, 64), DTYPES, BACKENDS):
        first, *_, last = [*rule_spans(backend, k, n, rank, dtype)] * 2
        fewest = min(kernels(backend, p) for p in contract.PATHS)
        assert kernels(backend, first.choice.path) == fewest and first.choice.source == RULE
        if min(k, n) >= 3072:
            assert last.choice.path == "skinny" and last.rows <= 4096


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", contract.PATHS)
def test_the_cost_grows_with_every_size(path, backend):
    for machine, dtype in itertools.product(MACHINES.values(), DTYPES):
        for workload in GPU["adapter_linear"]:
            shape = Shape(workload.m, workload.n, workload.width, workload.r, dtype)
            cost = choice.seconds(path, backend, machine, shape)
            for name in ("m", "n", "k", "rank"):
                larger = shape._replace(**{name: 2 * getattr(shape, name)})
                assert choice.seconds(path, backend, machine, larger) >= cost > 0


def test_the_rule_at_the_shapes_of_the_models(on):
    """A record of what stands: a change of the rule shows here."""
    on("sm_90")
    found = {
        w.name("adapter_linear"): choice.choose(
            "triton",
            CUDA,
            contract.PATHS,
            Shape(w.m, w.n, w.width, w.r, torch.bfloat16),
        ).path
        for w in GPU["adapter_linear"]
        if not w.residual
    }
    assert found == {
        "16384x640-r64": "concat",
        "1332x1536-r64": "concat",
        "16384x320-r64": "fused",
        "4096x640-r64": "fused",
        "1024x1280-r64": "fused",
        "256x1280-r64": "fused",
        "16384x640-r16": "fused",
        "4096x1280-r16": "fused",
        "16384x320-r16": "fused",
        "16384x1152-r16": "fused",
        "4096x640-r16": "fused",
        "1024x1280-r16": "fused",
        "256x1280-r16": "fused",
        "1332x1536-r16": "fused",
        "512x3072-r16": "fused",
        "4096x1280-r64": "skinny",
        "16384x1536-r64": "skinny",
        "4608x15360to3072-r64": "skinny",
        "4096x3072-r64": "skinny",
        "16384x1152-r64": "skinny",
        "512x3072-r64": "skinny",
        "16384x1536-r16": "skinny",
        "4608x15360to3072-r16": "skinny",
        "4096x3072-r16": "skinny",
    }


ENTRY = {
    "device": "one",
    "choices": [
        ["triton", "bfloat16", 1024, 640, 640, 64, "concat"],
        ["triton", "bfloat16", 8192, 640, 640, 64, "skinny"],
    ],
}


def test_a_measurement_speaks_for_its_neighbours(on):
    on("sm_90", {"sm_90": ENTRY})
    near = Shape(1024, 640, 640, 64, torch.bfloat16)

    def at(**sizes) -> Choice:
        return choice.choose("triton", CUDA, contract.PATHS, near._replace(**sizes))

    measured = Choice("concat", MEASURED)
    assert at() == at(m=512) == at(m=2048, n=1280) == at(k=320, rank=32) == measured
    assert at(m=8000) == at(m=16384) == Choice("skinny", MEASURED)
    for beyond in ({"m": 511}, {"n": 1281}, {"rank": 16}, {"dtype": torch.float32}):
        assert at(**beyond).source == RULE
    assert choice.choose("native", CUDA, contract.PATHS, near).source == RULE
    # a path that the rank forbids is not taken on its neighbour's word
    assert choice.choose("triton", CUDA, ("skinny", "fused"), near).source == RULE


def test_spans_say_where_the_word_of_the_table_ends(on):
    on("sm_90", {"sm_90": ENTRY})
    found = choice.spans("triton", CUDA, contract.PATHS, Shape(1, 640, 640, 64, torch.bfloat16))
    assert found == [
        Span(1, Choice("fused", RULE)),
        Span(512, Choice("concat", MEASURED)),
        Span(2049, Choice("fused", RULE)),
        Span(4096, Choice("skinny", MEASURED)),
        Span(16385, Choice("concat", RULE)),
    ]


def test_one_path_is_no_choice(on):
    on("cpu")
    assert choice.choose("native", torch.device("cpu"), ("skinny",), Shape(
        8, 8, 8, 4, torch.float32
    )) == Choice("skinny", choice.ONLY)  # fmt: skip


def test_no_rows_take_a_path(on):
    for table in ({}, {"sm_90": ENTRY}):
        on("sm_90", table)
        shape = Shape(0, 640, 640, 64, torch.bfloat16)
        assert choice.choose("triton", CUDA, contract.PATHS, shape).source == RULE


class TestTable:
    """choices.json, and benchmarks/choose.py that writes it."""

    def test_the_committed_one(self, monkeypatch):
        committed = json.loads(choice.TABLE.read_text())
        assert choose.render(committed) == choice.TABLE.read_text()
        for device_class, entry in committed.items():
            assert {"device", "date", "commit"} <= entry.keys()
            monkeypatch.setattr(choice, "device_class", lambda device, c=device_class: c)
            for backend, dtype, m, n, k, rank, path in entry["choices"]:
                shape = Shape(m, n, k, rank, getattr(torch, dtype))
                found = choice.choose(backend, CUDA, contract.PATHS, shape)
                assert found == Choice(path, MEASURED)

    def results(self, **about) -> dict:
        def row(workload, variant, us, **other):
            return {
                "op": "adapter_linear", "workload": workload, "dtype": "bfloat16",
                "direction": "forward+backward", "variant": variant, "q50_us": us,
            } | other  # fmt: skip

        environment = {
            "device": "NVIDIA None", "date": "2026-01-02", "commit": "abc", "driver": "1",
            "capability": "sm_90", "quick": False, "torch": "2", "triton": "3", "load": 0.1,
        }  # fmt: skip
        rows = [
            row("16384x640-r64", "eager", 1.0),
            row("16384x640-r64", "linear", 1.0),
            row("16384x640-r64", "triton-skinny", 90.0),
            row("16384x640-r64", "triton-fused", 80.0),
            row("16384x640-r64", "triton-concat", 70.0),
            row("16384x640-r64", "triton-concat", 5.0, direction="forward"),
            row("16384x640-r64", "triton-fused", 5.0, op="adapter"),
            row("16384x640-r64-residual", "triton-fused", 5.0),
            row("16384x640-r64", "native-skinny", 60.0),
            row("16384x640-r64", "native-fused", 65.0),
            row("4608x15360to3072-r64", "triton-fused", 3.0, dtype="float16"),
            row("4608x15360to3072-r64", "triton-concat", 2.0, dtype="float16"),
            row("1024x1280-r64", "triton-skinny", 3.0),
        ]
        return {"environment": environment | about, "rows": rows}

    EXPECTED = (
        ["native", "bfloat16", 16384, 640, 640, 64, "skinny"],
        ["triton", "bfloat16", 16384, 640, 640, 64, "concat"],
        ["triton", "float16", 4608, 3072, 15360, 64, "concat"],
    )

    def test_of_made_up_results(self, tmp_path, on, capsys):
        results, table = tmp_path / "none.json", tmp_path / "choices.json"
        results.write_text(json.dumps(self.results()))
        table.write_text(json.dumps({"sm_80": ENTRY, "sm_90": ENTRY}))
        assert choose.main([str(results), "--table", str(table)]) == 0
        written = json.loads(table.read_text())
        assert written["sm_80"] == ENTRY
        assert written["sm_90"] == {
            "device": "NVIDIA None", "date": "2026-01-02", "commit": "abc", "driver": "1",
            "torch": "2", "triton": "3", "choices": list(self.EXPECTED),
        }  # fmt: skip
        assert choose.render(written) == table.read_text()
        on("sm_90", written)
        shape = Shape(16384, 640, 640, 64, torch.bfloat16)
        assert choice.choose("triton", CUDA, contract.PATHS, shape) == Choice("concat", MEASURED)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"environment": {"quick": True}}, "expected those of a full run"),
            ({"rows": []}, "expected rows of adapter_linear"),
        ],
    )
    def test_of_results_that_do_not_serve(self, tmp_path, capsys, change, message):
        results, table = tmp_path / "none.json", tmp_path / "choices.json"
        results.write_text(json.dumps(self.results() | change))
        table.write_text("{}\n")
        assert choose.main([str(results), "--table", str(table)]) == 1
        assert message in capsys.readouterr().err and table.read_text() == "{}\n"


@pytest.fixture
def taken(monkeypatch):
    """The paths that the native backend is given, all computed by the one it has on the CPU."""
    module = contract.backend_module("native")
    found = []

    def recording(direction, original):
        at = list(inspect.signature(original).parameters).index("path")

        def call(*arguments):
            found.append((direction, arguments[at]))
            return original(*arguments[:at], "skinny", *arguments[at + 1 :])

        return call

    for direction in ("forward", "backward"):
        original = getattr(module, direction)
        monkeypatch.setattr(module, direction, recording(direction, original))
    monkeypatch.setattr(module, "paths", lambda device_type: contract.PATHS)
    return found


NATIVE = [r for r in runs() if r[:2] == ("native", "cpu") and r[2] == torch.float32]


@pytest.mark.parametrize("run", NATIVE, ids=run_id)
class TestWhereItIsAsked:
    @pytest.fixture(autouse=True)
    def by_rows(self, run, taken, monkeypatch):
        def made_up(backend, device, paths, shape):
            return Choice("concat" if shape.m > 20 else "fused", RULE)

        monkeypatch.setattr(choice, "choose", made_up)

    def gradients(self, op, tokens: int) -> None:
        inputs = Case((2, tokens), 16, 4, n=12).inputs(torch.float32, "cpu")
        op(**inputs).sum().backward()

    def test_backward_takes_the_path_of_forward(self, run, taken):
        for tokens, path in ((3, "fused"), (30, "concat")):
            taken.clear()
            self.gradients(ops.adapter_linear, tokens)
            assert taken == [("forward", path), ("backward", path)]

    def test_a_compiled_graph_serves_both(self, run, taken):
        """The path is taken inside the op, by numbers: no guard, no second compilation."""
        counter = CompileCounterWithBackend("aot_eager")
        torch.compiler.reset()
        op = torch.compile(ops.adapter_linear, backend=counter, fullgraph=True, dynamic=True)
        compiled = set()
        for tokens, path in ((3, "fused"), (30, "concat"), (4, "fused")):
            taken.clear()
            self.gradients(op, tokens)
            assert taken == [("forward", path), ("backward", path)]
            compiled.add(counter.frame_count)
        assert len(compiled) == 1 and compiled != {0}
        torch.compiler.reset()


@pytest.mark.parametrize("run", NATIVE, ids=run_id)
def test_the_report_says_which_path(run, on, taken):
    from a3fta_kernels import AdapterConfig, conversion, report
    from a3fta_kernels.adapters import DESIGNS

    on("sm_90", {"sm_90": {"choices": [["native", "float32", 64, 24, 16, 4, "concat"]]}})
    config = AdapterConfig(rank=4)
    layer = conversion.adapt(nn.Linear(16, 24).requires_grad_(False))
    layer.adapters["default"] = DESIGNS[config.design](16, 4, config)
    found = report.describe_layer(layer, "default")
    assert [(s.rows, s.choice.path) for s in found.paths[:3]] == [
        (1, "fused"), (32, "concat"), (129, "fused")
    ]  # fmt: skip
    text = str(report.InjectionReport("default", {"a": found}, {"x": 1}, {}, {}, {}, 1, 1, {}))
    assert (
        "1 x C=16 N=24 R=4, backend native, path fused (by rule), from 32 rows concat (measured), "
        "from 129 rows fused (by rule)" in text
    )


@pytest.mark.parametrize("text", [None, "", "[1]", '{"kernels": {}}'])
def test_files_that_are_no_results(text, tmp_path, capsys):
    path, table = tmp_path / "some.json", tmp_path / "table.json"
    table.write_text("{}\n")
    if text is not None:
        path.write_text(text)
    assert choose.main([str(path), "--table", str(table)]) == 1
    assert capsys.readouterr().err.startswith("choose: some.json: ")
    assert table.read_text() == "{}\n"
