"""Stable Diffusion 1.x and 2.x, and SDXL: a U-Net on latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..noise import Diffusion
from .family import Crop, Row
from .latents import LatentFamily


class StableDiffusion(LatentFamily):
    """Takes photos and captions; of a caption the 75 tokens that CLIP reads."""

    name = "stable_diffusion"
    pipelines = ("StableDiffusionPipeline",)
    parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.denoiser: nn.Module = pipe.unet
        self.noise = Diffusion(pipe.scheduler.config)
        self.resolution = pipe.unet.config.sample_size * self.factor
        # the U-Net halves what it sees once per block but the last
        self.multiple = self.factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_text(self, text: str) -> Row:
        found, _ = self.pipe.encode_prompt(text, self.pipe.text_encoder.device, 1, False)
        return {"prompt_embeds": found[0].cpu()}

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        text = row["prompt_embeds"]
        return {"sample": noisy.to(text.dtype), "timestep": time, "encoder_hidden_states": text}


class StableDiffusionXL(StableDiffusion):
    """Takes captions as SD does, and photos with their size and how they were cut.

    What the text of no words is to it, its `force_zeros_for_empty_prompt` says.
    """

    name = "stable_diffusion_xl"
    pipelines = ("StableDiffusionXLPipeline",)
    parts = (
        "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "scheduler"
    )  # fmt: skip

    @torch.no_grad()
    def encode_text(self, text: str) -> Row:
        pipe = self.pipe
        if not text and pipe.config.force_zeros_for_empty_prompt:
            filled = self.encode_text(" ")
            return {name: torch.zeros_like(tensor) for name, tensor in filled.items()}
        found, _, pooled, _ = pipe.encode_prompt(
            text, device=pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": found[0].cpu(), "pooled_prompt_embeds": pooled[0].cpu()}

    def encode_photo(self, pixels: Tensor, crop: Crop) -> Row:
        (width, height), (w, h) = crop.original, crop.size
        told = [height, width, crop.top, crop.left, h, w]
        return super().encode_photo(pixels, crop) | {"time_ids": torch.tensor(told)}

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        pooled = row["pooled_prompt_embeds"]
        # bf16 has no 3022, which a photo may measure
        added = {"text_embeds": pooled, "time_ids": row["time_ids"].float()}
        return super().inputs(noisy, time, row) | {"added_cond_kwargs": added}
