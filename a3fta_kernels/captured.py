"""A loss and its backward as CUDA graphs.

A training step of a U-Net starts thousands of kernels, each a few microseconds long, and Python
takes longer to start them than the GPU to run them. A graph is recorded once and started as a
whole, whatever computes the step: adapters, LoRA, lean or stock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_tensor, describe

Inputs = Mapping[str, Tensor]


@dataclass
class _Recording:
    graph: Any
    inputs: dict[str, Tensor]  # what the graph reads
    loss: Tensor  # and writes
    grads: tuple[Tensor | None, ...]


class Captured:
    """Calls are `loss(inputs).backward()`, recorded for each shape of the inputs and replayed.

        step = a3fta.Captured(loss, a3fta.trainable_parameters(unet))
        value = step({"sample": x, "timestep": t, "text": text, "target": noise})

    Args:
        loss: from a dictionary of tensors a scalar. It runs a few times for each new set of
            shapes, and not again: it must reach the same result by the same kernels whatever the
            values are (no `.item()`), and read nothing that later calls do not find at the same
            place. What is on the CPU, a number or a flag, stays as it was then: `reset` after a
            change of it, or of the model's weights other than in place.
        parameters: what gets gradients.
        warm_up: calls before recording, in which tiles are chosen and libraries loaded.

    A call adds gradients to `.grad` as `backward` does, without what `backward` calls after it
    has accumulated, and returns the loss without a graph. A `.grad` that was None becomes a tensor
    that the next call may write over: copy what is to stay. Random numbers of the GPU are new in
    every call, and recording uses none up. Recordings share their memory, which stays taken as
    long as this object is there.

    Raises:
        TypeError, ValueError: an input is no tensor, or not on the parameters' GPU.
        RuntimeError: `loss` cannot be recorded; the message says what it did. All recordings are
            forgotten then, and PyTorch may hold on to memory until the process ends.
    """

    def __init__(
        self,
        loss: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[nn.Parameter],
        warm_up: int = 3,
    ) -> None:
        self.loss = loss
        self.parameters = list(parameters)
        self.warm_up = warm_up
        self.device = _gpu_of(self.parameters)
        # one for all: a block of memory serves the stream that it was taken for
        self._side = torch.cuda.Stream(self.device)
        self._recordings: dict[tuple, _Recording] = {}
        self._places: tuple[int, ...] = ()
        self._storages: list[Tensor] = []

    def __call__(self, inputs: Inputs) -> Tensor:
        """The loss of these inputs, whose gradients are then in `.grad`."""
        self._check(inputs)
        places = tuple(p.data_ptr() for p in self.parameters)
        if places != self._places:  # moved, or given other storage
            self.reset()
            self._places = places
            # as long as they are held nothing new has their place
            self._storages = [p.detach() for p in self.parameters]
        key = tuple((name, x.shape, x.stride(), x.dtype) for name, x in sorted(inputs.items()))
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = self._record(inputs)
        with torch.no_grad():
            for name, x in inputs.items():
                recording.inputs[name].copy_(x, non_blocking=True)
            self._keep()
            recording.graph.replay()
            self._add(recording.grads)
        return recording.loss.clone()

    def reset(self) -> None:
        """Forgets all recordings; the next calls make them anew."""
        self._recordings.clear()

    def _check(self, inputs: Inputs) -> None:
        if not isinstance(inputs, Mapping) or not inputs:
            raise TypeError(f"inputs: expected a dictionary of tensors, got {describe(inputs)}")
        for name, x in inputs.items():
            check_tensor(f"inputs[{name!r}]", x)
            if x.device != self.device:
                raise ValueError(
                    f"inputs[{name!r}]: expected a tensor on {self.device}, that of the "
                    f"parameters, got one on {x.device}"
                )

    def _record(self, inputs: Inputs) -> _Recording:
        held = {name: x.detach().clone() for name, x in inputs.items()}
        others = next(iter(self._recordings.values()), None)
        # recordings never run at once and keep nothing from one call to the next but gradients
        pool = None if others is None else others.graph.pool()
        graph, side = torch.cuda.CUDAGraph(), self._side
        with torch.cuda.device(self.device), _same_numbers(self.device):
            here = torch.cuda.current_stream()
            _forget_accumulators(self.parameters)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(self.warm_up):
                    self._gradients(held)
            here.wait_stream(side)
            # casts of weights that autocast keeps belong into the graph, and to nobody after it
            torch.clear_autocast_cache()
            try:
                # autograd's threads may load kernels meanwhile
                with torch.cuda.graph(
                    graph, pool=pool, stream=side, capture_error_mode="thread_local"
                ):
                    value, grads = self._gradients(held)
            except RuntimeError as error:
                # one that breaks off may leave its stream, and random numbers for a graph alone,
                # and other graphs without theirs
                torch.cuda.set_stream(here)
                numbers = _numbers_of(self.device)
                numbers.graphsafe_set_state(numbers.clone_state())
                self.reset()
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(
                    f"loss: expected what a CUDA graph can hold, got: {error}"
                ) from error
            finally:
                torch.clear_autocast_cache()
        return _Recording(graph, held, value, grads)

    def _gradients(self, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            value = self.loss(dict(inputs))
            found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        return value.detach(), tuple(_each_its_own(self.parameters, found))

    def _keep(self) -> None:
        """What a replay, of whatever recording, would write over and the caller has not taken."""
        ours = {id(grad) for r in self._recordings.values() for grad in r.grads}
        for parameter in self.parameters:
            if parameter.grad is not None and id(parameter.grad) in ours:
                parameter.grad = parameter.grad.clone()

    def _add(self, grads: tuple[Tensor | None, ...]) -> None:
        sums, parts = [], []
        for parameter, grad in zip(self.parameters, grads, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                # the graph's own: a copy of each would be as many kernels
                parameter.grad = grad
            else:
                sums.append(parameter.grad)
                parts.append(grad)
        if sums:
            torch._foreach_add_(sums, parts)


def _gpu_of(parameters: list[nn.Parameter]) -> torch.device:
    if not parameters:
        raise ValueError("parameters: expected some to train, got none")
    devices = {p.device for p in parameters}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"parameters: expected all on one GPU, got them on {found}")
    return devices.pop()


def _each_its_own(
    parameters: list[nn.Parameter], grads: tuple[Tensor | None, ...]
) -> Iterator[Tensor | None]:
    """The gradients laid out as their parameters, no two in one place: as `backward` has them."""
    seen: set[int] = set()
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            if grad.data_ptr() in seen or grad.stride() != parameter.stride():
                grad = torch.empty_like(parameter).copy_(grad)
            seen.add(grad.data_ptr())
        yield grad


def _numbers_of(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]


def _forget_accumulators(parameters: list[nn.Parameter]) -> None:
    """Lets the next graph of autograd make its own nodes for these leaves.

    A node runs on the stream that it was made on, and an earlier loss that is still held keeps
    those of its stream, which a recording may not touch. A change of dtype, and back, drops them.
    """
    for parameter in parameters:
        data = parameter.data
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        parameter.data = data.new_empty(0, dtype=other)
        parameter.data = data


@contextlib.contextmanager
def _same_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside are drawn again after it."""
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)
