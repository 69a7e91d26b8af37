"""A study of milliseconds: a tiny model, bars that lie and bars that stand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image
from torch import Tensor

from a3fta_kernels.study import bases, features
from a3fta_kernels.study.plan import Plan
from a3fta_kernels.study.subject import Subject
from a3fta_kernels.train.families.family import to_images
from a3fta_kernels.train.families.unconditional import Unconditional

SIDE, COUNT = 8, 60


def plan(**changes: Any) -> Plan:
    plain: dict[str, Any] = {
        "pair": "bars", "ks": (6, 4), "seeds": (0, 1), "methods": ("base", "full", "gelu"),
        "checkpoints": (2, 4), "batch": 4, "warmup": 1, "bins": 2, "draws": 6, "fold_draws": 1,
        "samples": 12, "sample_steps": 2, "folds": 2, "tuning_k": 4, "tuning_seeds": (100,),
    }  # fmt: skip
    return dataclasses.replace(Plan(), **(plain | changes))


def pipeline() -> DDPMPipeline:
    torch.manual_seed(0)
    shape = bases.architecture(SIDE, (8,), 2) | {"attention_head_dim": 4, "norm_num_groups": 2}
    model = UNet2DModel(**shape)
    # the layers that start at 0 would hide what trains before them
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return DDPMPipeline(model, DDIMScheduler(**bases.SCHEDULE))


def images() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = -0.9 + 0.2 * torch.rand(COUNT, 1, SIDE, SIDE, generator=draw)
    labels = torch.arange(COUNT) % 2
    for i, label in enumerate(labels.tolist()):
        place = int(torch.randint(SIDE, (), generator=draw))
        if label:
            x[i, 0, place] = 0.9
        else:
            x[i, 0, :, place] = 0.9
    return x, labels


def make() -> Subject:
    """Picklable parts alone: a process of its own can make it too."""
    pristine = pipeline()
    x, labels = images()
    rows = [{"mean": image, "label": label} for image, label in zip(x, labels, strict=True)]
    return Subject(
        name="bars",
        fresh=lambda: Unconditional(copy.deepcopy(pristine)),
        rows=rows,
        digests=[f"bar {i}" for i in range(COUNT)],
        images=to_images(x),
        labels=labels.tolist(),
        parts={
            "pool": tuple(range(20)),
            "heldout": tuple(range(20, 28)),
            "tuning": tuple(range(28, 38)),
            "tuning_heldout": tuple(range(38, 42)),
            "reference": tuple(range(42, 60)),
        },
        extractors={"halves": lambda i: features.pixels(i)[:, ::2], "pixels": features.pixels},
        size=(SIDE, SIDE),
        source=rows[:3],
    )


def accuracy(network: features.Network, images: Sequence[Image.Image], labels: Tensor) -> float:
    """Share of images whose class a feature network reads."""
    # the head was trained on features that were not scaled yet
    raw = network.extract(images) * network.spread + network.center
    return float((network.head(raw).argmax(1) == labels).double().mean())
