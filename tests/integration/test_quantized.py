"""Bases with quantized layers: adapters train beside them, and leave no trace.

The oracle is a plain model in float64 that has the weights the quantized layers hold.
"""

from __future__ import annotations

import abc
import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.conversion import adapt, why_not_adaptable

from .. import models
from . import quantized as layers
from .quantized import dequantized, quantized


class Kind(NamedTuple):
    make: Any
    packages: tuple[str, ...]
    reason: str  # in the injection report
    tolerance: float  # against the oracle


KINDS = {
    "bitsandbytes-4bit": Kind(
        layers.bitsandbytes_4bit, ("bitsandbytes",), "the layer is of class Linear4bit", 1e-4
    ),
    # rounds activations to 8 bits, too
    "bitsandbytes-8bit": Kind(
        layers.bitsandbytes_8bit, ("bitsandbytes",), "the layer is of class Linear8bitLt", 0.05
    ),
    "torchao-int8": Kind(
        layers.torchao_int8, ("torchao",), "its weight is a Int8Tensor", 1e-4
    ),
    "gguf-q8": Kind(layers.gguf_q8, ("gguf",), "the layer is of class GGUFLinear", 1e-4),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found = KINDS[request.param]
    for package in found.packages:
        pytest.importorskip(package)
    return found


def adapted(kind: Kind, **options: Any) -> nn.Module:
    model = quantized(kind.make)
    a3fta.inject(model, a3fta.AdapterConfig(**{"rank": 4, **options}))
    models.randomize(model)
    return model


def loss(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return models.run(model, "sd15", dtype=dtype).square().mean()


def grads(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    loss(model, dtype).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert len(found) == 4 * len(a3fta.projections(model))
    return found


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


def test_gradients_are_those_of_the_weights_it_holds(kind: Kind):
    model = quantized(kind.make)
    oracle = dequantized(quantized(kind.make))
    before = models.run(model, "sd15")
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    assert {layer.fused for layer in report.layers.values()} == {False}
    assert all(layer.why_not_fused.startswith(kind.reason) for layer in report.layers.values())
    stock = sum(p.numel() for p in oracle.parameters())
    assert report.parameters_total == stock  # what packed weights stand for
    assert torch.equal(models.run(model, "sd15"), before)

    a3fta.inject(oracle, a3fta.AdapterConfig(rank=4), backend="reference")
    for each in (model, oracle):
        models.randomize(each)
    expected = models.run(oracle, "sd15", dtype=torch.float64)
    found = models.run(model, "sd15")
    assert (found - expected).norm() <= kind.tolerance * expected.norm()
    assert (found - before).norm() > 0.05 * before.norm() > 5 * (found - expected).norm()
    assert far(grads(model), grads(oracle, torch.float64)) <= kind.tolerance


def test_training_lowers_the_loss(kind: Kind):
    model = adapted(kind).train()
    optimizer = torch.optim.AdamW(a3fta.trainable_parameters(model), lr=3e-3)
    losses = []
    for _ in range(4):
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


def test_files(kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Between bases of one kind, and from a plain base; packed weights are not compared."""
    model = adapted(kind)
    expected = models.run(model, "sd15")
    a3fta.save_adapter(model, tmp_path / "own")
    other = quantized(kind.make)
    with caplog.at_level(logging.INFO, logger="a3fta_kernels"):
        a3fta.load_adapter(other, tmp_path / "own")
    assert "were not compared" in caplog.text
    assert torch.equal(models.run(other, "sd15"), expected)

    plain = models.build("sd15")
    a3fta.inject(plain, a3fta.AdapterConfig(rank=4))
    models.randomize(plain, seed=7)
    a3fta.save_adapter(plain, tmp_path / "plain")
    a3fta.load_adapter(other, tmp_path / "plain")
    for a, b in zip(*(a3fta.trainable_parameters(m) for m in (other, plain)), strict=True):
        assert torch.equal(a, b)


def test_eject_gives_the_very_layers_back(kind: Kind):
    model = quantized(kind.make)
    first = models.run(model, "sd15")  # bitsandbytes settles its layers in it
    before = {name: (m, type(m), set(vars(m))) for name, m in model.named_modules()}
    state = {name: value for name, value in model.state_dict().items()}
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    models.randomize(model)
    assert not torch.equal(models.run(model, "sd15"), first)
    a3fta.eject(model)
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    for name, (module, stock, attributes) in before.items():
        assert after[name] is module and type(module) is stock, name
        assert set(vars(module)) == attributes, name
    assert list(model.state_dict()) == list(state)
    assert torch.equal(models.run(model, "sd15"), first)


def test_what_needs_the_weight_says_so(kind: Kind, tmp_path: Path):
    model = adapted(kind, activation="identity", bias=False)
    expected = models.run(model, "sd15")
    with pytest.raises(ValueError, match=f"plain weights to merge into, got .*{kind.reason}"):
        a3fta.merge(model)
    with pytest.raises(ValueError, match=f"plain weights to export, got .*{kind.reason}"):
        a3fta.export_lora(model, tmp_path)
    with pytest.raises(TypeError, match=r"time_embedding.linear_1.weight: expected a plain dense"):
        a3fta.memory.ledger(model, **models.inputs("sd15"))
    assert a3fta.freeze_for_inference(model) == 0
    left = a3fta.fuse_qkv(model)
    assert left and all(left.values())
    assert torch.equal(models.run(model, "sd15"), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["exact", "block"])
def test_lean(kind: Kind, level: str):
    model = adapted(kind).train()
    expected = grads(model)
    report = a3fta.lean(model, level)
    assert not report.left
    assert far(grads(model), expected) <= max(1e-5, kind.tolerance / 100)


def test_lora_beside(kind: Kind):
    """PEFT wraps the quantized layer; the adapter is inside, as on a plain one."""
    if kind is KINDS["gguf-q8"] or kind is KINDS["torchao-int8"]:
        pytest.skip("PEFT needs diffusers' quantization_config for this kind")
    model = quantized(kind.make)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    models.randomize(model)
    loss(model).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trained.items() if p.grad is None or not p.grad.any()} == set()
    assert sum(".lora_" in n for n in trained) == 4 * len(a3fta.projections(model))
    assert sum(".adapters." in n for n in trained) == 4 * len(a3fta.projections(model))


def test_a_class_that_cannot_change_is_refused():
    """quanto's layers have names of their own where ours would be."""
    pytest.importorskip("optimum.quanto")
    model = quantized(layers.quanto_int8)
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match="QLinear, which has a 'frozen' of its own"):
        a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert not hasattr(model, "_a3fta")


def test_a_class_that_python_would_not_change_is_seen():
    """In the middle of an injection it would be too late."""

    class Plain:
        pass

    class Refused(abc.ABC, nn.Linear):
        pass

    class Taken(Plain, nn.Linear):
        pass

    assert "class cannot be changed" in str(why_not_adaptable(Refused(2, 2)))
    with pytest.raises(TypeError, match="object layout differs"):
        adapt(Refused(2, 2))
    layer = Taken(2, 2)
    assert why_not_adaptable(layer) is None
    adapt(layer)
