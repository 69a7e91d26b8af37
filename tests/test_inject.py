"""inject and eject: identity at the start, only adapters train, no trace at the end."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from diffusers.models import attention_processor as stock
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import BottleneckAdapter
from a3fta_kernels.projection import AdaptedProjection, stock_class
from a3fta_kernels.tree import denoiser

from . import models
from .models import assert_unchanged, attention_processors, snapshot

CONFIG = a3fta.AdapterConfig(rank=4)
SITES = 8  # attention layers of the SD1.5-like model


def train_step(model, name, lr=0.1):
    optimizer = torch.optim.SGD(a3fta.trainable_parameters(model), lr=lr)
    models.run(model, name).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", models.MODELS)
class TestEveryModel:
    def test_untrained_equals_stock_bit_for_bit(self, name, device):
        # on CUDA PyTorch picks its products by what requires a gradient, too: as inject freezes
        model = models.build(name, device=device).requires_grad_(False)
        with torch.no_grad():
            expected = models.run(model, name, device=device)
            report = a3fta.inject(model, CONFIG, backend="reference")
            assert torch.equal(models.run(model, name, device=device), expected)
            assert len(report.layers) == len(a3fta.projections(model))
            models.randomize(model)
            assert not torch.allclose(models.run(model, name, device=device), expected, atol=1e-3)

    def test_every_backend_agrees(self, name):
        model = models.build(name)
        a3fta.inject(model, CONFIG, backend="reference")
        models.randomize(model)
        results = []
        for backend in ("reference", "auto"):
            for layer in a3fta.projections(model).values():
                layer.backend = backend
            results.append(models.run(model, name))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)

    def test_train_then_eject_restores_bit_for_bit(self, name):
        model = models.build(name).train()
        before = snapshot(model)
        with torch.no_grad():
            expected = models.run(model, name)
        a3fta.inject(model, CONFIG)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(".adapters.default." in n for n in trained)
        train_step(model, name)
        for key, parameter in model.named_parameters():
            if key not in trained:
                assert parameter.grad is None, key
            elif "w_up" in key or "b_up" in key:
                assert parameter.grad.abs().sum() > 0, key
            else:
                # w_up is zero at the start, and with it what comes through it
                assert parameter.grad.abs().sum() == 0, key
        model.zero_grad()
        train_step(model, name)
        assert all(p.grad.abs().sum() > 0 for p in a3fta.trainable_parameters(model))
        with torch.no_grad():
            assert not torch.equal(models.run(model, name), expected)
        a3fta.eject(model)
        assert_unchanged(model, before)
        with torch.no_grad():
            assert torch.equal(models.run(model, name), expected)

    def test_state_dicts_of_stock_and_injected_fit(self, name):
        plain, model = models.build(name), models.build(name, seed=3)
        a3fta.inject(model, CONFIG)
        result = model.load_state_dict(plain.state_dict(), strict=False)
        assert not result.unexpected_keys and result.missing_keys
        assert all(".adapters.default." in key for key in result.missing_keys)
        models.randomize(model)
        other = models.build(name, seed=4)
        result = other.load_state_dict(model.state_dict(), strict=False)
        assert not result.missing_keys and result.unexpected_keys
        assert all(".adapters.default." in key for key in result.unexpected_keys)
        with torch.no_grad():
            assert torch.equal(models.run(other, name), models.run(plain, name))


def one_level(down, up):
    return dict(block_out_channels=(32,), down_block_types=(down,), up_block_types=(up,))


SHALLOW = {
    "sd15": one_level("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    "kandinsky": one_level("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"),
    "unet2d": one_level("AttnDownBlock2D", "AttnUpBlock2D"),
    "flux": dict(num_layers=1, num_single_layers=1),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_fullgraph_compile(name):
    torch._dynamo.reset()
    model = models.build(name, **SHALLOW[name])
    a3fta.inject(model, CONFIG)
    models.randomize(model)
    expected = models.run(model, name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = models.run(compiled, name)
    torch.testing.assert_close(y, expected)
    wanted = list(a3fta.trainable_parameters(compiled))
    got = torch.autograd.grad(y.square().sum(), wanted)
    want = torch.autograd.grad(expected.square().sum(), wanted)
    for x, z in zip(got, want, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-3)


def test_both_projections_of_joint_attention():
    """SD3's blocks, with the stock processors: text and image both pass an adapter."""
    model = models.sd3().eval()
    inputs = models.sd3_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        report = a3fta.inject(model, CONFIG, backend="reference")
        assert torch.equal(model(**inputs).sample, expected)
    kinds = [name.rsplit("attn.", 1)[1] for name in report.layers]
    assert kinds == ["to_out.0", "to_add_out", "to_out.0"]  # the last block drops the text
    assert set(report.left_processors.values()) == {"JointAttnProcessor2_0"}
    models.randomize(model)
    model(**inputs).sample.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in a3fta.trainable_parameters(model))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_attention_masks(name):
    model = models.build(name)
    with torch.no_grad():
        expected = models.run(model, name, masked=True)
        assert not torch.equal(models.run(model, name), expected)
        a3fta.inject(model, CONFIG, backend="reference")
        assert torch.equal(models.run(model, name, masked=True), expected)


