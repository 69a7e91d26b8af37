"""What happens to a model between a forward and its backward, or around a lean block."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import a3fta_kernels as a3fta
from a3fta_kernels.lean.swapping import LeanModule

from .. import models
from .common import assert_same_step, batch_for, step, trained

STAGED = pytest.mark.parametrize("level", ["recompute", "block"])


def grow(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)


@STAGED
@pytest.mark.parametrize("method", ["a3fta", "lora"])
def test_weights_that_changed_before_the_backward_are_an_error(level, method):
    """As PyTorch says it of the stock model; a rebuilt stream would be another one."""
    model, batch = trained("sd15", method), batch_for("sd15")
    a3fta.lean(model, level)
    loss = model(**batch).sample.square().mean()
    grow(model)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|were changed since"):
        loss.backward()


def test_frozen_weights_too():
    model, batch = trained("sd15"), batch_for("sd15")
    a3fta.lean(model, "block")
    loss = model(**batch).sample.square().mean()
    with torch.no_grad():
        model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(2)
    with pytest.raises(RuntimeError, match="were changed since"):
        loss.backward()


def test_adapters_switched_before_the_backward_are_an_error():
    model, batch = trained("sd15"), batch_for("sd15")
    a3fta.lean(model, "block")
    loss = model(**batch).sample.square().mean()
    with a3fta.disabled(model), pytest.raises(RuntimeError, match="active adapters were changed"):
        loss.backward()


@STAGED
def test_a_functional_call_is_an_error_and_no_wrong_gradient(level):
    model, batch = trained("sd15"), batch_for("sd15")
    a3fta.lean(model, level)
    other = {n: (p * 1.1).detach().requires_grad_(p.requires_grad) for n, p in
             model.named_parameters()}  # fmt: skip
    loss = torch.func.functional_call(model, other, kwargs=batch).sample.square().mean()
    with pytest.raises(RuntimeError, match=r"lean\(model, 'off'\)"):
        loss.backward()


@STAGED
@pytest.mark.parametrize("name", ["attn1", "ff", "attn2.to_out.0", "norm2"])
def test_hooks_inside_a_block_see_what_they_would(level, name):
    """A hook that changes what a module gives: the block goes to the stock forward."""
    steps = []
    for lean in ("off", level):
        model, batch = trained("sd15"), batch_for("sd15")
        block = model.mid_block.attentions[0].transformer_blocks[0]
        calls = []
        block.get_submodule(name).register_forward_hook(
            lambda m, i, y, c=calls: c.append(1) or y * 2
        )
        report = a3fta.lean(model, lean)
        steps.append(step(model, batch))
        assert len(calls) == 1
    assert_same_step(steps[1], steps[0], 1e-12)
    reason = report.left["mid_block.attentions.0.transformer_blocks.0"]
    assert reason == f"a module inside carries hooks ({name})"


def test_lora_on_convolutions_after_lean():
    """PEFT makes its layers of the class of the one they stand beside."""
    steps = []
    for lean in (True, False):
        torch.manual_seed(0)
        model = models.build("sd15").requires_grad_(False).train()
        if lean:
            a3fta.lean(model, "exact")
        model.add_adapter(
            LoraConfig(r=4, target_modules=["to_q", "conv1"], init_lora_weights=False)
        )
        if lean:
            a3fta.lean(model, "block")
        steps.append(step(model, models.inputs("sd15")))
    assert_same_step(*steps, 1e-4)
    model = models.build("sd15").requires_grad_(False)
    a3fta.lean(model, "exact")
    model.add_adapter(LoraConfig(r=4, target_modules=["conv1"]))
    a3fta.lean(model, "off")
    assert not any(isinstance(m, LeanModule) for m in model.modules())


def test_compressed_by_pattern_is_the_same_under_auto():
    found = []
    for options in ({}, dict(level="auto", budget="1GiB", inputs=models.inputs("sd15"))):
        model = trained("sd15", dtype=torch.float32)
        report = a3fta.lean(model, **options, levels={"mid_block": "compressed"})
        found.append({n: s for n, s in report.settings.items() if n.startswith("mid_block")})
    assert found[0] == found[1]
    assert found[0]["mid_block.resnets.0"].norms == "int8"
