"""The script that makes the demo's base."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from a3fta_kernels.cli.demo import base
from a3fta_kernels.study.glyphs import SCRIPTS

FONTS = SCRIPTS["digits"].fonts
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_demo_base.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_demo_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def glyphs(script):
    return script.glyphs()


def test_every_font_gives_ten_different_digits(script, glyphs):
    images, labels = glyphs
    assert len(images) == 10 * len(FONTS)
    assert labels.tolist() == list(range(10)) * len(FONTS)
    for font in images.split(10):
        assert len({digit.numpy().tobytes() for digit in font}) == 10


def test_glyphs_fill_the_frame_from_top_to_bottom(script, glyphs):
    images, _ = glyphs
    rows = images.amax((1, 3)) > 0.2
    margin = (script.FRAME.canvas - script.FRAME.height) // 2
    assert not rows[:, :margin].any() and not rows[:, -margin:].any()
    assert rows[:, margin : margin + 3].any(1).all()
    assert rows[:, -margin - 3 : -margin].any(1).all()


def test_batches_look_like_the_target(script, glyphs):
    pytest.importorskip("sklearn")
    from a3fta_kernels.cli.demo import data

    x, y = script.batch(*glyphs, 1000, torch.Generator().manual_seed(0))
    real = data.load(0).reference.x
    assert x.shape == (1000, 1, 8, 8) and set(y.tolist()) == set(range(10))
    levels = (x + 1) * 8
    assert torch.equal(levels, levels.round()) and levels.min() == 0 and levels.max() == 16
    # the same frame: ink in the outer rows, next to none in the outer columns, as much in all
    assert abs(x.mean() - real.mean()) < 0.1
    for sample in (x, real):
        ink = (sample + 1).mean((0, 1))
        assert ink[[0, 7]].mean() > 3 * ink[:, [0, 7]].mean()


def test_batches_follow_the_seed(script, glyphs):
    def draw(seed):
        return script.batch(*glyphs, 16, torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(1), draw(1), strict=True))
    assert not torch.equal(draw(1)[0], draw(2)[0])


def test_a_few_steps_train_save_and_load(script, tmp_path, capsys):
    from safetensors.torch import load_file

    def make(name):
        path = tmp_path / name / "base.safetensors"
        script.main(["--steps", "4", "--batch-size", "8", "--log-every", "2",
                     "--output", str(path)])  # fmt: skip
        return path

    one, two = make("one"), make("two")
    assert set(load_file(one)) == set(load_file(two)) == set(load_file(base.CHECKPOINT))
    assert all(torch.equal(value, load_file(two)[name]) for name, value in load_file(one).items())
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(printed) == 4
    assert all(math.isfinite(float(line.split()[3])) for line in printed)
    start = base.load(one)
    sample = base.sample(start.model(), start.sampler(), torch.arange(3), seed=0, steps=2)
    assert sample.shape == (3, 1, 8, 8) and sample.isfinite().all()


def test_the_shipped_base_is_this_scripts(script):
    start = base.load()
    assert start.unet == json.loads(json.dumps(script.MODEL))
    assert start.schedule == json.loads(json.dumps(script.SCHEDULER))


def test_the_shipped_base_knows_printed_digits(script, glyphs):
    """Its denoising loss on fresh glyphs is far below an untrained model's, which is about 1."""
    start = base.load()
    x, y = script.batch(*glyphs, 100, torch.Generator().manual_seed(99))
    from a3fta_kernels.cli.demo.data import Digits
    from a3fta_kernels.cli.demo.training import FixedLoss

    loss = FixedLoss(Digits(x, y), start.noise(), seed=0)
    right = loss(start.model())
    loss.labels = (loss.labels + 1) % 10
    wrong = loss(start.model())
    assert right < 0.3
    assert wrong > 1.2 * right
