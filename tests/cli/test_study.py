"""`a3fta study` from the command line: a tiny pipeline, a folder of photos, 60 steps."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import numpy as np
from PIL import Image

from a3fta_kernels.cli import main
from a3fta_kernels.study.table import owned
from tests.study import tiny


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own")
    tiny.pipeline().save_pretrained(path / "pipeline")
    draw = np.random.default_rng(0)
    for i in range(40):
        place = path / "photos" / ("even", "odd")[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(place)
    return path


def study(own, folder, *more):
    return main([
        "study", "--model", str(own / "pipeline"), "--images", str(own / "photos"),
        "--folder", str(folder), "--processes", "1", "--methods", "full", "gelu", "--k", "6",
        "--seeds", "0", "--checkpoints", "20", "60", "--batch", "4", "--samples", "12",
        "--sample-steps", "2", "--folds", "2", *more,
    ])  # fmt: skip


def test_two_methods_and_sixty_steps(own, tmp_path, capsys):
    rates = ("--rates", "full=1e-3", "gelu=1e-2")
    run = (*rates, "--only", "run")
    folder = tmp_path / "a"
    assert study(own, folder, *run, "--limit", "1") == 0
    lines = (folder / "runs.csv").read_text().splitlines()
    assert len(lines) == 2 and ",base,6,0," in lines[1]
    assert study(own, folder, *run) == 0
    assert "run gelu 6 0 0.01: 2 of 2" in capsys.readouterr().out
    # a report alone is drawn while a study goes on, and nothing else is done then
    with owned(folder):
        assert study(own, folder, "--only", "report", "--report", str(tmp_path / "page.md")) == 0
        assert study(own, folder, *run) == 1
    assert "is in use by another study" in capsys.readouterr().err
    text = (tmp_path / "page.md").read_text()
    assert "**3 of the plan's 3 runs are in**" in text and "**too few runs** at this scale" in text
    assert (folder / "headline.png").exists() and (folder / "grid.png").exists()
    # another plan, and rates that are not those of the runs
    assert study(own, folder, *run, "--guidance", "2") == 1
    assert "runs.csv: line 2 is of plan" in capsys.readouterr().err
    assert study(own, folder, "--rates", "full=1e-2", "gelu=1e-2") == 1
    assert "full, k 6, seed 0 was trained at 0.001, the rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--methods", "lorra"], "method: expected one of base, full"),
        (["--rates", "lorra=1"], "method: expected one of base, full"),
        (["--rates", "base=1"], "rates: base is not trained"),
        (["--k", "20", "20"], "k: expected each once, got 20 20"),
        (["--pair", "klingon"], "pair: expected one of digits"),
        (["--contender", "rank-8"], "contender: expected one of full"),
        (["--model", "m"], "--model and --images: expected both or neither"),
        (["--device", "cuda"], "--device: expected cpu where PyTorch finds no GPU, got cuda"),
        (["--seeds", "1000"], "tuning_seeds: expected seeds that no run has"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(arguments, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["study", "--folder", str(tmp_path / "new"), *arguments]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["full", "full=x", "full=nan", "full=inf", "full=0", "full=-1"])
def test_a_rate_is_a_name_and_a_number_above_0(text, capsys):
    with pytest.raises(SystemExit):
        main(["study", "--rates", text])
    assert f"expected NAME=RATE, a rate above 0, got {text}" in capsys.readouterr().err
