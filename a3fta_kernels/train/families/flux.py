"""Flux.1: a transformer on latents in packs of 2 x 2, by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .family import Row
from .latents import TRANSFORMER_PARTS, LatentFamily, flow

# of the distilled models: what they were taught to draw at 1 is the model without guidance,
# which is what photos without guidance are the target of
_GUIDANCE = 1.0


class Flux(LatentFamily):
    """Takes photos and captions; of a caption the 75 tokens that CLIP reads and 512 of T5's.

    There is no text of no words in guidance: a model that was distilled (dev) is told the number,
    and another (schnell) has none. Noise levels are drawn without the shift by the image's size
    with which the pipeline draws.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    parts = TRANSFORMER_PARTS

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.denoiser: nn.Module = pipe.transformer
        # the transformer counts to a thousand itself
        self.noise = flow(pipe.scheduler, scale=1.0)
        self.resolution = pipe.default_sample_size * self.factor

    @torch.no_grad()
    def encode_text(self, text: str) -> Row:
        found, pooled, _ = self.pipe.encode_prompt(text, device=self.pipe.text_encoder.device)
        return {"prompt_embeds": found[0].cpu(), "pooled_prompt_embeds": pooled[0].cpu()}

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        text = row["prompt_embeds"]
        height, width = (side // 2 for side in noisy.shape[-2:])
        places = torch.zeros(height, width, 3, device=noisy.device)
        places[..., 1] = torch.arange(height, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(width, device=noisy.device)
        found = {
            "hidden_states": pack(noisy.to(text.dtype)), "timestep": time,
            "encoder_hidden_states": text, "pooled_projections": row["pooled_prompt_embeds"],
            "img_ids": places.flatten(0, 1), "txt_ids": places.new_zeros(text.shape[1], 3),
        }  # fmt: skip
        if self.pipe.transformer.config.guidance_embeds:
            found["guidance"] = torch.full_like(time, _GUIDANCE)
        return found

    def predict(
        self, model: nn.Module, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        return unpack(super().predict(model, noisy, time, row), height, width)

    @torch.no_grad()
    def draw(
        self, texts: Sequence[Row], empty: Row, size: tuple[int, int], steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Image.Image]:  # fmt: skip
        tokens = self.call(self.told(texts), size, steps, guidance, seeds)
        return self.decode(unpack(tokens, size[1] // self.factor, size[0] // self.factor))


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) as the transformer's tokens, (B, h/2 * w/2, 4 C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens as latents of that height and width."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)
