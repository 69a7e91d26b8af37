"""Z-Image: a transformer on latents and a text side by side, by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .family import Row
from .latents import LatentFamily, flow

_TOKENS = 512  # of a text, as many as the pipeline reads


class ZImage(LatentFamily):
    """Takes photos and captions; of a caption 512 tokens, those of the chat around it among them.

    The transformer takes a text for as long as it is: a row has it filled up with zeros, and its
    length. It counts time from noise to clean, and predicts x - noise.
    """

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    parts: ClassVar[tuple[str, ...]] = (
        "vae", "text_encoder", "tokenizer", "transformer", "scheduler"
    )  # fmt: skip
    fixed = False
    resolution = 1024

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.denoiser: nn.Module = pipe.transformer
        self.noise = flow(pipe.scheduler, scale=1.0)

    @torch.no_grad()
    def encode_text(self, text: str) -> Row:
        (found,), _ = self.pipe.encode_prompt(
            text, self.pipe.text_encoder.device, do_classifier_free_guidance=False,
            max_sequence_length=_TOKENS,
        )  # fmt: skip
        filled = F.pad(found, (0, 0, 0, _TOKENS - len(found)))
        return {"prompt_embeds": filled.cpu(), "prompt_length": torch.tensor(len(found))}

    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        text = row["prompt_embeds"]
        return {
            "x": list(noisy.to(text.dtype).unsqueeze(2)), "t": 1 - time,
            "cap_feats": _texts(text, row["prompt_length"]),
        }  # fmt: skip

    def predict(
        self, model: nn.Module, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]
    ) -> Tensor:
        found = model(**self.inputs(noisy, time, row)).sample
        return -torch.stack(found).squeeze(2)

    @torch.no_grad()
    def draw(
        self, texts: Sequence[Row], empty: Row, size: tuple[int, int], steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Image.Image]:  # fmt: skip
        told = self.told(texts)["prompt_embeds"]
        lengths = torch.stack([row["prompt_length"] for row in texts])
        untold = _texts(empty["prompt_embeds"].to(told.device)[None], empty["prompt_length"][None])
        asked: dict[str, Any] = {
            "prompt_embeds": _texts(told, lengths),
            "negative_prompt_embeds": untold * len(texts),
        }
        return self.decode(self.call(asked, size, steps, guidance, seeds))


def _texts(filled: Tensor, lengths: Tensor) -> list[Tensor]:
    """(B, 512, D) as texts of their own lengths."""
    return [text[:length] for text, length in zip(filled, lengths.tolist(), strict=True)]
