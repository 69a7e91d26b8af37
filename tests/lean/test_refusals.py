"""Bad input: a clear answer, and a model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta

from .. import models
from .common import trained

BAD = [
    (dict(level="fast"), ValueError, r"level: expected one of off, exact, .*, got 'fast'"),
    (dict(norms="int4"), ValueError, r"norms: expected one of input, int8, got 'int4'"),
    (dict(level="off", norms="int8"), ValueError, r"norms: expected 'input' beside level 'off'"),
    (dict(levels="exact"), TypeError, r"levels: expected a mapping"),
    (dict(levels={"mid": "fast"}), ValueError, r"levels\['mid'\]: expected one of off"),
    (dict(levels={"(": "exact"}), ValueError, r"levels: expected regular expressions"),
    (dict(levels={"nowhere": "exact"}), ValueError, r"levels: expected patterns that match .*conv"),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_arguments(options, error, message):
    model = trained("sd15")
    before = models.snapshot(model)
    with pytest.raises(error, match=message):
        a3fta.lean(model, **options)
    models.assert_unchanged(model, before)


def test_a_model_that_trains_as_a_whole():
    model = models.build("sd15")
    with pytest.raises(ValueError, match=r"every parameter trains; call inject first"):
        a3fta.lean(model)


def test_a_model_of_which_nothing_is_known():
    with pytest.raises(ValueError, match=r"got a Sequential with none"):
        a3fta.lean(nn.Sequential(nn.Linear(3, 3)).requires_grad_(False))
    with pytest.raises(TypeError, match=r"model: expected a diffusers model"):
        a3fta.lean("unet")


def test_a_replaced_forward_is_refused_before_anything_changes():
    model = trained("sd15")
    model.mid_block.resnets[1].forward = lambda x, temb: x
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=r"whose forward was replaced"):
        a3fta.lean(model, "exact")
    models.assert_unchanged(model, before)


def test_a_level_without_a_gain_says_so():
    model = trained("flux", "lora")
    report = a3fta.lean(model, "exact")
    assert not report.levels and "nothing of this model keeps less" in str(report)


def test_the_report_names_what_was_left():
    model = trained("sd15")
    block = model.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.set_processor(type("Other", (), {"__call__": lambda *_, **__: None})())
    model.conv_in.padding_mode = "circular"
    report = a3fta.lean(model, "block")
    assert report.left == {
        "conv_in": "padding (1, 1) of mode 'circular'",
        "mid_block.attentions.0.transformer_blocks.0": "its attention processor is a Other",
    }
    text = str(report)
    assert "left alone: conv_in: padding" in text and "x BasicTransformerBlock, block" in text


def test_no_second_derivative():
    model = trained("sd15", dtype=torch.float32)
    a3fta.lean(model, "block")
    loss = model(**models.inputs("sd15")).sample.square().sum()
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(loss, list(a3fta.trainable_parameters(model)), create_graph=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda block: block.attention.set_processor(type("Other", (), {})()),
            "its attention processor is a Other",
        ),
        (lambda block: block.attention.fuse_projections(), "its projections are fused"),
        (
            lambda block: setattr(block.attention.processor, "_parallel_config", 1),
            "its attention is spread over devices",
        ),
        (
            lambda block: setattr(block, "feed_forward", nn.Linear(32, 32, False)),
            "its feed-forward is a Linear",
        ),
        (
            lambda block: block.ffn_norm2.register_forward_hook(lambda *_: None),
            "a module inside carries hooks (ffn_norm2)",
        ),
    ],
)
def test_blocks_of_z_image_that_stay_stock(change, reason):
    model = trained("z_image")
    change(model.layers[1])
    model.requires_grad_(False)
    assert a3fta.lean(model, "block").left == {"layers.1": reason}


@pytest.mark.parametrize("level", ["recompute", "block"])
def test_tokens_with_noise_of_their_own_are_computed_as_before(level):
    """Z-Image's omni mode, in which an image to draw is beside images to read."""
    model = trained("z_image")
    draw = torch.Generator().manual_seed(0)
    x, noisy, clean = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((2, 6, 32), (2, 32), (2, 32))
    )
    turns = torch.polar(torch.ones(2, 6, 8), torch.randn(2, 6, 8, generator=draw))
    chosen = torch.tensor([[0, 1, 1, 0, 1, 0]] * 2)

    def run():
        y = model.layers[0](x, None, turns, None, chosen, noisy, clean)
        y.square().mean().backward()
        found = [p.grad.clone() for p in model.layers[0].parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return [y.detach(), *found]

    stock = run()
    a3fta.lean(model, level)
    found = run()
    assert len(stock) > 3 and len(found) == len(stock)
    for ours, theirs in zip(found, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_rms_norm_over_two_dimensions_stays_stock():
    from diffusers.models.normalization import RMSNorm

    model = nn.ModuleDict({"norm": RMSNorm((3, 4), eps=1e-6), "one": RMSNorm(4, eps=1e-6)})
    report = a3fta.lean(model.requires_grad_(False), "exact")
    assert report.left == {"norm": "it normalises over 2 dimensions"}
    assert list(report.levels) == ["one"]
