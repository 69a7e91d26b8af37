"""A lean model beside everything else that is done to models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import a3fta_kernels as a3fta

from .. import models
from .common import MODELS, assert_same_step, batch_for, step, trained

LEVELS = pytest.mark.parametrize("level", ["exact", "recompute", "block"])


@LEVELS
def test_eject_and_inject_again(level):
    stock = models.build("sd15")
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    a3fta.lean(model, level)
    a3fta.eject(model)
    torch.testing.assert_close(models.run(model, "sd15"), models.run(stock, "sd15"))
    steps = []
    for again in (model, stock):
        torch.manual_seed(0)
        a3fta.inject(again, a3fta.AdapterConfig(rank=4))
        models.randomize(again)
        steps.append(step(again.train(), models.inputs("sd15")))
    assert_same_step(*steps, 1e-4)


@LEVELS
def test_deep_copies_and_pickles(level):
    model, batch = trained("sd15"), batch_for("sd15")
    a3fta.lean(model, level)
    expected = step(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = step(other, batch)
        assert_same_step(found, expected, 1e-12)
        assert found.kept == expected.kept
    a3fta.lean(copy.deepcopy(model), "off")
    assert step(model, batch).kept == expected.kept


def test_save_pretrained_and_adapters(tmp_path):
    model, batch = trained("sd15", dtype=torch.float32), models.inputs("sd15")
    a3fta.save_adapter(model, tmp_path / "adapter")
    expected = step(model, batch)
    a3fta.lean(model, "block")
    model.save_pretrained(tmp_path / "lean")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "lean").train()
    a3fta.load_adapter(loaded, tmp_path / "adapter")
    a3fta.lean(loaded, "exact")
    assert_same_step(step(loaded, batch), expected, 1e-4)


@LEVELS
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(level, reentrant):
    model, batch = trained("sd15"), batch_for("sd15")
    expected = step(model, batch)
    a3fta.lean(model, level)
    if reentrant:
        batch["sample"].requires_grad_(True)

        def checkpoint(function, *args):
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

        model.enable_gradient_checkpointing(checkpoint)
    else:
        model.enable_gradient_checkpointing()
    assert_same_step(step(model, batch), expected, 1e-12)


@LEVELS
def test_autocast(level):
    """The backward computes again what the forward computed, in the same dtype."""
    model, batch = trained("sd15", dtype=torch.float32), models.inputs("sd15")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(model, batch)
    a3fta.lean(model, level)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch).sample
    output.float().square().mean().backward()  # outside of autocast, as trainers do
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert (grads[name] - grad).norm() <= 0.1 * grad.norm() + 1e-6, name


@LEVELS
def test_a_second_backward_through_one_forward(level):
    model, batch = trained("sd15"), batch_for("sd15")
    a3fta.lean(model, level)
    loss = model(**batch).sample.square().mean()
    parameters = list(a3fta.trainable_parameters(model))
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_two_forwards_before_one_backward():
    model = trained("sd15")
    batches = [batch_for("sd15"), batch_for("sd15")]
    batches[1]["sample"] = batches[1]["sample"] * 0.5
    sums = []
    for level in ("off", "block"):
        a3fta.lean(model, level)
        sum(model(**b).sample.square().mean() for b in batches).backward()
        sums.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    for name, grad in sums[0].items():
        torch.testing.assert_close(sums[1][name], grad, rtol=1e-10, atol=1e-14)


def test_saved_tensors_moved_elsewhere():
    """What is kept goes through autograd: PyTorch's own hooks can move it."""
    model, batch = trained("sd15"), batch_for("sd15")
    expected = step(model, batch)
    a3fta.lean(model, "block")
    with torch.autograd.graph.save_on_cpu():
        output = model(**batch).sample
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in expected.grads:
            torch.testing.assert_close(parameter.grad, expected.grads[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "placement"),
    [("sd15", "pre"), ("sd15", "parallel"), ("flux", "parallel"), ("z_image", "parallel")],
)
def test_compiled_in_one_graph(name, placement):
    small: dict[str, Any] = {
        "block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None,
    }  # fmt: skip
    if name == "z_image":
        model, batch = MODELS[name][0]().train(), MODELS[name][1]()
    else:
        model = models.build(name, **(small if name == "sd15" else {})).train()
        batch = models.inputs(name)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, placement=placement))
    models.randomize(model)
    expected = step(model, batch)
    kept = {}
    for level in ("off", "exact", "block") if placement == "pre" else ("block",):
        torch._dynamo.reset()
        a3fta.lean(model, level)
        compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
        found = step(compiled, batch)
        found = found._replace(
            grads={n.removeprefix("_orig_mod."): g for n, g in found.grads.items()}
        )
        assert_same_step(found, expected, 1e-3)
        kept[level] = found.kept
    assert kept["block"] < 0.5 * expected.kept
    if placement == "pre":
        assert kept["exact"] < kept["off"] and kept["block"] < 0.5 * kept["off"]
