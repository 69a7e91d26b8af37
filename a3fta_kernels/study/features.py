"""What samples are compared by: features of a small network of our own, and raw pixels.

The network learns to tell the target's classes apart, on real images that nothing else in the
study sees; features are its last layer before the classes, each scaled to mean 0 and deviation 1
over those images. It is made once and kept in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..train.batches import generator
from ..train.errors import TrainingError

Extractor = Callable[[Sequence[Image.Image]], Tensor]

WIDTH = 64  # of the features
_EPOCHS, _BATCH, _RATE = 40, 50, 2e-3


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """(N, H * W * channels) in 0..1."""
    arrays = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).flatten(1) / 255


class Network(nn.Module):
    """Features of gray images of `side` pixels; `extract` is the `Extractor`."""

    center: Tensor
    spread: Tensor

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * (-(-side // 4)) ** 2, WIDTH), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("center", torch.zeros(WIDTH))
        self.register_buffer("spread", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, H, W) in 0..1 -> features (B, WIDTH)."""
        return (self.body(x) - self.center) / self.spread

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> Tensor:
        side = images[0].size[0]
        return self(pixels(images).view(-1, 1, side, side))


def learn(images: Sequence[Image.Image], labels: Tensor, seed: int) -> Network:
    """A network that tells `labels` apart; images are moved by up to a pixel while it learns."""
    side = images[0].size[0]
    x = pixels(images).view(-1, 1, side, side)
    torch.manual_seed(seed)
    network = Network(side, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=1e-2)
    rounds = _EPOCHS * -(-len(x) // _BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for epoch in range(_EPOCHS):
        draw = generator(seed, "features", epoch)
        for index in torch.randperm(len(x), generator=draw).split(_BATCH):
            down, right = torch.randint(-1, 2, (2,), generator=draw).tolist()
            moved = torch.roll(x[index], (down, right), (2, 3))
            loss = F.cross_entropy(network.head(network(moved)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    network.eval().requires_grad_(False)
    found = network(x)
    network.center.copy_(found.mean(0))
    # a feature that is silent on all of these images stays as it is
    spread = found.std(0)
    network.spread.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))
    return network


def save(network: Network, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, str(part))
    part.replace(path)


def load(path: Path, side: int, classes: int) -> Network:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = Network(side, classes)
    try:
        network.load_state_dict(load_file(str(path)))
    except (SafetensorError, RuntimeError) as error:
        raise TrainingError(
            f"{path}: expected the feature network of {classes} classes at {side} pixels: "
            f"{error}; remove it to make it anew"
        ) from error
    return network.eval().requires_grad_(False)
