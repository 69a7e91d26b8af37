"""UNet2DModel on pixels: without a condition, or with classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import TrainingError
from ..noise import Diffusion
from .family import Crop, Family, Row, stack, to_images


class Unconditional(Family):
    """Takes photos, of one channel or three, and a class for each where the model has classes."""

    name = "unconditional"
    pipelines = ("DDPMPipeline", "DDIMPipeline")
    captions = False

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        config = pipe.unet.config
        # of a kind "timestep" the model does not say how many there are; its config may
        kinds = (None, "timestep") if config.num_class_embeds else (None,)
        if config.class_embed_type not in kinds or not isinstance(
            config.sample_size, (int, list, tuple)
        ):
            raise TrainingError(
                f"the model: expected a UNet2DModel of num_class_embeds classes or none, and a "
                f"sample_size, got class_embed_type={config.class_embed_type!r}, "
                f"num_class_embeds={config.num_class_embeds}, sample_size={config.sample_size!r}"
            )
        self.denoiser = pipe.unet
        self.noise = Diffusion(pipe.scheduler.config)
        self.channels = config.in_channels
        if self.channels not in (1, 3):
            raise TrainingError(f"the model: expected 1 or 3 channels, got {self.channels}")
        self.classes = config.num_class_embeds
        size = config.sample_size
        self.resolution = size if isinstance(size, int) else min(size)
        self.multiple = 2 ** (len(config.block_out_channels) - 1)

    def encode_photo(self, pixels: Tensor, crop: Crop) -> Row:
        return {"mean": pixels}

    def encode_text(self, text: str) -> Row:
        return {}

    def clean(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        return batch["mean"]

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        dtype = next(self.denoiser.parameters()).dtype
        labels = {"class_labels": row["label"]} if self.classes else {}
        return {"sample": noisy.to(dtype), "timestep": time, **labels}

    @torch.no_grad()
    def draw(
        self, texts: Sequence[Row], empty: Row, size: tuple[int, int], steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Image.Image]:  # fmt: skip
        """By DDIM, without guidance: these models have no empty condition."""
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        device = next(self.denoiser.parameters()).device
        width, height = size
        shape = (self.channels, height, width)
        starts = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        x = torch.stack(starts).to(device)
        row = {name: value.to(device) for name, value in stack(texts).items()}
        for t in scheduler.timesteps:
            prediction = self.predict(self.denoiser, x, t.to(device).expand(len(x)), row)
            x = scheduler.step(prediction.float(), t, x).prev_sample
        return to_images(x)
