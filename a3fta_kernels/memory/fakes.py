"""A model and its arguments on fake tensors: shapes, dtypes and storages, but no memory.

Everything is faked on the CPU device, whatever device it is on: PyTorch without CUDA aborts on
fake CUDA tensors that need gradients. `on_fakes` puts the real tensors back however it ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_any, tree_map

from ..backends import native_status
from ..checks import describe
from ..projection import AdaptedProjectionMixin

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


class Faked(NamedTuple):
    """What runs in place of the real call: model(*args, **kwargs)."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: tuple[str, ...]  # what differs from the model as it is


class _Faker:
    """Fakes of tensors, one per tensor; tensors that share a storage share the fake's, too."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.fakes: dict[int, Tensor] = {}
        self.storages: dict[int, Tensor] = {}
        self.held: list[Any] = []  # so that an id stays its own

    def __call__(self, x: Tensor, name: str) -> Tensor:
        if id(x) not in self.fakes:
            self.held.append(x)
            self.fakes[id(x)] = self._make(x, name)
        return self.fakes[id(x)]

    def _make(self, x: Tensor, name: str) -> Tensor:
        if type(x) not in _PLAIN or x.layout != torch.strided or x.is_quantized:
            kind = type(x).__name__ if type(x) not in _PLAIN else x.layout
            raise TypeError(f"{name}: expected a plain dense tensor, got a {kind}")
        storage = x.untyped_storage()
        if storage._cdata not in self.storages:
            self.held.append(storage)
            whole = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
            self.storages[storage._cdata] = whole
        whole = self.storages[storage._cdata]
        flat = whole[: whole.numel() // x.itemsize * x.itemsize].view(x.dtype)
        meta = flat.as_strided(x.shape, x.stride(), x.storage_offset()).detach()
        # what the mode does for an operator's result, at a tenth of the time
        fake = FakeTensor(self.mode, meta, torch.device("cpu")).requires_grad_(x.requires_grad)
        if isinstance(x, nn.Parameter):
            fake._is_param = True
        return fake

    def tree(self, value: Any, name: str) -> Any:
        """`value` with every tensor in its lists, tuples and dicts faked."""
        return tree_map(lambda x: self(x, name) if isinstance(x, Tensor) else x, value)


@contextlib.contextmanager
def on_fakes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Faked]:
    """Inside, `model` has fakes for its parameters, buffers and other tensors, and computes
    nothing; the arguments are faked in the result. Afterwards the model is what it was, and so
    are PyTorch's random numbers.

    Raises TypeError for tensors that are not plain (quantized, sparse, of a subclass).
    """
    before = [(module, *_state(module)) for module in model.modules()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            with torch.no_grad():
                faker = _Faker(mode)
                for name, module in model.named_modules():
                    _swap(module, faker, f"model: {name}." if name else "model: ")
                args, kwargs = faker.tree(args, "args"), faker.tree(kwargs, "kwargs")
            notes = _settle(model)
            with torch.enable_grad(), mode, _autocast():
                yield Faked(model, args, kwargs, notes)
    finally:
        for module, attributes, members in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, kept in members.items():
                members_of = attributes[name]
                members_of.clear()
                members_of.update(kept)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    attributes = dict(vars(module))
    members = {n: dict(attributes[n]) for n in ("_parameters", "_buffers", "_modules")}
    return attributes, members


def _swap(module: nn.Module, faker: _Faker, prefix: str) -> None:
    for members in (module._parameters, module._buffers):
        for name, value in members.items():
            if value is not None:
                members[name] = faker(value, prefix + name)  # type: ignore[assignment]
    for name, value in list(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, Tensor):
            vars(module)[name] = faker(value, prefix + name)
        elif type(value) in (list, tuple, dict) and tree_any(_is_tensor, value):
            vars(module)[name] = faker.tree(value, prefix + name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _settle(model: nn.Module) -> tuple[str, ...]:
    """What runs on a GPU alone gives way to what saves the same on the CPU."""
    notes = set()
    for module in model.modules():
        if isinstance(module, AdaptedProjectionMixin) and module.backend == "triton":
            module.backend = "native" if native_status().available else "reference"
            notes.add(f"adapters of backend triton: counted as {module.backend} saves")
        hook = vars(module).get("_hf_hook")
        if hook is not None and "_old_forward" in vars(module):
            module.forward = module._old_forward  # type: ignore[assignment]
            notes.add(f"without accelerate's {type(hook).__name__}: every weight is at hand")
    return tuple(sorted(notes))


def _autocast() -> contextlib.AbstractContextManager:
    """The autocast that CUDA tensors would meet here, for the CPU."""
    if torch.is_autocast_enabled("cuda"):
        return torch.autocast("cpu", dtype=torch.get_autocast_dtype("cuda"))
    return contextlib.nullcontext()


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
