"""A study of a user's own pipeline and photos, through the recipe's loading code."""

from __future__ import annotations

from pathlib import Path

import torch

from ..train import families
from ..train.closeness import extractor
from ..train.dataset import encode, gather
from ..train.errors import TrainingError
from ..train.families import Family
from ..train.listener import Listener
from ..train.settings import Settings
from .subject import Subject, dealt

# shares of the photos that are no pool: the rest is, and has to hold the largest k
_SHARES = {"reference": 0.2, "heldout": 0.15, "tuning": 0.2, "tuning_heldout": 0.1}
_FEWEST = 40


def load(
    model: str, images: str, folder: Path, trigger: str = "", features: str = "pixels",
    resolution: int | None = None, device: str = "cpu",
) -> Subject:  # fmt: skip
    """features: "pixels", or the folder of an image model of transformers, whose features then
    come first and pixels second. Photos are squares, as samples are compared with them."""
    from diffusers.utils.logging import disable_progress_bar

    # a model is loaded for every run and fold
    disable_progress_bar()
    settings = Settings(
        model=model, data=images, output=str(folder), trigger=trigger, resolution=resolution,
        buckets=False, heldout="none",
    )  # fmt: skip
    family = families.load(model, torch.float32)
    data = gather(settings, family)
    labels = [p.label for p in data.photos.items if p.label is not None] or None
    count = len(data.sizes)
    if count < _FEWEST:
        raise TrainingError(
            f"images: expected at least {_FEWEST} that can be used, to train on, to tune, to hold "
            f"out and to compare with, got {count} in {images}"
        )
    with family.encoding(torch.device(device)):
        material, _ = encode(settings, family, data, folder, Listener())
    names = ["pixels"] if features == "pixels" else [features, "pixels"]

    def fresh() -> Family:
        made = families.load(model, torch.float32)
        made.denoiser.to(device)
        return made

    return Subject(
        name=Path(model).name,
        fresh=fresh,
        rows=material.rows,
        digests=material.digests,
        images=data.images(range(count)),
        labels=labels,
        parts=dealt({n: round(share * count) for n, share in _SHARES.items()}, labels, count),
        extractors={name: extractor(name, device) for name in names},
        size=data.sizes[0],
        empty=material.empty,
    )
