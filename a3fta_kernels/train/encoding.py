"""Photos and texts as the tensors that training reads: encoded once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import Size, fit, to_tensor
from .cache import Cache
from .families import Crop, Family, Row
from .photos import Photo

_SAMPLED = 8  # values per tensor that tell one encoder from another


class Encoder:
    """Encodes for one family, through a cache that knows which encoders made an entry."""

    def __init__(self, family: Family, cache: Cache) -> None:
        self.family, self.cache = family, cache
        self.texts: dict[str, Row] = {}  # of photos that share one, one
        parts = {
            name: part for name, part in getattr(family.pipe, "components", {}).items()
            if isinstance(part, nn.Module) and part is not family.denoiser
        }  # fmt: skip
        self.base = _fingerprint(parts)

    def photo(self, photo: Photo, size: Size, mirrored: bool = False) -> Row:
        key: dict[str, Any] = {
            "kind": "photo", "family": self.family.name, "base": self.base,
            "photo": photo.digest, "size": list(size), "mirrored": mirrored,
        }  # fmt: skip

        def make() -> Row:
            self.family.bring("photos")
            cut, (top, left) = fit(photo.open(), size)
            pixels = to_tensor(cut)
            crop = Crop(photo.size, size, top, left)
            return self.family.encode_photo(pixels.flip(-1) if mirrored else pixels, crop)

        return self.cache.get(key, make)

    def text(self, text: str) -> Row:
        if not self.family.captions:
            return {}
        key = {"kind": "text", "family": self.family.name, "base": self.base, "text": text}

        def make() -> Row:
            self.family.bring("texts")
            return self.family.encode_text(text)

        if text not in self.texts:
            self.texts[text] = self.cache.get(key, make)
        return self.texts[text]

    def rows(
        self, photos: Sequence[Photo], sizes: Sequence[Size], mirrored: bool = False,
        told: Callable[[], None] = lambda: None,
    ) -> list[Row]:  # fmt: skip
        """What the loop reads for each photo: its pixels, its text, its class. `told` hears of
        every photo that is encoded."""
        # photos first: what encodes them need not be there beside what encodes texts
        encoded = []
        for photo, size in zip(photos, sizes, strict=True):
            encoded.append(self.photo(photo, size, mirrored))
            told()
        found = []
        for photo, row in zip(photos, encoded, strict=True):
            row = row | self.text(photo.caption)
            if photo.label is not None:
                row["label"] = torch.tensor(photo.label)
            found.append(row)
        return found


def _fingerprint(parts: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        # scales of latents stand there, too; "_" marks where it was loaded from
        config = part.config if isinstance(part.config, dict) else part.config.to_dict()
        facts = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        for key, tensor in sorted(part.state_dict().items()):
            digest.update(repr((name, key, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(_sample(tensor).numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, max(0, len(flat) - 1), _SAMPLED, device=flat.device).long()
    return (flat[places] if len(flat) else flat).double().cpu()
