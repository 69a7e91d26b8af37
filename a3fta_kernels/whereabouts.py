"""Tensors that are not whole in this process: shards of FSDP2, partitions of ZeRO-3, files.

`torch.distributed.fsdp.fully_shard` (FSDP2) makes every parameter a DTensor, of which a process
holds a slice, and every wrapped module's class a subclass. Inside a wrapped module's forward the
parameters are plain and whole, so that adapters compute as always; what reads parameters outside
of a forward comes here first. DeepSpeed's ZeRO-3 leaves empty tensors between forwards, diffusers'
group offloading to disk leaves uninitialised ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .ops.validate import FLOATS

_PLAIN_WEIGHTS = (Tensor, nn.Parameter, FakeTensor)


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor; without importing what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_whole(layer: str, weight: Tensor) -> None:
    """Raises ValueError where an adapter would come after `fully_shard`, and be no part of it."""
    if is_sharded(weight):
        raise ValueError(
            f"model: expected whole weights, got a {type(weight).__name__} in {layer}: an adapter "
            f"that comes after fully_shard would train in each process alone; inject first"
        )


def whole(x: Tensor) -> Tensor:
    """All of x. Of a DTensor that is a collective: every process of its mesh has to call."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def fill(target: Tensor, value: Tensor) -> None:
    """target.copy_(value); of a DTensor this process's slice alone, without communication."""
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)


def writes() -> bool:
    """Whether this process is the one that writes what all of them gathered."""
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0


def is_wrapped(module: nn.Module) -> bool:
    """Whether `fully_shard` changed the module's class."""
    return stock_type(module) is not type(module)


def stock_type(module: nn.Module) -> type:
    """The module's class without the subclass that `fully_shard` makes."""
    order = type(module).__mro__
    names = [cls.__name__ for cls in order]
    return order[names.index("FSDPModule") + 1] if "FSDPModule" in names else order[0]


def why_absent(parameter: Tensor) -> str | None:
    """Why the values of a parameter cannot be read or written here; None where they can."""
    if parameter.device.type == "meta":
        return "on the meta device; save and load before the model is offloaded"
    if getattr(parameter, "ds_shape", parameter.shape) != parameter.shape:
        return (
            "partitioned by DeepSpeed's ZeRO-3; save and load inside `with deepspeed.zero."
            "GatheredParameters(list(a3fta_kernels.trainable_parameters(model)), modifier_rank=0)`"
        )
    return None


def unreadable_weight(weight: Tensor) -> str | None:
    """Why this weight is no plain tensor at hand; None where it is."""
    if type(weight) not in _PLAIN_WEIGHTS:
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if weight.device.type == "meta":
        return "its weight is on the meta device"
    if weight.dtype not in FLOATS:
        return f"its weight is stored as {weight.dtype}"
    return None


def check_in_memory(root: nn.Module, action: str) -> None:
    """Raises ValueError where weights lie in files between forwards, and noise in their place."""
    for name, group in _offload_groups(root):
        if getattr(group, "offload_to_disk_path", None) is not None:
            raise ValueError(
                f"model: expected weights in memory to {action}, got {name or 'a model'} that "
                f"enable_group_offload(offload_to_disk_path=...) moved to disk; {action} first"
            )


def check_unstreamed(root: nn.Module, action: str) -> None:
    """Raises ValueError where other memory in a parameter's place would not come to the device."""
    for name, group in _offload_groups(root):
        if getattr(group, "stream", None) is not None:
            raise ValueError(
                f"model: expected weights without copies elsewhere to {action}, got "
                f"{name or 'a model'}, of which enable_group_offload(use_stream=True) sends copies "
                f"of its own to the device; offload without a stream"
            )


def _offload_groups(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """What diffusers' group offloading moves together, by the name of a module in it."""
    for name, module in root.named_modules():
        registry: Any = module.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook("group_offloading")
        group = getattr(hook, "group", None)
        if group is not None:
            yield name, group
