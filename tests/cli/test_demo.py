"""`a3fta demo` end to end, on a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import a3fta_kernels as a3fta
from a3fta_kernels import cli
from a3fta_kernels.cli.demo import base, report


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "outputs"
    assert cli.main(["demo", "--quick", "--seed", "5", "--rank", "8", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def document(outputs: Path) -> dict:
    return json.loads((outputs / "demo.json").read_text())


def test_it_writes_what_it_promises(outputs):
    found = {str(p.relative_to(outputs)) for p in outputs.rglob("*") if p.is_file()}
    assert found == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "demo.json",
        "demo.md",
        "demo.png",
    }


def test_the_picture_is_a_large_light_picture(outputs):
    from matplotlib.image import imread

    picture = imread(outputs / "demo.png")
    assert picture.shape[0] > 1200 and picture.shape[1] > 1600
    assert picture[:5, :, :3].min() > 0.9


def test_every_row_and_column_is_filled(document):
    rows = {row["key"]: row for row in document["rows"]}
    assert list(rows) == ["base", "a3fta", "full-best", "full-last", "lora", "real"]
    for key in ("a3fta", "full-best", "full-last", "lora"):
        assert all(rows[key][name] is not None for name in (*report.COLUMNS, "step")), key
    assert all(document["facts"].values())
    assert rows["real"]["trainable"] is None
    assert rows["full-best"]["trainable"] > 20 * rows["a3fta"]["trainable"]
    assert rows["a3fta"]["saved_bytes"] < rows["lora"]["saved_bytes"]


def test_rows_agree_with_the_curves(document):
    losses, rows = document["losses"], {row["key"]: row for row in document["rows"]}
    assert set(losses) == {"a3fta", "full", "lora"}
    assert len({tuple(curve["steps"]) for curve in losses.values()}) == 1
    starts = [(curve["train"][0], curve["heldout"][0]) for curve in losses.values()]
    # nothing trained yet: every method starts where the base is
    assert starts[1] == pytest.approx(starts[0], rel=1e-5)
    assert starts[2] == pytest.approx(starts[0], rel=1e-5)
    assert rows["a3fta"]["heldout_loss"] == losses["a3fta"]["heldout"][-1]
    assert rows["full-last"]["heldout_loss"] == losses["full"]["heldout"][-1]
    full = losses["full"]
    best = full["selection"].index(min(full["selection"]))
    assert rows["full-best"]["step"] == full["steps"][best]
    assert rows["full-best"]["heldout_loss"] == full["heldout"][best]
    for curve in losses.values():
        assert curve["train"][-1] < curve["train"][0]


def test_the_table_in_markdown_is_the_one_in_json(outputs, document):
    lines = (outputs / "demo.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    heads = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert heads == [heading for heading, _ in report.COLUMNS.values()]
    rows = [report.Row(**row) for row in document["rows"]]
    assert [line.strip("| ").split(" | ") for line in table[2:]] == [report.cells(r) for r in rows]
    assert document["caption"] in lines


def test_the_adapter_loads_and_draws_the_same_samples(outputs, document):
    facts = document["facts"]
    start = base.load()
    labels = torch.arange(10)

    def draw(model):
        return base.sample(model, start.sampler(), labels, facts["seed"], 3)

    first, second, stock = start.model(), start.model(), start.model()
    for model in (first, second):
        a3fta.load_adapter(model, outputs / "adapter")
    assert torch.equal(draw(first), draw(second))
    assert not torch.equal(draw(first), draw(stock))
    trained = sum(p.numel() for n, p in first.named_parameters() if ".adapters." in n)
    assert trained == next(r for r in document["rows"] if r["key"] == "a3fta")["trainable"]


def test_the_saved_adapter_gives_the_loss_in_the_table(outputs, document):
    from a3fta_kernels.cli.demo import data, training

    start, digits = base.load(), data.load(document["facts"]["seed"])
    model = start.model()
    a3fta.load_adapter(model, outputs / "adapter")
    judge = training.FixedLoss(
        digits.heldout, start.noise(), document["facts"]["seed"] + 3, repeats=2
    )
    written = document["losses"]["a3fta"]["heldout"]
    assert judge(model) == pytest.approx(written[-1], rel=1e-5)
    assert judge(model) < written[0]


def test_a_backend_that_cannot_run_is_an_error_with_its_reason(tmp_path, capsys):
    from a3fta_kernels.backends import why_not

    reason = why_not("triton", torch.device("cpu"), torch.float32)
    if reason is None:
        pytest.skip("Triton runs on the CPU here, in its interpreter")
    folder = tmp_path / "out"
    assert cli.main(["demo", "--quick", "--backend", "triton", "--output", str(folder)]) == 1
    assert reason in capsys.readouterr().err
    assert not folder.exists()
