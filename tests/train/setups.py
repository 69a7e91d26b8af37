"""Models of milliseconds, and runs of them without a disk's pipeline or photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from a3fta_kernels.adapters import AdapterConfig
from a3fta_kernels.inject import inject
from a3fta_kernels.train.families import Family, Row
from a3fta_kernels.train.families.unconditional import Unconditional
from a3fta_kernels.train.noise import Diffusion
from a3fta_kernels.train.settings import Settings
from a3fta_kernels.train.trainer import Material, Run, Trainer
from tests import models

SIDE, WIDTH = 8, 8
_SMALL = {"block_out_channels": (8, 8), "norm_num_groups": 2, "sample_size": SIDE}


def settings(**changes: Any) -> Settings:
    """No warmup and no decay: a step moves by its gradient alone."""
    plain = {
        "model": "m", "data": "d", "rank": 2, "steps": 4, "batch": 2, "warmup": 0,
        "weight_decay": 0.0, "learning_rate": 1e-2, "bins": 2, "draws": 1, "evaluate_every": 2,
        "checkpoint_every": 1, "checkpoint_limit": 0, "sample_every": 0,
    }  # fmt: skip
    return Settings(**(plain | changes))


def pixels(dtype: torch.dtype = torch.float32, **options: Any) -> Unconditional:
    """An unconditional family on RGB of 8 x 8."""
    torch.manual_seed(0)
    unet = models.unet2d(in_channels=3, out_channels=3, **_SMALL, **options)
    if dtype != torch.float32:
        unet.to(dtype)
    return Unconditional(DDPMPipeline(unet, DDPMScheduler()))


class Told(Family):
    """A U-Net that is told an embedding, on latents with a spread."""

    name = "told"
    pipelines = ()

    def __init__(self) -> None:
        super().__init__(None)
        torch.manual_seed(0)
        self.denoiser = models.sd15(**_SMALL, cross_attention_dim=WIDTH, attention_head_dim=4)
        self.noise = Diffusion(DDPMScheduler().config)
        self.multiple, self.resolution = 2, SIDE

    def encode_photo(self, pixels: Tensor, crop: Any) -> Row:
        return {"mean": pixels, "std": torch.ones_like(pixels)}

    def encode_text(self, text: str) -> Row:
        return {"prompt_embeds": torch.full((3, WIDTH), float(len(text)))}

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        text = row["prompt_embeds"]
        return {"sample": noisy, "timestep": time, "encoder_hidden_states": text}

    def draw(self, *args: Any) -> Any:
        raise NotImplementedError


def photo(i: int, height: int = SIDE, width: int = SIDE, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(100 + i)
    return torch.rand(channels, height, width, generator=generator) * 2 - 1


def material(rows: list[Row], **changes: Any) -> Material:
    plain: dict[str, Any] = {
        "mirrored": (), "digests": [f"digest {i}" for i in range(len(rows))],
        "names": [f"{i}.png" for i in range(len(rows))], "empty": {}, "prior_text": {}, "prior": (),
    }  # fmt: skip
    return Material(rows=rows, **(plain | changes))


def make_run(
    folder: Path, accelerator: Any, family: Family | None = None, photos: int = 4,
    heldout: tuple[int, ...] = (), rows: list[Row] | None = None,
    facts: dict[str, Any] | None = None, **changes: Any,
) -> Run:  # fmt: skip
    """A run whose denoiser has an adapter that was not trained; `changes` are settings."""
    family = family or pixels()
    chosen = settings(**changes)
    torch.manual_seed(1)
    config = AdapterConfig(
        rank=chosen.rank, design=chosen.design, dropout=chosen.dropout, train=chosen.train
    )
    inject(family.denoiser, config)
    rows = rows or [{"mean": photo(i)} for i in range(photos)]
    train = tuple(i for i in range(len(rows)) if i not in heldout)
    return Run(
        chosen, family, accelerator, material(rows, **(facts or {})), folder, train, heldout, "run"
    )


def watch(family: Family) -> SimpleNamespace:
    """Records what noise is added to what, and every prediction with its inputs."""
    seen = SimpleNamespace(noised=[], predicted=[])
    noisy, predict = family.noise.noisy, family.predict

    def watched_noisy(x, noise, level):
        seen.noised.append((x, noise, level))
        return noisy(x, noise, level)

    def watched_predict(model, x, time, row):
        found = predict(model, x, time, row)
        seen.predicted.append(SimpleNamespace(x=x, time=time, row=row, found=found))
        return found

    family.noise.noisy, family.predict = watched_noisy, watched_predict
    return seen


def held(trainer: Trainer) -> Trainer:
    """Steps leave gradients where they are, and parameters as they were."""
    trainer.optimizer.step = trainer.optimizer.zero_grad = trainer.rate.step = lambda: None
    return trainer


def gradients(trainer: Trainer) -> list[Tensor]:
    return [p.grad.clone() for p in trainer.parameters]


def values(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def norm(tensors: list[Tensor]) -> float:
    return torch.stack([t.double().norm() for t in tensors]).norm().item()


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
