"""The pre-trained base, and drawing samples from a model.

The checkpoint is made by scripts/pretrain_demo_base.py and read through safetensors alone; the
configuration of the U-Net and of the noise schedule are JSON in its metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CommandError

CHECKPOINT = Path(__file__).resolve().parents[2] / "data" / "demo_base.safetensors"


@dataclass(frozen=True)
class Base:
    """Builds fresh copies of the base model, and its noise schedulers."""

    tensors: dict[str, Tensor]
    unet: dict[str, Any]
    schedule: dict[str, Any]

    def model(self) -> nn.Module:
        from diffusers import UNet2DModel

        model: Any = UNet2DModel(**self.unet)
        model.load_state_dict({k: v.float() for k, v in self.tensors.items()})
        return model

    def noise(self) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(**self.schedule)

    def sampler(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler(**self.schedule)


def load(path: Path = CHECKPOINT) -> Base:
    """Raises CommandError where the file is missing or is not a base of this demo."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CommandError(f"the demo's base is missing: {path}; reinstall the package")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CommandError(f"{path} is damaged: {error}") from error
    if not {"unet", "scheduler"} <= metadata.keys():
        raise CommandError(f"{path} is not a demo base: no configuration in its metadata")
    return Base(tensors, json.loads(metadata["unet"]), json.loads(metadata["scheduler"]))


@torch.no_grad()
def sample(
    model: Any, sampler: Any, labels: Tensor, seed: int, steps: int, chunk: int = 100
) -> Tensor:
    """One image per label, (N, 1, 8, 8) in -1..1, by DDIM from noise fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    size = int(model.config.sample_size)
    noise = torch.randn(len(labels), 1, size, size, generator=generator)
    model.eval()
    sampler.set_timesteps(steps)
    done = []
    for x, y in zip(noise.split(chunk), labels.split(chunk), strict=True):
        for t in sampler.timesteps:
            velocity = model(x, t, class_labels=y).sample
            x = sampler.step(velocity, t, x).prev_sample
        done.append(x.clamp(-1, 1))
    return torch.cat(done)
