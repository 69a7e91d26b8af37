"""Pre-trained bases: a small U-Net with attention at every level, made once and kept in a file.

Weights are an exponential average, stored in float16 with the configuration of the model and of
its schedule in the file's metadata; every run starts from what the file holds.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..train.errors import TrainingError

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": True,
}


@dataclass(frozen=True)
class Base:
    """What a file holds."""

    tensors: dict[str, Tensor]
    unet: dict[str, Any]
    schedule: dict[str, Any]

    def pipeline(self) -> Any:
        from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

        model: Any = UNet2DModel(**self.unet)
        model.load_state_dict({name: value.float() for name, value in self.tensors.items()})
        return DDPMPipeline(model, DDIMScheduler(**self.schedule))


def architecture(side: int, channels: tuple[int, ...], classes: int | None) -> dict[str, Any]:
    """Of a UNet2DModel on one channel, attention at every level."""
    return {
        "sample_size": side,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D",) * len(channels),
        "up_block_types": ("AttnUpBlock2D",) * len(channels),
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "num_class_embeds": classes,
    }


def pretrain(
    unet: dict[str, Any],
    schedule: dict[str, Any],
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    seed: int,
    log_every: int = 200,
    device: str = "cpu",
) -> nn.Module:
    """The average of a model trained on what `batch(generator)` draws, on the CPU: images,
    classes."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = UNet2DModel(**unet)
    model.to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    scheduler: Any = DDPMScheduler(**schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    warmup = min(200, steps)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(i / steps, 1.0)))),
    )
    start, recent = time.monotonic(), torch.zeros((), device=device)
    for step in range(1, steps + 1):
        x, y = batch(generator)
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(schedule["num_train_timesteps"], (len(x),), generator=generator)
        noisy, target = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        told = {"class_labels": y.to(device)} if unet["num_class_embeds"] else {}
        prediction = model(noisy.to(device), t.to(device), **told).sample
        loss = F.mse_loss(prediction, target.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        keep = min(0.999, step / (step + 10))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        recent += loss.detach()
        if step % log_every == 0 or step == steps:
            done = (step - 1) % log_every + 1
            elapsed = time.monotonic() - start
            print(f"step {step}/{steps}  loss {recent / done:.4f}  {elapsed:.0f} s", flush=True)
            recent.zero_()
    return average


def save(
    model: nn.Module, path: Path, unet: dict[str, Any], schedule: dict[str, Any],
    training: dict[str, int | float],
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    tensors = {k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    metadata = {
        "unet": json.dumps(unet),
        "scheduler": json.dumps(schedule),
        "training": json.dumps(training),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # under another name first: a cut-off write leaves no half of a base
    part = path.with_suffix(".part")
    save_file(tensors, str(part), metadata=metadata)
    part.replace(path)


def load(path: Path) -> Base:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TrainingError(f"{path} is damaged: {error}; remove it to make it anew") from error
    if not {"unet", "scheduler"} <= metadata.keys():
        raise TrainingError(f"{path} is no base: no configuration in its metadata")
    return Base(tensors, json.loads(metadata["unet"]), json.loads(metadata["scheduler"]))
