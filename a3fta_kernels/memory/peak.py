"""step_peak: the most bytes that live at once in a training step, without running it.

A dispatch mode sees every tensor that an operator makes, in the forward, in the backward and in
what the backward computes again; a weak reference to its storage says when it is freed.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tree import denoiser
from .account import mib
from .fakes import on_fakes
from .places import ROOT, Places
from .saved import storages, tensors_of


@dataclass(frozen=True)
class Peak:
    """Bytes that live above the weights and buffers in one step: inputs, activations, gradients.

    bytes: the most at one time. phase: "forward", "backward", or "recomputation": a forward
    inside the backward. module, operator: what ran then, the module whose forward it belongs to.
    after_forward: live bytes when the loss is known. gradients: of the parameters, at the end.
    """

    bytes: int
    phase: str
    module: str
    operator: str
    after_forward: int
    gradients: int
    parameters: int  # weights and buffers, not part of `bytes`
    trainable: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{mib(self.bytes)} above {mib(self.parameters)} of weights at the peak, in the "
            f"{self.phase} of {self.module} ({self.operator}); {mib(self.after_forward)} after "
            f"the forward, {mib(self.gradients)} of gradients at the end"
        )


def step_peak(model: Any, *args: Any, **kwargs: Any) -> Peak:
    """The most bytes that model(*args, **kwargs), a loss and its backward hold at once.

    Runs on fake tensors, as `ledger`, with the same arguments and errors; the loss is the mean
    square of every floating-point output, in fp32. The optimizer is not part of it.

    Counted are whole storages, from when an operator makes them until the last tensor on them is
    gone: also those that autograd Functions and checkpoints make and drop within one call. Not
    counted is what a kernel allocates inside itself (workspaces of convolutions and products), nor
    what the allocator rounds up. Under a dispatch mode autograd adds up gradients of one tensor out
    of place: where eager PyTorch adds in place, the peak is lower by up to one such tensor.

    Raises ValueError where nothing in the model trains.
    """
    root = denoiser(model)
    with on_fakes(root, args, kwargs) as faked:
        return measure(faked.model, faked.args, faked.kwargs, faked.notes)


class _Live(TorchDispatchMode):
    """Counts the bytes of living storages; `parameters` are known and do not count."""

    def __init__(self, places: Places, parameters: Iterable[int]) -> None:
        super().__init__()
        self.places = places
        self.known: dict[int, Any] = dict.fromkeys(parameters)
        self.bytes = self.most = 0
        self.at = ("forward", ROOT, "")
        self.backward = False

    def see(self, tensors: Iterable[Any]) -> None:
        for x in tensors:
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.known:
                size = storage.nbytes()
                self.bytes += size
                self.known[key] = weakref.ref(storage, functools.partial(self._gone, key, size))

    def _gone(self, key: int, size: int, _: Any) -> None:
        self.bytes -= size
        del self.known[key]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.see([output] if isinstance(output, Tensor) else tree_leaves(output))
        if self.bytes > self.most:
            self.most, self.at = self.bytes, (*self._where(), func._schema.name)
        return output

    def _where(self) -> tuple[str, str]:
        if not self.backward:
            return "forward", self.places.current or ROOT
        if self.places.current:
            return "recomputation", self.places.current
        node = torch._C._current_autograd_node()
        owner = "" if node is None else self.places.of_node(node._sequence_nr())
        return "backward", owner or ROOT


def measure(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: tuple[str, ...] = ()
) -> Peak:
    """`step_peak` of a step on the tensors as they are, real or fake: runs it.

    Leaves the gradients in the parameters, which should have none before.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: expected parameters that train, got a model with none")
    parameters = storages((*model.parameters(), *model.buffers()))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # so that what lives does not depend on when the collector runs
    try:
        with Places(model) as places, _Live(places, parameters) as live:
            live.see(tree_leaves((args, kwargs)))
            loss = _loss(model(*args, **kwargs))
            after_forward = live.bytes
            live.backward = True
            loss.backward()
    finally:
        if collecting:
            gc.enable()
    return Peak(
        bytes=live.most,
        phase=live.at[0],
        module=live.at[1],
        operator=live.at[2],
        after_forward=after_forward,
        gradients=sum(storages(p.grad for p in trained if p.grad is not None).values()),
        parameters=sum(parameters.values()),
        trainable=sum(storages(trained).values()),
        notes=notes,
    )


def _loss(output: Any) -> Tensor:
    outputs = [x for x in tensors_of(output) if x.is_floating_point() and x.requires_grad]
    if not outputs:
        raise ValueError("model: expected an output that depends on what trains, got none")
    return torch.stack([x.float().square().mean() for x in outputs]).sum()
