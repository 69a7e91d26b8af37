"""Sample images of a run: drawn from fixed noise, written, and compared with the photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import records
from .closeness import closeness, extractor
from .families import Family, Row
from .listener import Listener, Share
from .settings import Settings

# of the frozen weights, by the precision asked for
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prompt:
    title: str  # what a report says under the image
    row: Row


def draw(
    family: Family, prompts: Sequence[Prompt], empty: Row, size: tuple[int, int], *,
    steps: int, guidance: float, seed: int, batch: int, device: torch.device,
    told: Callable[[int], None] = lambda count: None,
) -> list[Image.Image]:  # fmt: skip
    """An image per prompt; the noise of each is fixed by the seed and its place. `told` hears how
    many were drawn just now."""
    images: list[Image.Image] = []
    with family.drawing(device):
        for start in range(0, len(prompts), batch):
            part = [p.row for p in prompts[start : start + batch]]
            seeds = [seed + start + i for i in range(len(part))]
            images += family.draw(part, empty, size, steps, guidance, seeds)
            told(len(part))
    return images


class Sampler:
    """Called with a step: draws with the adapter as it is, and records what came.

    photos, others: images that train and that do not, as training sees them.
    """

    def __init__(
        self, run: Path, family: Family, settings: Settings, prompts: Sequence[Prompt],
        empty: Row, photos: Sequence[Image.Image], names: Sequence[str],
        others: Sequence[Image.Image], size: tuple[int, int], device: torch.device,
        listener: Listener,
    ) -> None:  # fmt: skip
        self.listener = listener
        self.run, self.family, self.settings = run, family, settings
        self.prompts, self.empty, self.names = prompts, empty, names
        self.size, self.device = size, device
        self.features = extractor(settings.features, device)
        self.train = self.features(photos)
        self.other: Tensor | None = self.features(others) if others else None
        self.mirrored: Tensor | None = None
        if settings.flip:
            turned = [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in photos]
            self.mirrored = self.features(turned)

    def draw(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        settings = self.settings
        return draw(
            self.family, prompts, self.empty, self.size, steps=settings.sample_steps,
            guidance=settings.guidance, seed=settings.seed, batch=settings.batch,
            device=self.device, told=Share(self.listener, "samples", len(prompts)).more,
        )  # fmt: skip

    def __call__(self, step: int) -> None:
        images = self.draw(self.prompts)
        folder = self.run / "samples" / f"step-{step:06d}"
        files = []
        with records.explained(self.run):
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                image.save(folder / f"{i}.png")
                files.append(str((folder / f"{i}.png").relative_to(self.run)))
        found = closeness(self.features(images), self.train, self.other, mirrored=self.mirrored)
        records.append(
            self.run,
            records.SAMPLES,
            {
                "step": step,
                "prompts": [prompt.title for prompt in self.prompts],
                "files": files,
                "nearest": [self.names[i] for i in found.nearest],
                "distance": found.distance,
                "threshold": found.threshold,
                "copies": found.copies,
                "recall": found.recall,
            },
        )
