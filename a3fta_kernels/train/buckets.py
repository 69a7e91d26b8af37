"""The sizes that photos train at, and the cut that brings a photo there.

With buckets a photo keeps nearly its aspect, between 1:2 and 2:1, at the number of pixels of the
square; a batch holds photos of one bucket, so one with fewer photos than the batch size repeats
its photos. The aspects are few and those of cameras and screens: among twenty photos, buckets
as fine as the sizes allow would hold one photo each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import TrainingError

Size = tuple[int, int]  # (width, height)

_ASPECTS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)


def sizes(photos: Iterable[Size], resolution: int, multiple: int, buckets: bool) -> list[Size]:
    """The (width, height) that each photo of the given size trains at.

    With `buckets` the nearest aspect, by its logarithm, of those that `choices` has; else the
    square of `resolution`.
    """
    if resolution < 1 or resolution % multiple:
        raise TrainingError(
            f"resolution: expected a multiple of {multiple} for this model, got {resolution}"
        )
    if not buckets:
        return [(resolution, resolution) for _ in photos]
    wide = choices(resolution, multiple)
    found = []
    for width, height in photos:
        aspect = max(width, height) / min(width, height)
        long, short = min(wide, key=lambda size: _distance(size, aspect))
        found.append((long, short) if width >= height else (short, long))
    return found


def choices(resolution: int, multiple: int) -> list[Size]:
    """The buckets that are square or wide; those upright are these, turned.

    The sides are multiples of `multiple`, and as long as resolution**2 pixels let them be.
    """
    possible = []
    for height in range(multiple, resolution + 1, multiple):
        width = resolution**2 // height // multiple * multiple
        if width <= 2 * height:
            possible.append((width, height))
    return sorted({min(possible, key=lambda size: _distance(size, a)) for a in _ASPECTS})


def _distance(size: Size, aspect: float) -> float:
    return abs(math.log(size[0] / size[1] / aspect))


def fit(image: Image.Image, size: Size) -> tuple[Image.Image, tuple[int, int]]:
    """The image scaled until it covers `size`, then its centre; (top, left) of the cut.

    The offsets are pixels of the scaled image, as SDXL's conditioning on crops wants them.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (round(side * scale) for side in image.size)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + size[0], top + size[1])), (top, left)


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an "RGB" or "L" image: (C, H, W), float32 in -1..1."""
    pixels = torch.from_numpy(np.array(image)).to(torch.float32)
    channels_first = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return (channels_first / 127.5 - 1).contiguous()
