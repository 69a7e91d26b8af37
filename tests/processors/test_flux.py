"""The Flux family: where attention is handed over, and what the adapters there compute."""

from __future__ import annotations

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.processors import family_of

from .. import models

CONFIG = a3fta.AdapterConfig(rank=4)
SITES = {
    "transformer_blocks.0.attn.to_out.0": None,
    "transformer_blocks.0.attn.to_add_out": None,
    "transformer_blocks.1.attn.to_out.0": None,
    "transformer_blocks.1.attn.to_add_out": None,
    "single_transformer_blocks.0.proj_out": (0, 32),
    "single_transformer_blocks.1.proj_out": (0, 32),
}


def adapted_by_hand(model: nn.Module, adapters: dict[str, nn.Module]) -> nn.Module:
    """The stock model with h' = h + adapter(h) written out where attention ends."""

    def formula(x, h):
        z = F.gelu(F.linear(h, x.w_down, x.b_down))
        return h + x.scale * F.linear(z, x.w_up, x.b_up)

    for name, adapter in adapters.items():
        owner = model.get_submodule(name.removesuffix(".proj_out"))
        if isinstance(owner, FluxSingleTransformerBlock):
            owner.attn.register_forward_hook(lambda _, i, h, x=adapter: formula(x, h))
        else:
            owner.register_forward_pre_hook(lambda _, i, x=adapter: formula(x, i[0]))
    return model


def test_sites():
    model = models.build("flux")
    family = family_of(model)
    assert family.name == "flux"
    found = {n: site.columns for site in family.sites(model) for n in site.projections}
    assert found == SITES
    for site in family.sites(model):
        assert model.get_submodule(site.name) is site.attention
        for name, layer in site.projections.items():
            assert model.get_submodule(name) is layer


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_numbers_and_gradients_of_the_method_written_out(backend):
    dtype = torch.float64
    model, plain = (models.build("flux", dtype=dtype) for _ in range(2))
    a3fta.inject(model, CONFIG, backend=backend)
    models.randomize(model)
    layers = a3fta.projections(model)
    assert set(layers) == set(SITES)
    adapters = {name: layer.adapters["default"] for name, layer in layers.items()}
    adapted_by_hand(plain.requires_grad_(False), adapters)
    wanted = list(a3fta.trainable_parameters(model))
    assert len(wanted) == 4 * len(SITES)
    y, expected = (models.run(m, "flux", dtype=dtype) for m in (model, plain))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    got, want = (torch.autograd.grad(x.square().mean(), wanted) for x in (y, expected))
    for one, other in zip(got, want, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_report():
    model = models.build("flux")
    total = sum(p.numel() for p in model.parameters())
    report = a3fta.inject(model, CONFIG)
    assert report.families == {"flux": 6} and not report.unadapted and not report.processors
    for name, columns in SITES.items():
        layer = report.layers[name]
        assert (layer.channels, layer.outputs, layer.columns) == (32, 32, columns)
        assert layer.fused and layer.parameters == 2 * 32 * 4 + 4 + 32
    assert report.parameters_total == total
    attention = {name: "FluxAttnProcessor" for name in models.attention_processors(model)}
    assert len(attention) == 4 and report.left_processors == report.attention == attention
    text = str(report)
    assert "4 x C=32 R=4" in text and "2 x C=32 (input columns 0 to 31) R=4" in text


@pytest.mark.parametrize(
    ("targets", "count"), [(r"single_.*proj_out", 2), (("to_add_out",), 2), (("attn",), 4)]
)
def test_targets(targets, count):
    model = models.build("flux")
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=targets))
    assert len(report.layers) == len(a3fta.projections(model)) == count
    # the model has a projection of that name of its own, which reads no attention
    assert type(model.proj_out) is nn.Linear


def test_a_block_then_the_whole():
    model = models.build("flux")
    before = models.snapshot(model)
    report = a3fta.inject(model.single_transformer_blocks[0], CONFIG, name="part")
    assert {name: layer.columns for name, layer in report.layers.items()} == {"proj_out": (0, 32)}
    a3fta.inject(model, CONFIG, name="whole")
    assert len(list(a3fta.trainable_parameters(model))) == (1 + len(SITES)) * 4
    a3fta.eject(model)
    models.assert_unchanged(model, before)


def test_every_processor_stays():
    model = models.build("flux")
    before = models.attention_processors(model)
    processors = a3fta.attn_processors(model, CONFIG)
    assert set(processors) == set(model.attn_processors)
    model.set_attn_processor(processors)
    stays = dict.fromkeys(before, "FluxAttnProcessor")
    assert a3fta.set_attention(model, "sdpa") == stays
    reason = "its processor is of class FluxAttnProcessor"
    assert a3fta.fuse_qkv(model) == dict.fromkeys(before, reason)
    assert models.attention_processors(model) == before


def test_beside_diffusers_fused_projections():
    model = models.build("flux")
    a3fta.inject(model, CONFIG)
    models.randomize(model)
    with torch.no_grad():
        expected = models.run(model, "flux")
        model.fuse_qkv_projections()
        torch.testing.assert_close(models.run(model, "flux"), expected)


def test_its_controlnet():
    torch.manual_seed(0)
    model = diffusers.FluxControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    for block in (*model.controlnet_blocks, *model.controlnet_single_blocks):
        nn.init.normal_(block.weight)  # they are made zero
    inputs = models.inputs("flux")
    del inputs["guidance"]

    def run():
        with torch.no_grad():
            found = model(**inputs, controlnet_cond=inputs["hidden_states"])
        return (*found.controlnet_block_samples, *found.controlnet_single_block_samples)

    expected = run()
    report = a3fta.inject(model, CONFIG, backend="reference")
    assert report.families == {"flux": 3}
    assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))
    models.randomize(model)
    assert not any(torch.allclose(x, y) for x, y in zip(run(), expected, strict=True))