def test_report():
    model = models.build("sd15")
    total = sum(p.numel() for p in model.parameters())
    report = a3fta.inject(model, CONFIG)
    assert report.name == "default" and report.families == {"unet_condition": SITES}
    layer = report.layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    assert (layer.channels, layer.rank, layer.fused, layer.why_not_fused) == (64, 4, True, "")
    assert layer.backend in ("reference", "native")
    assert layer.parameters == 2 * 64 * 4 + 4 + 64
    assert report.parameters_added == SITES * layer.parameters
    assert report.parameters_total == total
    assert not report.left_processors and not report.unadapted
    text = str(report)
    assert f"{SITES} projections of unet_condition" in text and "C=64 R=4" in text


class Foreign(stock.AttnProcessor2_0):
    """A processor that is not in any table."""


def test_unknown_processors_stay_and_are_reported():
    model = models.build("sd15")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    foreign = Foreign()
    model.get_submodule(name).set_processor(foreign)
    report = a3fta.inject(model, CONFIG)
    assert report.left_processors == {name: "Foreign"} and len(report.processors) == SITES - 1
    assert len(report.layers) == SITES
    assert model.get_submodule(name).processor is foreign
    assert "processor Foreign left as it is" in str(report)
    a3fta.eject(model)
    assert model.get_submodule(name).processor is foreign


def test_layers_that_are_not_plain_are_reported():
    class Odd(nn.Linear):
        pass

    model = models.build("sd15")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    model.get_submodule(name).__class__ = Odd
    report = a3fta.inject(model, CONFIG)
    assert not report.layers[name].fused and "class Odd" in report.layers[name].why_not_fused
    assert "apart from the projection" in str(report)
    projection = a3fta.projections(model)[name]
    assert stock_class(projection) is Odd and isinstance(projection, Odd)


def test_attention_without_a_projection_is_reported():
    model = models.build("sd15")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    model.get_submodule(name).to_out = None
    report = a3fta.inject(model, CONFIG)
    assert list(report.unadapted) == [name] and len(report.layers) == SITES - 1


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (r"attn1", 4),
        (r"^mid_block.*attn2", 1),
        (("attn2",), 4),
        (["mid_block", "up_blocks.0"], 6),
        (("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",), 1),
    ],
)
def test_targets(targets, count):
    model = models.build("sd15")
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4, targets=targets))
    assert len(report.layers) == len(a3fta.projections(model)) == count
    assert len(report.unadapted) == SITES - count
    assert set(report.unadapted.values()) == {"not in targets"}
    plain = [p for p in attention_processors(model).values() if type(p) is stock.AttnProcessor2_0]
    assert len(plain) == SITES - count


def test_rank_pattern():
    model = models.build("sd15")
    config = a3fta.AdapterConfig(rank=4, rank_pattern={r"mid_block": 2, r"attn2": 8})
    a3fta.inject(model, config)
    for name, layer in a3fta.projections(model).items():
        rank = 2 if "mid_block" in name else 8 if "attn2" in name else 4
        assert layer.adapters["default"].w_down.shape == (rank, 64)


def test_attn_processors_idiom():
    model = models.build("sd15")
    before = snapshot(model)
    with torch.no_grad():
        expected = models.run(model, "sd15")
        found = a3fta.attn_processors(model, CONFIG)
        assert set(found) == set(model.attn_processors)
        assert attention_processors(model) == before["processors"]
        model.set_attn_processor(found)
        assert all(type(p).__name__ == "A3FTAAttnProcessor" for p in model.attn_processors.values())
        assert torch.allclose(models.run(model, "sd15"), expected, atol=1e-5)
    assert len(a3fta.projections(model)) == SITES
    a3fta.eject(model)
    assert_unchanged(model, before)


def test_attn_processors_where_diffusers_has_no_setter():
    model = models.build("unet2d")
    with torch.no_grad():
        expected = models.run(model, "unet2d")
        for key, processor in a3fta.attn_processors(model, CONFIG, backend="reference").items():
            model.get_submodule(key.removesuffix(".processor")).set_processor(processor)
        assert torch.equal(models.run(model, "unet2d"), expected)
    kinds = {type(p).__name__ for p in attention_processors(model).values()}
    assert kinds == {"A3FTAAttnProcessor"}


def test_eject_leaves_processors_that_came_later():
    model = models.build("sd15")
    a3fta.inject(model, CONFIG)
    model.set_attn_processor(stock.AttnProcessor())
    a3fta.eject(model)
    assert {type(p) for p in model.attn_processors.values()} == {stock.AttnProcessor}


