"""Stable Diffusion 3 and 3.5: a transformer on latents, by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import TrainingError
from .family import Crop, Row
from .latents import TRANSFORMER_PARTS, LatentFamily, flow


class StableDiffusion3(LatentFamily):
    """Takes photos and captions; of a caption the 75 tokens that CLIP reads and 256 of T5's.

    The pipeline may be without T5 (text_encoder_3): its tokens are zeros then, as they are when
    such a pipeline draws. The sides of photos have a limit, as the model knows so many positions.
    """

    name = "stable_diffusion_3"
    pipelines = ("StableDiffusion3Pipeline",)
    parts = TRANSFORMER_PARTS

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.denoiser: nn.Module = pipe.transformer
        self.noise = flow(pipe.scheduler, scale=pipe.scheduler.config.num_train_timesteps)
        config = pipe.transformer.config
        self.resolution = config.sample_size * self.factor
        self.multiple = config.patch_size * self.factor
        self.largest = config.pos_embed_max_size * self.multiple

    @torch.no_grad()
    def encode_text(self, text: str) -> Row:
        found, _, pooled, _ = self.pipe.encode_prompt(
            text, None, None, device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
        )  # fmt: skip
        return {"prompt_embeds": found[0].cpu(), "pooled_prompt_embeds": pooled[0].cpu()}

    def encode_photo(self, pixels: Tensor, crop: Crop) -> Row:
        self._check(crop.size)
        return super().encode_photo(pixels, crop)

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        text = row["prompt_embeds"]
        return {
            "hidden_states": noisy.to(text.dtype), "timestep": time,
            "encoder_hidden_states": text, "pooled_projections": row["pooled_prompt_embeds"],
        }  # fmt: skip

    def draw(
        self, texts: Sequence[Row], empty: Row, size: tuple[int, int], steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Image.Image]:  # fmt: skip
        self._check(size)
        return super().draw(texts, empty, size, steps, guidance, seeds)

    def _check(self, size: tuple[int, int]) -> None:
        if max(size) > self.largest:
            raise TrainingError(
                f"resolution: expected images with sides of at most {self.largest} for this "
                f"model, got {size[0]} x {size[1]}"
            )
