"""Whole runs of every family: what is left, what can be loaded, and that memory levels agree."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import a3fta_kernels as a3fta
from a3fta_kernels.train import (
    Listener,
    Settings,
    dataset,
    families,
    finetune,
    monitor,
    records,
)
from tests.train.families import common

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
# the family of each pipeline that runs whole
ROWS = {
    "unconditional": "unconditional",
    "class_conditional": "unconditional",
    "sd": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "sd3": "stable_diffusion_3",
    "flux": "flux",
    "z_image": "z_image",
}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a small pipeline, and photos for it in two shapes and two classes."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            common.PIPELINES[name](made[name])
            write_photos(made[name] / "photos")
        return made[name]

    return folder


def write_photos(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(6):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        small = generator.integers(0, 256, (4, 6 if i < 3 else 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((small.shape[1] * 12, 48), Image.Resampling.NEAREST)
        image.save(folder / str(i % 2) / f"{i}.png")


def settings(base: Path, output: Path, name: str, **changes: Any) -> Settings:
    """4 steps. Models of a text see squares of 32 and 40 x 24 or so, those of pixels half of it."""
    values: dict[str, Any] = {
        "model": str(base / "pipeline"), "data": str(base / "photos"), "output": str(output),
        "rank": 4, "steps": 4, "batch": 2, "warmup": 0,
        "learning_rate": 1e-2, "evaluate_every": 2, "bins": 2, "draws": 1, "checkpoint_every": 2,
        "sample_every": 4, "sample_count": 2, "sample_steps": 2, "min_side": 8, "choose": "last",
        "heldout": "holdout", "heldout_count": 2, "noise_offset": 0.05, "flip": True,
    }  # fmt: skip
    if ROWS[name] != "unconditional":
        values |= {"resolution": 32, "trigger": "a photo of sks", "caption_dropout": 0.3}
    return Settings(**(values | changes))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_family_has_a_row():
    assert set(ROWS.values()) == {family.name for family in families.FAMILIES}


# in bf16 a U-Net and a transformer: the rest differs in what it trains, not in how
@pytest.mark.parametrize(
    ("name", "precision"), [(name, "no") for name in ROWS] + [("sd", "bf16"), ("flux", "bf16")]
)
def test_a_run_ends_with_an_adapter_that_loads(base, tmp_path, name, precision):
    run = tmp_path / "run"
    asked = settings(base(name), run, name, mixed_precision=precision)
    adapter = finetune(asked)

    log = records.read(run, records.LOG)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(math.isfinite(e["loss"]) and e["grad_norm"] > 0 for e in log)
    before, *_, after = records.read(run, records.EVALUATIONS)
    assert before["step"] == 0 and after["step"] == 4
    assert math.isfinite(after["heldout_mean"]) and after["heldout"] != before["heldout"]
    assert after["train_mean"] < before["train_mean"]
    sizes = {tuple(photo["bucket"]) for photo in read_json(run / "photos.json")["used"]}
    assert len(sizes) == 2 and any(width > height for width, height in sizes)
    summary = read_json(run / "summary.json")
    assert summary["family"] == ROWS[name] and summary["parameters"] > 0
    assert (run / "report.html").stat().st_size > 1000
    assert (adapter / "README.md").read_text().startswith("---")
    samples = records.read(run, records.SAMPLES)
    assert [entry["step"] for entry in samples] == [0, 4]
    first, last = ([(run / file).read_bytes() for file in e["files"]] for e in samples)
    assert len(first) == len(last) == 2 and first != last

    family = families.load(asked.model, DTYPES[precision])
    close = {"rel": 1e-5 if precision == "no" else 1e-3}
    assert heldout_loss(family, asked) == pytest.approx(before["heldout"], **close)
    a3fta.load_adapter(family.denoiser, adapter)
    again = heldout_loss(family, asked)
    assert again == pytest.approx(after["heldout"], **close)
    assert again != pytest.approx(before["heldout"], **close)


def heldout_loss(family: Any, asked: Settings) -> list[float]:
    """What the run recorded, of a pipeline that is fresh from its folder."""
    data = dataset.gather(asked, family)
    material, _ = dataset.encode(asked, family, data, Path(asked.output), Listener())
    questions = monitor.questions(
        data.split.heldout, material.digests, asked.bins, asked.draws, asked.seed
    )
    family.denoiser.eval()
    return monitor.losses(
        family, material.rows, questions, asked.bins, asked.batch, torch.device("cpu")
    )


MEMORY = {
    "exact": {"lean": "exact"},
    "recompute": {"lean": "recompute"},
    "block": {"lean": "block"},
    "checkpointing": {"lean": "off", "gradient_checkpointing": True},
    "exact-checkpointing": {"lean": "exact", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", ["unconditional", "sd", "sd3", "flux", "z_image"])
def test_levels_of_memory_train_the_same(base, tmp_path, name, monkeypatch):
    """The loss of the third step, and its gradient, hang on every gradient before it."""
    for part in ("write_report", "write_card"):
        monkeypatch.setattr(f"a3fta_kernels.train.closing.{part}", lambda *told: None)

    def train(title: str, **changes: Any) -> list[tuple[float, float]]:
        finetune(
            settings(
                base(name), tmp_path / title, name, steps=3, evaluate_every=0, sample_every=0,
                heldout="none", heldout_count=None, checkpoint_every=100, learning_rate=1e-3,
                **changes,
            )
        )  # fmt: skip
        log = records.read(tmp_path / title, records.LOG)
        return [(entry["loss"], entry["grad_norm"]) for entry in log]

    stock = train("off", lean="off")
    assert len({loss for loss, _ in stock}) == 3
    for title, changes in MEMORY.items():
        assert train(title, **changes) == [pytest.approx(e, rel=1e-5) for e in stock], title