def test_requires_grad_is_restored():
    model = models.build("sd15")
    model.conv_in.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    a3fta.inject(model, CONFIG)
    # the user may thaw parts of the trunk: a second adapter leaves that alone
    model.conv_out.requires_grad_(True)
    a3fta.inject(model, CONFIG, name="second")
    assert model.conv_out.weight.requires_grad
    a3fta.eject(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_several_names():
    model = models.build("sd15")
    with torch.no_grad():
        stock_output = models.run(model, "sd15")
        a3fta.inject(model, CONFIG, name="first")
        models.randomize(model, "first")
        first = models.run(model, "sd15")
        a3fta.inject(model, a3fta.AdapterConfig(rank=2, targets="attn1"), name="second")
        assert torch.allclose(models.run(model, "sd15"), first, atol=1e-5)
        models.randomize(model, "second")
        assert not torch.allclose(models.run(model, "sd15"), first, atol=1e-3)
        a3fta.eject(model, "second")
        assert torch.equal(models.run(model, "sd15"), first)
        assert all(type(x) is AdaptedProjection for x in a3fta.projections(model).values())
        a3fta.eject(model, "first")
        assert torch.equal(models.run(model, "sd15"), stock_output)
        assert not a3fta.projections(model)


def test_part_of_a_model_then_the_whole():
    model = models.build("sd15")
    before = snapshot(model)
    a3fta.inject(model.mid_block, CONFIG, name="part")
    assert len(a3fta.projections(model)) == 2
    a3fta.inject(model, CONFIG, name="whole")
    assert len(list(a3fta.trainable_parameters(model))) == (2 + SITES) * 4
    a3fta.eject(model)
    assert_unchanged(model, before)


def test_deepcopy_is_independent():
    model = models.build("sd15")
    a3fta.inject(model, CONFIG)
    models.randomize(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = models.run(model, "sd15")
        assert torch.equal(models.run(twin, "sd15"), expected)
        a3fta.eject(twin)
        assert torch.equal(models.run(twin, "sd15"), models.run(models.build("sd15"), "sd15"))
        assert torch.equal(models.run(model, "sd15"), expected)
    assert all(p.requires_grad for p in twin.parameters())
    ours, theirs = (set(map(id, attention_processors(m).values())) for m in (model, twin))
    assert not ours & theirs


def test_pickle():
    model = models.build("sd15")
    a3fta.inject(model, CONFIG)
    models.randomize(model)
    twin = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(models.run(twin, "sd15"), models.run(model, "sd15"))
    a3fta.eject(twin)
    assert not a3fta.projections(twin)


def test_wrappers_and_pipelines_are_seen_through():
    model = models.build("sd15")
    pipe = types.SimpleNamespace(unet=model, components={})
    a3fta.inject(pipe, CONFIG)
    assert len(a3fta.projections(model)) == SITES
    compiled = torch.compile(model, backend="eager")
    parallel = nn.DataParallel(compiled)
    transformer = types.SimpleNamespace(transformer=model)
    for wrapper in (pipe, compiled, parallel, transformer):
        assert denoiser(wrapper) is model
        assert len(a3fta.projections(wrapper)) == SITES
        assert len(list(a3fta.trainable_parameters(wrapper))) == 4 * SITES
    a3fta.eject(parallel)
    assert not a3fta.projections(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_adapter_dtype(dtype):
    model = models.build("sd15", dtype=dtype)
    a3fta.inject(model, CONFIG)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, dtype=torch.bfloat16), name="narrow")
    for layer in a3fta.projections(model).values():
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert layer.adapters["default"].w_up.dtype == expected
        assert layer.adapters["narrow"].w_up.dtype == torch.bfloat16


def test_offloaded_weights_get_their_adapter_where_they_compute():
    accelerate = pytest.importorskip("accelerate")
    model = models.build("sd15")
    with torch.no_grad():
        expected = models.run(model, "sd15")
        accelerate.cpu_offload(model, execution_device="cpu")
        report = a3fta.inject(model, CONFIG, backend="reference")
        assert any("meta device" in note and "cpu" in note for note in report.notes)
        assert {layer.backend for layer in report.layers.values()} == {"reference"}
        adapters = [m for m in model.modules() if isinstance(m, BottleneckAdapter)]
        assert len(adapters) == SITES and all(a.w_up.device.type == "cpu" for a in adapters)
        assert torch.equal(models.run(model, "sd15"), expected)
        models.randomize(model)
        assert not torch.allclose(models.run(model, "sd15"), expected, atol=1e-3)
        a3fta.eject(model)
        assert torch.equal(models.run(model, "sd15"), expected)


def test_seed_decides_the_adapter():
    made = []
    for _ in range(2):
        model = models.build("sd15")
        torch.manual_seed(11)
        a3fta.inject(model, CONFIG)
        made.append([p.clone() for p in a3fta.trainable_parameters(model)])
    assert all(torch.equal(x, y) for x, y in zip(*made, strict=True))
    assert any(p.abs().sum() > 0 for p in made[0])
