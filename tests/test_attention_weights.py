"""`train="adapter+attention"`: what trains, what the model has when, and what stays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import AdapterConfig

from . import models
from .adapter_files import load, refused

BOTH = "adapter+attention"


def build(name: str = "sd15") -> nn.Module:
    return models.sd3() if name == "sd3" else models.build(name)


def run(model: nn.Module, name: str = "sd15") -> Tensor:
    return model(**(models.sd3_inputs() if name == "sd3" else models.inputs(name))).sample


def output(model: nn.Module, name: str = "sd15") -> Tensor:
    with torch.no_grad():
        return run(model, name)


def attention(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of attention, by the names that diffusers gives them."""
    parts = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out", "add_q_proj", "add_k_proj")
    parts = (*parts, "add_v_proj")
    found = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
    return {n: p for n, p in found.items() if n.rpartition(".")[0].endswith(parts)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def injected(name: str = "sd15", **options: Any) -> nn.Module:
    model = build(name)
    a3fta.inject(model, AdapterConfig(rank=4), train=BOTH, **options)
    return model


def trained(name: str = "sd15", **options: Any) -> nn.Module:
    """As after some steps."""
    model = injected(name, **options)
    models.randomize(model, std=0.3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for p in attention(model).values():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("name", ["sd15", "kandinsky", "unet2d", "sd3", "flux"])
def test_what_trains(name: str):
    model = build(name)
    stock, report = output(model, name), None
    report = a3fta.inject(model, AdapterConfig(rank=4), train=BOTH, backend="reference")
    assert torch.equal(output(model, name), stock)
    wanted = attention(model)
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trains if ".adapters." not in n} == set(wanted)
    assert "proj_out.weight" not in " ".join(wanted)
    listed = list(a3fta.trainable_parameters(model))
    assert sorted(map(id, listed)) == sorted(map(id, trains.values()))
    count = sum(p.numel() for p in wanted.values())
    mib = sum(p.nbytes for p in wanted.values()) / 2**20
    text = f"{count:,} parameters of attention train too; .* on the CPU ({mib:.1f} MiB)"
    assert any(text.replace(".* on", "their stock values are kept on") in n for n in report.notes)

    model.train()
    run(model, name).square().mean().backward()
    for key, parameter in wanted.items():
        assert parameter.grad is not None, key
    assert sum(p.grad.any().item() for p in wanted.values()) > 0.7 * len(wanted)


def test_targets_choose_the_attention_too():
    model = build()
    a3fta.inject(model, AdapterConfig(rank=4, targets=("attn2",), train=BOTH))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(".attn2." in n for n in trains)
    assert {n for n in attention(model) if ".attn2." in n} == {
        n for n in trains if "adapt" not in n
    }


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_eject_brings_the_stock_model_back(name: str):
    model = build(name)
    before, stock = models.snapshot(model), output(model, name)
    a3fta.inject(model, AdapterConfig(rank=4), train=BOTH)
    with torch.no_grad():
        for p in a3fta.trainable_parameters(model):
            p.add_(0.1)
    assert not torch.allclose(output(model, name), stock, atol=1e-3)
    a3fta.eject(model)
    models.assert_unchanged(model, before)
    assert torch.equal(output(model, name), stock)


def test_off_is_the_stock_model_and_on_the_trained_one():
    model = trained(backend="reference")
    now, stock = output(model), output(build())
    weights = {n: p.detach().clone() for n, p in attention(model).items()}
    assert not torch.allclose(now, stock, atol=1e-3)
    with a3fta.disabled(model):
        assert torch.equal(output(model), stock)
        assert not any(p.requires_grad for p in attention(model).values())
        with a3fta.disabled(model):
            assert torch.equal(output(model), stock)
        assert torch.equal(output(model), stock)
    assert torch.equal(output(model), now)
    a3fta.disable_adapters(model)
    with torch.no_grad():  # what happens to the weights meanwhile is not taken for the stock's
        next(iter(attention(model).values())).add_(1)
    a3fta.enable_adapters(model)
    assert torch.equal(output(model), now)
    a3fta.set_adapters(model, [])
    assert torch.equal(output(model), stock)
    a3fta.set_adapters(model, "default")
    assert torch.equal(output(model), now)
    for name, p in attention(model).items():
        assert torch.equal(p, weights[name]) and p.requires_grad


def test_the_teacher_between_forward_and_backward():
    model = trained().train()
    run(model).square().mean().backward()
    expected = [p.grad.clone() for p in a3fta.trainable_parameters(model)]
    model.zero_grad(set_to_none=True)
    loss = run(model).square().mean()
    with a3fta.disabled(model), torch.inference_mode():
        run(model)
    loss.backward()
    for p, grad in zip(a3fta.trainable_parameters(model), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("away", [False, True], ids=["on", "off"])
def test_its_file_comes_back(away: bool, tmp_path):
    model = trained()
    now, stock = state(model), output(build())
    if away:
        a3fta.disable_adapters(model)
    a3fta.save_adapter(model, tmp_path)
    other = build()
    assert load(other, tmp_path).train == BOTH
    torch.testing.assert_close(state(other), now, rtol=0, atol=0)
    with a3fta.disabled(other):
        assert torch.equal(output(other), stock)
    with torch.no_grad():
        for p in a3fta.trainable_parameters(other):
            p.zero_()
    load(other, tmp_path)  # into the adapter that is there
    torch.testing.assert_close(state(other), now, rtol=0, atol=0)
    a3fta.eject(other)
    assert torch.equal(output(other), stock)


def test_files_of_the_other_kind_and_of_another_base(tmp_path):
    a3fta.save_adapter(trained(), tmp_path / "both")
    alone = build()
    a3fta.inject(alone, AdapterConfig(rank=4))
    a3fta.save_adapter(alone, tmp_path / "alone")
    refused(alone, tmp_path / "both", "train='adapter', as .* found train='adapter.attention'")
    refused(injected(), tmp_path / "alone", "train='adapter.attention', .* found train='adapter'")
    refused(models.build("sd15", seed=3), tmp_path / "both", "an adapter for this base")


def test_one_adapter_at_a_time_trains_attention():
    model = trained(backend="reference")
    alone, stock = output(model), output(build())
    with pytest.raises(ValueError, match=r"to_q.weight, which trains with adapter 'default'"):
        a3fta.inject(model, AdapterConfig(rank=2), name="second", train=BOTH)
    a3fta.inject(model, AdapterConfig(rank=2), name="second", backend="reference")
    models.randomize(model, "second", std=0.3)
    together = output(model)
    assert not torch.allclose(together, alone, atol=1e-3)
    a3fta.set_adapters(model, "second")  # on the stock attention
    other = build()
    a3fta.inject(other, AdapterConfig(rank=2), name="second", backend="reference")
    models.randomize(other, "second", std=0.3)
    assert torch.equal(output(model), output(other))
    a3fta.eject(model, "default")
    assert torch.equal(output(model), output(other))
    assert not any(p.requires_grad for p in attention(model).values())
    a3fta.eject(model)
    assert torch.equal(output(model), stock)


def test_set_trainable_goes_with_the_adapter():
    model = injected()
    a3fta.inject(model, AdapterConfig(rank=2), name="second")
    count = len(list(a3fta.trainable_parameters(model)))
    a3fta.set_trainable(model, "second")
    assert not any(p.requires_grad for p in attention(model).values())
    with a3fta.disabled(model):
        pass
    assert not any(p.requires_grad for p in attention(model).values())
    a3fta.set_trainable(model)
    assert len(list(a3fta.trainable_parameters(model))) == count
    next(iter(attention(model).values())).requires_grad_(False)
    with pytest.warns(UserWarning, match="the adapters default are frozen"):
        a3fta.trainable_parameters(model)


def test_copies_and_merging():
    model = build()
    a3fta.inject(model, AdapterConfig(rank=4, activation="identity", bias=False), train=BOTH)
    models.randomize(model, std=0.3)
    with torch.no_grad():
        for p in attention(model).values():
            p.mul_(1.1)
    now, stock = output(model), output(build())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        a3fta.eject(twin)
        assert torch.equal(output(twin), stock)
    assert torch.equal(output(model), now)
    a3fta.merge(model)
    torch.testing.assert_close(output(model), now, rtol=1e-3, atol=1e-4)
    a3fta.unmerge(model)
    a3fta.eject(model)
    assert torch.equal(output(model), stock)


def test_no_file_of_an_adapter_alone(tmp_path):
    model = build()
    a3fta.inject(model, AdapterConfig(rank=4, activation="identity", bias=False), train=BOTH)
    with pytest.raises(ValueError, match="expected an adapter alone to write as a LoRA"):
        a3fta.export_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"layout: expected 'a3fta' .* train='adapter.attention'"):
        a3fta.save_adapter(model, tmp_path / "peft", layout="peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("level", ["exact", "recompute", "block"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_lean_levels_leave_it_its_gradients(name: str, level: str):
    model = trained(name).double().train()
    batch = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in models.inputs(name).items()
    }
    results = []
    for _ in range(2):
        model(**batch).sample.square().mean().backward()
        results.append([p.grad for p in a3fta.trainable_parameters(model)])
        model.zero_grad(set_to_none=True)
        a3fta.lean(model, level)
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12


def test_around_a_lora_of_peft():
    peft = pytest.importorskip("peft")
    model = build()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    stock = output(model)
    a3fta.inject(model, AdapterConfig(rank=4), train=BOTH)
    wanted = attention(model)
    assert any("to_q" in n for n in wanted) and not any("lora" in n for n in wanted)
    assert all(p.requires_grad for p in wanted.values())
    with torch.no_grad():
        for p in wanted.values():
            p.mul_(1.5)
    assert not torch.allclose(output(model), stock, atol=1e-3)
    a3fta.eject(model)
    assert torch.equal(output(model), stock)


def test_the_fused_path_serves_inference():
    model = trained()
    layer = next(iter(a3fta.projections(model).values()))
    assert layer.unfused_reason() == "the layer itself trains"
    with torch.no_grad():
        assert layer.unfused_reason() is None
        now = output(model.eval())
        a3fta.freeze_for_inference(model)
        torch.testing.assert_close(output(model), now)
        with a3fta.disabled(model):
            assert torch.equal(output(model), output(build()))
        torch.testing.assert_close(output(model), now)  # V of the stock weights is not kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.to(torch.float8_e4m3fn), "stored as torch.float8_e4m3fn"),
        (lambda m: m.fuse_qkv_projections(), "call unfuse_qkv_projections first"),
    ],
    ids=["float8", "fused by diffusers"],
)
def test_what_cannot_train_is_refused(change, message: str):
    model = build()
    change(model.mid_block.attentions[0].transformer_blocks[0] if "float8" in message else model)
    before = models.snapshot(model) if "float8" not in message else None
    with pytest.raises(ValueError, match=message):
        a3fta.inject(model, AdapterConfig(rank=2), train=BOTH)
    assert not a3fta.projections(model)
    if before is not None:
        models.assert_unchanged(model, before)


def test_bad_values():
    with pytest.raises(ValueError, match="train: expected one of adapter, adapter"):
        a3fta.inject(build(), train="attention")
    with pytest.raises(ValueError, match="train: expected one of adapter, adapter"):
        AdapterConfig(train="all")
