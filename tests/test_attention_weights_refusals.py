"""`train="adapter+attention"`: where weights cannot train or be exchanged, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import AdapterConfig

from . import models

BOTH = "adapter+attention"


def injected(name: str = "sd15") -> nn.Module:
    model = models.build(name)
    a3fta.inject(model, AdapterConfig(rank=2), train=BOTH)
    return model


def attentions(model: nn.Module) -> list[Any]:
    return [m for n, m in model.named_modules() if n.endswith("attn1")]


def to_disk(model: nn.Module, folder: Path) -> None:
    device = torch.device("cpu")
    model.enable_group_offload(  # type: ignore[operator]
        onload_device=device, offload_device=device, offload_type="leaf_level",
        offload_to_disk_path=str(folder),
    )  # fmt: skip


def parametrized(model: nn.Module, _: Path) -> None:
    nn.utils.parametrizations.weight_norm(attentions(model)[-1].to_q)


def sharded(model: nn.Module, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    fully_shard(attentions(model)[-1].to_q)


def offloaded(model: nn.Module, _: Path) -> None:
    """As accelerate leaves it between forwards."""
    layer = attentions(model)[-1].to_q
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))


def fused(model: nn.Module, _: Path) -> None:
    model.fuse_qkv_projections()  # type: ignore[operator]


SWITCHES: dict[str, Callable[[nn.Module], Any]] = {
    "set_adapters": lambda m: a3fta.set_adapters(m, []),
    "disable_adapters": a3fta.disable_adapters,
    "disabled": lambda m: a3fta.disabled(m).__enter__(),
    "eject": a3fta.eject,
}


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Layers, adapters and every weight (noise in the place of one on disk, too)."""

    def seen() -> tuple[Any, ...]:
        layers = a3fta.projections(model)
        switches = {n: (x.enabled, dict(x.weights), list(x.adapters)) for n, x in layers.items()}
        kept = {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in parameters.items()}
        return switches, kept, {n: type(m) for n, m in model.named_modules()}

    parameters = {n: p for n, p in model.named_parameters() if type(p.data) is Tensor}
    before = seen()
    yield
    assert seen() == before


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (to_disk, "expected weights in memory to {}, got .* moved to disk"),
        (parametrized, r"got no \S+to_q.weight any more \(parametrized"),
        (sharded, r"at hand to {}, got \S+to_q.weight as a DTensor"),
        (offloaded, r"at hand to {}, got \S+to_q.weight as a Tensor .* on meta"),
        (fused, "expected q, k and v apart to {}, got .*call unfuse_qkv_projections first"),
    ],
    ids=["on disk", "parametrized", "sharded", "offloaded", "fused"],
)
def test_what_cannot_be_exchanged(spoil, message: str, tmp_path: Path, no_group):
    model = injected()
    spoil(model, tmp_path)
    for name, switch in SWITCHES.items():
        action = "eject" if name == "eject" else "switch attention that trains"
        with left_alone(model), pytest.raises(ValueError, match=message.format(action)):
            switch(model)


def test_the_way_back_is_checked_too():
    model = injected()
    layer = attentions(model)[0].to_q
    with pytest.raises(ValueError, match=r"got no \S+to_q.weight any more"), a3fta.disabled(model):
        parametrized(model, Path())
    assert not any(x.enabled for x in a3fta.projections(model).values())
    assert not layer.weight.requires_grad


def test_an_adapter_alone_is_switched_and_ejected_on_disk(tmp_path: Path):
    model = models.build("sd15")
    a3fta.inject(model, AdapterConfig(rank=2))
    to_disk(model, tmp_path)
    with a3fta.disabled(model):
        a3fta.set_adapters(model, [])
    a3fta.eject(model)
    assert not a3fta.projections(model)
    with pytest.raises(ValueError, match="expected weights in memory to inject"):
        a3fta.inject(model, AdapterConfig(rank=2), train=BOTH)
    assert not a3fta.projections(model)


def test_copies_that_a_stream_sends_are_not_exchanged():
    """They are in pinned memory, which takes an accelerator: here the mark of it alone."""
    model = injected()
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    with a3fta.disabled(model):
        pass
    layer = attentions(model)[-1].to_q
    layer._diffusers_hook.get_hook("group_offloading").group.stream = object()
    for name in ("set_adapters", "disable_adapters", "disabled"):
        with left_alone(model), pytest.raises(ValueError, match=r"to_q, of which enable_group_off"):
            SWITCHES[name](model)
    a3fta.eject(model)  # which overwrites the copies themselves


def test_set_trainable_without_one_of_its_parameters():
    model = injected()
    a3fta.inject(model, AdapterConfig(rank=2), name="second")
    parametrized(model, Path())
    with left_alone(model), pytest.raises(ValueError, match=r"got no \S+to_q.weight any more"):
        a3fta.set_trainable(model, "second")


def tie_inside(model: nn.Module) -> None:
    first, second, *_ = attentions(model)
    second.to_q.weight = first.to_q.weight


def tie_outside(model: nn.Module) -> None:
    model.other = nn.Linear(2, 2)
    model.other.weight = attentions(model)[0].to_q.weight


@pytest.mark.parametrize("tie", [tie_inside, tie_outside])
def test_tied_weights(tie: Callable[[nn.Module], None]):
    model = models.build("sd15")
    tie(model)
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=r"no other layer shares .* which is (\S+to_q|other).weig"):
        a3fta.inject(model, AdapterConfig(rank=2), train=BOTH)
    models.assert_unchanged(model, before)
    a3fta.inject(model, AdapterConfig(rank=2))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_fused_by_diffusers_meanwhile(name: str, tmp_path: Path):
    model = injected(name)
    a3fta.save_adapter(model, tmp_path)
    count = len(list(a3fta.trainable_parameters(model)))
    model.fuse_qkv_projections()
    for action, call in {
        "train": lambda: a3fta.trainable_parameters(model),
        "save": lambda: a3fta.save_adapter(model, tmp_path / "other"),
        "load": lambda: a3fta.load_adapter(model, tmp_path),
    }.items():
        with pytest.raises(ValueError, match=f"q, k and v apart to {action} them, got .*attn"):
            call()
    model.unfuse_qkv_projections()
    assert len(list(a3fta.trainable_parameters(model))) == count
    a3fta.eject(model)
    a3fta.inject(model, AdapterConfig(rank=2), train=BOTH)  # apart again


@pytest.mark.parametrize("off", [a3fta.disable_adapters, lambda m: a3fta.set_adapters(m, [])])
def test_attention_that_is_away_is_told(off: Callable[[nn.Module], None], recwarn):
    model = injected()
    count = len(list(a3fta.trainable_parameters(model)))
    assert not recwarn
    off(model)
    with pytest.warns(UserWarning, match=r"beside the adapters default is left out, .* enable"):
        assert 0 < len(list(a3fta.trainable_parameters(model))) < count
