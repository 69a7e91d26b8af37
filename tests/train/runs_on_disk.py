"""Small pipelines and photos on disk, and settings that train on them in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from a3fta_kernels.train import Settings
from tests import models


def write_unet(folder: Path, **options: Any) -> None:
    """A DDPM pipeline on 16 x 16 RGB."""
    torch.manual_seed(0)
    unet = models.unet2d(in_channels=3, out_channels=3, **options)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pipeline")


def write_photos(folder: Path, count: int, side: int = 24, seed: int = 0) -> None:
    """Photos of blocks of colour, no two alike, some wider than high."""
    generator = np.random.default_rng(seed)
    (folder / "photos").mkdir()
    for i in range(count):
        small = generator.integers(0, 256, (4, 4 + 2 * (i % 2), 3), dtype=np.uint8)
        size = (side * small.shape[1] // 4, side)
        Image.fromarray(small).resize(size, 0).save(folder / "photos" / f"{i}.png")


def settings(folder: Path, **changes: Any) -> Settings:
    """A run of 6 steps with an evaluation, a sampling and a checkpoint every 2."""
    values: dict[str, Any] = {
        "model": str(folder / "pipeline"), "data": str(folder / "photos"),
        "output": str(folder / "run"), "rank": 4, "steps": 6, "batch": 2, "warmup": 0,
        "learning_rate": 1e-2, "evaluate_every": 2, "bins": 2, "draws": 1, "checkpoint_every": 2,
        "sample_every": 3, "sample_count": 2, "sample_steps": 2, "min_side": 8,
    }  # fmt: skip
    return Settings(**(values | changes))
