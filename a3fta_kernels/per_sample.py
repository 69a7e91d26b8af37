"""adapters_per_sample: one batch, and each of its samples with its own adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .adapters import BottleneckAdapter
from .attention_weights import owned
from .bank import Bank, Batch, banks_of, check_batch
from .checks import describe
from .forwards import arguments
from .ops.rule import autocast_dtype
from .ops.validate import FLOATS
from .projection import AdaptedProjectionMixin
from .tree import (
    adapted,
    check_kinds,
    check_known,
    check_one_batch,
    check_unmerged,
    denoiser,
    projections,
)


@contextlib.contextmanager
def adapters_per_sample(model: Any, names: Sequence[str | None]) -> Iterator[None]:
    """Inside the block, sample b of a batch has the adapter names[b] alone; None: no adapter.

        with a3fta.adapters_per_sample(pipe, ["anna", None, "ben", "ben"]), torch.no_grad():
            images = pipe(prompt=four_prompts).images

    One forward serves them all, each as if it ran alone with its adapter (of weight 1): the
    adapters of a layer are stacked when the block begins, and one kernel reads, per block of rows,
    those of the sample it is in (`ops.adapter_bank`). Adapters may differ in rank, design, bias, in
    activation and placement (one pass for each that there is), and in the layers they have.

    A name is an image's, not a prompt's, in the order of the batch. Of num_images_per_prompt=2 a
    pipeline makes p1, p1, p2, p2: give each name twice in a row, ["anna", "anna", "ben", "ben"].
    With a name per prompt images would get the adapter of another prompt, which cannot always be
    told from guidance. The model's batch is len(names), or two or three times that: guidance
    concatenates whole batches, and so are the names (three: with PAG, InstructPix2Pix).

    `disabled` works inside, and what `set_adapters` chose acts again after the block. The block is
    the model's, not the thread's: calls from other threads are inside as well. A copy of the model
    made inside is outside. The stacked copy does not see the adapters change; with gradients on it
    is made anew in every forward, and adapters train. Call backward inside: what computes a
    forward again there (gradient checkpointing, `lean`) would do so without the block.

    Raises:
        TypeError, ValueError: names the model does not have (the message lists the known), no
            names, merged layers, another such block, dropout in training, adapters that depend on
            the timestep, or attention that trains beside an adapter. Nothing is changed then. In
            a forward: a batch that is not one, two or three times len(names).
    """
    root = denoiser(model)
    layers = adapted(root)
    chosen = _names(names)
    check_known("names", [n for n in chosen if n is not None], layers.values())
    check_unmerged(layers, "choose adapters")
    check_one_batch(layers, "begin another")
    trained = [owner for _, owner, own in owned(root) if owner in chosen or not own.away]
    if trained:
        raise ValueError(
            f"names: expected adapters alone, got {trained[0]!r}, with which attention's own "
            f"weights train, for all samples of a batch"
        )
    batch = Batch()
    made = {name: _banks(name, layer, chosen, batch) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.banks = made[name]
    handle = root.register_forward_pre_hook(_Note(root, batch, len(chosen)), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for layer in projections(root).values():
            layer.banks = None


class _Note:
    """A hook: notes the batch of the model's forward, for the layers in which one sample has many
    rows of the batch."""

    def __init__(self, root: nn.Module, batch: Batch, named: int) -> None:
        self.first = next(iter(arguments(root).values()))
        self.batch = batch
        self.named = named

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        samples = self.first.given(args, kwargs)
        if samples is None:  # a wrapper's forward(*args, **kwargs): latents, or the text
            wide = (x for x in kwargs.values() if isinstance(x, Tensor) and x.dim() > 2)
            samples = next(wide, None)
        if samples is None:
            raise ValueError(
                f"model: expected its batch as the first argument, or a tensor of three dimensions "
                f"or more among the others, got {', '.join(kwargs) or 'none'}"
            )
        check_batch(len(samples), self.named)
        self.batch.samples = len(samples)

    def __reduce__(self) -> Any:
        return _Idle, ()


class _Idle:
    """What a copy of the model has in place of the note: it is outside the block."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pass


def _names(names: Any) -> list[str | None]:
    chosen: list[Any] = list(names) if isinstance(names, (list, tuple)) else [0]
    if not all(n is None or isinstance(n, str) for n in chosen):
        raise TypeError(
            f"names: expected a list with the name of an adapter, or None, for each sample, "
            f"got {describe(names)}"
        )
    if not chosen:
        raise ValueError("names: expected at least one sample, got []")
    return chosen


def _banks(
    name: str, layer: AdaptedProjectionMixin, names: list[str | None], batch: Batch
) -> tuple[Bank, ...]:
    found: dict[str, Any] = dict(layer.adapters.items())
    own: list[BottleneckAdapter | None] = [found.get(n) if n is not None else None for n in names]
    for adapter_name, adapter in zip(names, own, strict=True):
        if adapter_name is not None and adapter is not None:
            check_kinds(
                "names", "choose by sample", name, adapter_name, adapter, "timeless",
                "of h itself", "whole",
            )  # fmt: skip
    # quantized weights and those cast for storage say nothing of what the layer computes in
    dtype = autocast_dtype(layer.weight) if layer.weight.dtype in FLOATS else None
    return banks_of(own, dtype, batch)
