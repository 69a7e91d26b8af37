"""What the demo measures on samples. All distances are between pixels, images in -1..1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...train.closeness import copies, copy_threshold, flat, nearest, recall

__all__ = ["copies", "copy_threshold", "kid", "legible", "nearest", "recall", "saved_for_backward"]


def _mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def kid(samples: Tensor, reference: Tensor) -> float:
    """Kernel distance (cubic polynomial, unbiased) between samples and real images.

    Scaled so that blank images score 100; 0 is real handwriting, and noise around 0 may be
    negative.
    """
    real = flat(reference)
    blank = flat(torch.full_like(reference, -1.0))
    return 100 * _mmd(flat(samples), real) / _mmd(blank, real)


def legible(samples: Tensor, labels: Tensor, reference: Tensor, truth: Tensor) -> float:
    """Share of samples that a classifier of real digits reads as the digit asked for."""
    from sklearn.svm import SVC

    reader = SVC().fit(flat(reference).numpy(), truth.numpy())
    return float((reader.predict(flat(samples).numpy()) == labels.numpy()).mean())


def saved_for_backward(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes that one training forward keeps for its backward.

    Counted from autograd's saved tensors: a storage counts once, however many views of it are
    saved; the model's own parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that comes back as it is would keep its own node

    # the graph, alive in `output`, keeps every saved storage from being reused while we count
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(*args, **kwargs)
    del output
    return sum(found.values())
