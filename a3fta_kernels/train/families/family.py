"""What the recipe asks of a kind of pipeline.

A family knows how its photos and texts become tensors, how its denoiser is called, and how it
draws; the loop, the monitor and the sampler know nothing else of models.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..noise import Noise

# one sample's tensors by name, on the CPU; a batch is the same with them stacked
Row = dict[str, Tensor]


@dataclass(frozen=True)
class Crop:
    """How a photo was cut: SDXL is told. (width, height); top and left in the scaled photo."""

    original: tuple[int, int]
    size: tuple[int, int]
    top: int
    left: int


class Family(ABC):
    """One loaded pipeline.

    captions: whether photos have captions; classes: how many classes the model has, or None.
    channels: of photos. multiple: of their sides. resolution: the model's own.
    fixed: whether photos of one size are tensors of one size, whatever their captions.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # classes in a model_index.json that it serves
    captions: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    classes: int | None = None
    channels: int = 3
    multiple: int
    resolution: int
    noise: Noise
    denoiser: nn.Module

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @abstractmethod
    def encode_photo(self, pixels: Tensor, crop: Crop) -> Row:
        """pixels (C, H, W) in -1..1."""

    @abstractmethod
    def encode_text(self, text: str) -> Row:
        """Empty where the model takes no text."""

    @contextlib.contextmanager
    def encoding(
        self, device: torch.device, say: Callable[[str], None] = lambda text: None
    ) -> Iterator[None]:
        """While `encode_photo` and `encode_text` are called, each after `bring`; lets go of what
        nothing needs after them. `say` is told what a person should know."""
        yield

    def bring(self, what: str) -> None:  # noqa: B027 - most have nothing to bring
        """Within `encoding`: what only `photos` or only `texts` need to the device."""

    @contextlib.contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Brings what only `draw` needs to the device."""
        yield

    def clean(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """(B, C, h, w): what noise is added to. Of a VAE's distribution, a draw."""
        spread = torch.randn(batch["mean"].shape, generator=generator)
        return batch["mean"] + batch["std"] * spread

    @abstractmethod
    def inputs(self, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the denoiser for a batch."""

    def predict(
        self, model: nn.Module, noisy: Tensor, time: Tensor, row: Mapping[str, Tensor]
    ) -> Tensor:
        """The output of `model`, the denoiser or a wrapper of it, in noisy's shape."""
        return model(**self.inputs(noisy, time, row)).sample

    @abstractmethod
    def draw(
        self, texts: Sequence[Row], empty: Row, size: tuple[int, int], steps: int,
        guidance: float, seeds: Sequence[int],
    ) -> list[Image.Image]:  # fmt: skip
        """An image per row of `texts`; size (width, height); `empty` is the text for guidance."""


def stack(rows: Sequence[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def to_images(pixels: Tensor) -> list[Image.Image]:
    """pixels (B, C, H, W) in -1..1."""
    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    arrays = values.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]
