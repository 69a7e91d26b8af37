"""What is not whole in this process is seen: shards and classes of FSDP2, ZeRO-3, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import a3fta_kernels as a3fta
from a3fta_kernels import whereabouts
from a3fta_kernels.peft import A3FTAConfig

from . import models


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (nn.Parameter(torch.zeros(2)), None),
        (torch.zeros(2, dtype=torch.bfloat16), None),
        (nn.Buffer(torch.zeros(2)), None),
        (torch.zeros(2).as_subclass(type("Packed", (torch.Tensor,), {})), "a Packed, not a plain"),
        (torch.zeros(2, device="meta"), "on the meta device"),
        (torch.zeros(2, dtype=torch.int8), "stored as torch.int8"),
    ],
)
def test_a_weight_that_is_no_plain_tensor_at_hand(weight, reason):
    found = whereabouts.unreadable_weight(weight)
    assert found is None if reason is None else reason in found


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shards(one_process):
    layer = fully_shard(nn.Sequential(nn.Linear(5, 3)))
    weight = layer[0].weight
    assert whereabouts.is_sharded(weight) and not whereabouts.is_sharded(torch.ones(1))
    value = torch.arange(15.0).view(3, 5)
    with torch.no_grad():
        whereabouts.fill(weight, value)
    assert torch.equal(whereabouts.whole(weight), value)
    assert type(whereabouts.whole(weight)) is not type(weight)
    assert whereabouts.is_wrapped(layer) and not whereabouts.is_wrapped(layer[0])
    assert whereabouts.stock_type(layer) is nn.Sequential
    assert whereabouts.writes()


def test_files_name_the_class_that_was_sharded(one_process, tmp_path: Path):
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    models.randomize(model)
    expected = [p.detach().clone() for p in a3fta.trainable_parameters(model)]
    a3fta.save_adapter(fully_shard(model), tmp_path / "adapter")
    other = models.build("sd15")
    a3fta.load_adapter(other, tmp_path / "adapter")
    loaded = list(a3fta.trainable_parameters(other))
    assert all(torch.equal(a, b) for a, b in zip(loaded, expected, strict=True))


def test_a_layer_that_is_sharded_alone_says_why_it_is_not_fused(one_process):
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    layer = next(iter(a3fta.projections(model).values()))
    fully_shard(layer)
    assert "FSDP" in layer.unfused_reason()
    with pytest.raises(ValueError, match="undo what changed the class"):
        a3fta.eject(model)


def test_peft_adds_no_adapter_to_shards(one_process):
    model = fully_shard(models.build("unet2d"))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"expected whole weights, got a DTensor in .*to_out"):
        peft.inject_adapter_in_model(A3FTAConfig(rank=2), model)
    assert list(model.state_dict()) == before


def partition(parameter: nn.Parameter) -> None:
    """As ZeRO-3 leaves it between forwards."""
    parameter.ds_shape = parameter.shape
    parameter.data = torch.empty(0)


def test_partitions(tmp_path: Path):
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, activation="identity", bias=False))
    a3fta.save_adapter(model, tmp_path / "whole")
    layer = next(iter(a3fta.projections(model).values()))
    partition(layer.weight)
    assert layer.unfused_reason() == "its weight is not whole here, but of shape (0,)"
    with pytest.raises(ValueError, match=r"plain weights to merge into, got .* not whole here"):
        a3fta.merge(model)
    # the fingerprint leaves such a layer out
    a3fta.save_adapter(model, tmp_path / "rest")
    a3fta.load_adapter(model, tmp_path / "whole")
    parameter = layer.adapters["default"].w_up
    partition(parameter)
    assert "ZeRO-3" in whereabouts.why_absent(parameter)
    for call in (a3fta.save_adapter, a3fta.load_adapter):
        with pytest.raises(ValueError, match=r"to_out.0's w_up partitioned by DeepSpeed's ZeRO-3"):
            call(model, tmp_path / "whole")


def test_an_engine_is_unwrapped():
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    found = a3fta.projections(DeepSpeedEngine(model))
    assert found.keys() == a3fta.projections(model).keys()
