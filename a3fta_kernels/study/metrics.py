"""What samples are worth, from their features and those of real images.

Formulas are short and have no library that is kept, small and fit for unequal numbers of images;
the tests compute each of them again the slow way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..train.closeness import copies, copy_threshold, flat

NEIGHBOURS = 5


def kid(samples: Tensor, real: Tensor) -> float:
    """Kernel distance (Bińkowski et al., "Demystifying MMD GANs", 2018): the unbiased squared MMD
    of the cubic polynomial kernel. About 0 between two sets of real images; may be negative."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    x, y = flat(samples), flat(real)
    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def manifolds(samples: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020).

    The balls are around every image up to its `neighbours`-th nearest other of its own set.
    """
    x, y = flat(samples), flat(real)
    between = torch.cdist(y, x)  # (real, samples)
    reach_x, reach_y = _reach(x, neighbours), _reach(y, neighbours)
    near_real = between < reach_y[:, None]
    return {
        "precision": _share(near_real.any(0)),
        "recall": _share((between < reach_x).any(1)),
        "density": float(near_real.double().sum(0).mean() / neighbours),
        "coverage": _share(between.min(1).values < reach_y),
    }


def _reach(x: Tensor, neighbours: int) -> Tensor:
    # the first is the image itself
    nearest = min(neighbours, len(x) - 1) + 1
    return torch.cdist(x, x).kthvalue(nearest, dim=1).values


def _share(found: Tensor) -> float:
    return float(found.double().mean())


def vendi(samples: Tensor) -> float:
    """The effective number of different samples (Friedman and Dieng, "The Vendi Score", 2023), by
    cosine similarity: exp of the entropy of the eigenvalues of K / n. 1 where all are the same."""
    x = torch.nn.functional.normalize(flat(samples), dim=1)
    # K's eigenvalues but for zeros, from the smaller of the two Gram matrices
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    values = values[values > 0]
    return float(torch.exp(-(values * values.log()).sum()))


def near_copies(samples: Tensor, train: Tensor, real: Tensor) -> float:
    """Share of samples closer to a training image than 99 % of `real`, which nobody trained on."""
    return _share(copies(samples, train, copy_threshold(real, train)))


def measure(samples: Tensor, train: Tensor, real: Tensor) -> dict[str, float]:
    """All of them, by name."""
    return {
        "kid": kid(samples, real),
        **manifolds(samples, real),
        "copies": near_copies(samples, train, real),
        "vendi": vendi(samples),
    }


NAMES = ("kid", "precision", "recall", "density", "coverage", "copies", "vendi")
