"""How close samples come to the photos they were trained on: near-copies, and recall.

The distance of a sample to a photo is relative: Euclidean between features, divided by the mean
distance of that sample to all training photos. 0 is the same picture, 1 is no closer to this photo
than to a typical one. A plain distance would call blurred pictures copies, as a blur is close to
everything.

A sample is a near-copy where its relative distance is below the threshold. That is the 5 % quantile
(of up to 20 photos: the smallest) of the same number for real photos, each against all other real
photos, but at least 1/4 and at most 1/2. So of real photos that nobody trained on about 5 % would
count too. Why the bounds:

- With bursts of nearly the same picture the quantile is close to 0, and copies of all other photos
  would pass unseen. At 1/4 they do not. The price: among photos that are one burst after another,
  any faithful sample is a near-copy of its scene.
- With few photos, or photos that differ in all their pixels, the quantile is close to 1, where it
  would say more about luck than about copying. Half the typical distance is what Carlini et al.,
  "Extracting training data from diffusion models" (2023), call extracted.

What it does not see: a copied detail in another picture; with pixels also a copy that is cropped,
moved by more than a few percent, or coloured otherwise. It takes a network's features to see those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import TrainingError

QUANTILE, COPY_QUANTILE = 0.05, 0.01
LOWEST, HIGHEST = 0.25, 0.5


class Pixels:
    """The image at 32 x 32 pixels without its brightness and contrast: (N, 3072), float32."""

    SIDE = 32
    FLAT = 0.02  # of 1: what deviates less is a blank image, whose noise is not worth a comparison

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        if not images:
            return torch.empty(0, 3 * self.SIDE**2)
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image) -> Tensor:
        # the box filter weighs every pixel, so that nothing aliases
        small = image.convert("RGB").resize((self.SIDE, self.SIDE), Image.Resampling.BOX)
        x = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float() / 255
        x = x - x.mean()
        return x / x.std().clamp(min=self.FLAT)


class Network:
    """Pooled features of an image model of transformers (DINOv2, CLIP, ...), of length 1: (N, F).

    Args:
        folder: a model as `save_pretrained` writes it, with its image processor.
        device: where it computes; features come back on the CPU.
    """

    BATCH = 16

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.device = torch.device(device)
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of transformers, safetensors, json: all mean one thing here
            raise TrainingError(
                f"{folder} is no image model of transformers with an image processor, "
                f"as save_pretrained writes them: {error}"
            ) from error
        # models of image and text have the image's part apart
        self.model = getattr(model, "vision_model", model).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        parts = [
            self._batch([image.convert("RGB") for image in images[i : i + self.BATCH]])
            for i in range(0, len(images), self.BATCH)
        ]
        return torch.cat(parts) if parts else torch.empty(0, 0)

    def _batch(self, images: list[Image.Image]) -> Tensor:
        inputs: Any = self.processor(images=images, return_tensors="pt").to(self.device)
        out = self.model(**inputs)
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = out.last_hidden_state[:, 0]
        return torch.nn.functional.normalize(pooled.flatten(1).float(), dim=1).cpu()


def extractor(spec: str, device: str | torch.device = "cpu") -> Pixels | Network:
    """What makes features of images: "pixels", or the folder of a transformers image model."""
    if spec == "pixels":
        return Pixels()
    if not (Path(spec) / "config.json").is_file():
        raise TrainingError(
            f'features must be "pixels" or a folder with an image model (config.json), got {spec!r}'
        )
    return Network(spec, device)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).double()


def nearest(samples: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) to the nearest training image, and its index (N,)."""
    distance, index = torch.cdist(flat(samples), flat(train)).min(1)
    return distance, index


def copy_threshold(reference: Tensor, train: Tensor) -> float:
    """Below this distance to its nearest training image, a sample counts as a near-copy, where
    there are many real images that nobody trained on.

    It is the 1st percentile of that distance over them, so by chance alone 1 % of real images
    would count.
    """
    return float(nearest(reference, train)[0].quantile(COPY_QUANTILE))


def copies(samples: Tensor, train: Tensor, threshold: float) -> Tensor:
    """(N,) bool: which samples are near-copies."""
    return nearest(samples, train)[0] < threshold


def recall(samples: Tensor, reference: Tensor, neighbours: int = 3) -> float:
    """Share of the real images that lie within reach of the samples.

    A sample reaches as far as its `neighbours`-th nearest other sample (Kynkäänniemi et al., 2019).
    Low where samples repeat each other, or the training images.
    """
    samples, reference = flat(samples), flat(reference)
    return _within(torch.cdist(reference, samples), _reach(samples, neighbours))


def _reach(samples: Tensor, neighbours: int) -> Tensor:
    k = min(neighbours, len(samples) - 1)
    return torch.cdist(samples, samples).kthvalue(k + 1, dim=1).values


def _within(distance: Tensor, reach: Tensor) -> float:
    return float((distance <= reach).any(1).double().mean())


@dataclass(frozen=True)
class Closeness:
    """What `closeness` found.

    nearest: per sample the index of its nearest training photo.
    distance: per sample its relative distance to that photo.
    threshold: below it a sample is a near-copy.
    copies: share of near-copies; None without samples, or with a single training photo.
    recall: share of training photos within reach of the samples; None with too few samples.
    """

    nearest: list[int]
    distance: list[float]
    threshold: float
    copies: float | None
    recall: float | None


def closeness(
    samples: Tensor,
    train: Tensor,
    other: Tensor | None = None,
    *,
    mirrored: Tensor | None = None,
    neighbours: int = 3,
) -> Closeness:
    """Compares features of samples with those of the training photos.

    Args:
        samples: (N, F).
        train: (M, F), photos as training saw them: cropped, where it crops.
        other: (K, F), photos held out: they help to tell how close real photos are to each other.
        mirrored: (M, F), `train` flipped left to right, where training flips. A photo is then as
            close as the closer of the two.
        neighbours: how far a sample reaches for recall: to its third nearest other sample. Fewer
            than 2 * neighbours + 2 samples reach from end to end, and recall is None. It grows with
            the number of samples: compare equal numbers.
    """
    if not len(train):
        raise ValueError("train: at least one photo is needed, got none")
    between = _distances(samples, train, mirrored)
    relative, index = _relative(between)
    threshold = _threshold(train, other, mirrored)
    copies = recalled = None
    if len(samples) and len(train) > 1:
        copies = float((relative < threshold).double().mean())
    if len(samples) >= 2 * neighbours + 2:
        recalled = _within(between.T, _reach(flat(samples), neighbours))
    return Closeness(index.tolist(), relative.tolist(), threshold, copies, recalled)


def _distances(x: Tensor, train: Tensor, mirrored: Tensor | None) -> Tensor:
    found = torch.cdist(flat(x), flat(train))
    return found if mirrored is None else found.minimum(torch.cdist(flat(x), flat(mirrored)))


def _relative(distance: Tensor) -> tuple[Tensor, Tensor]:
    """(N, M) -> relative distance (N,) to the nearest, and its index; NaN counts as absent."""
    least, index = distance.nan_to_num(nan=torch.inf).min(1)
    # identical photos only: nothing is closer than anything else
    return (least / distance.nanmean(1)).nan_to_num(nan=0.0), index


def _threshold(train: Tensor, other: Tensor | None, mirrored: Tensor | None) -> float:
    photos = train if other is None else torch.cat([train, other])
    if len(photos) < 3:  # two photos have one distance between them: no neighbour, no typical one
        return HIGHEST
    distance = _distances(photos, train, mirrored)
    if other is not None:
        distance = torch.cat([distance, _distances(photos, other, None)], 1)
    distance.fill_diagonal_(torch.nan)
    # "lower": of n photos nobody saw, one in n is as close as the closest of these n
    quantile = _relative(distance)[0].quantile(QUANTILE, interpolation="lower")
    return min(max(float(quantile), LOWEST), HIGHEST)
