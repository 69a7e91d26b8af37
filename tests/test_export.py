"""export_lora: the stock model with the written LoRA computes what the adapted model did."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapters import DESIGNS

from . import models
from .models import assert_unchanged, snapshot

LINEAR = a3fta.AdapterConfig(rank=4, activation="identity", scale=0.7, bias=False)
# a rank of its own for some layers, which is where loaders lose their way
MIXED = a3fta.AdapterConfig(
    rank=4,
    activation="identity",
    scale=0.7,
    bias=False,
    rank_pattern={r"attn2|mid_block|to_add_out|blocks\.1\.proj_out": 3},
)
MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
PIPELINES = ("sd15", "sd2", "sdxl", "sd3", "flux")


def make(name="sd15", config=LINEAR, dtype=torch.float32, **options):
    model = models.build(name, dtype=dtype, **options)
    a3fta.inject(model, config)
    models.randomize(model)
    return model


def run(model, name, dtype=torch.float32):
    with torch.no_grad():
        return models.run(model, name, dtype=dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny pipeline on disk, written once."""
    made: dict[str, Path] = {}

    def folder(name):
        from .examples import pipelines

        kind = "sd" if name in ("sd15", "sd2") else name
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            getattr(pipelines, f"write_{kind}")(made[kind])
        return made[kind] / "pipeline"

    return folder


def load_pipeline(folder, name):
    from diffusers import DiffusionPipeline

    parts = {"unet": models.build("sd2")} if name == "sd2" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if name in ("sd3", "flux"):
        pipeline.transformer.eval()
    return pipeline


def draw(pipeline):
    result = pipeline(
        "a dog", num_inference_steps=2, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return result.images


@pytest.mark.skipif(
    any(importlib.util.find_spec(x) is None for x in ("peft", "transformers")),
    reason="pipelines load LoRAs through peft and transformers",
)
@pytest.mark.parametrize("config", [LINEAR, MIXED], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "diffusers") for name in PIPELINES),
        *((name, "kohya") for name in ("sd15", "sd2", "sdxl")),
    ],
)
def test_a_stock_pipeline_with_the_lora_draws_the_same(name, layout, config, folders, tmp_path):
    pipeline = load_pipeline(folders(name), name)
    plain = draw(pipeline)
    a3fta.inject(pipeline, config)
    denoiser = pipeline.transformer if name in ("sd3", "flux") else pipeline.unet
    models.randomize(denoiser)
    adapted = draw(pipeline)
    assert not torch.allclose(adapted, plain, rtol=1e-2, atol=1e-2)
    path = a3fta.export_lora(pipeline, tmp_path / "lora", layout=layout)
    count = len(a3fta.projections(pipeline))

    stock = load_pipeline(folders(name), name)
    stock.load_lora_weights(tmp_path / "lora")
    denoiser = stock.transformer if name in ("sd3", "flux") else stock.unet
    assert sum(key.endswith("lora_A.default_0.weight") for key in denoiser.state_dict()) == count
    torch.testing.assert_close(draw(stock), adapted, rtol=1e-4, atol=1e-4)
    stock.unload_lora_weights()
    assert torch.equal(draw(stock), plain)
    stock.load_lora_weights(path)
    torch.testing.assert_close(draw(stock), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_the_formula_in_float64(name, tmp_path):
    """Each layer of the stock model with B @ A added to its weight, without anybody's loader."""
    model = make(name, MIXED, torch.float64)
    expected = run(model, name, torch.float64)
    tensors = load_file(a3fta.export_lora(model, tmp_path))
    stock = models.build(name, dtype=torch.float64)
    layers = a3fta.projections(model)
    assert len(tensors) == 2 * len(layers)
    prefix = "transformer" if name == "flux" else "unet"
    with torch.no_grad():
        for key in layers:
            a, b = (tensors[f"{prefix}.{key}.lora_{part}.weight"] for part in "AB")
            assert a.dtype == b.dtype == torch.float64 and len(a) == MIXED.rank_for(key)
            stock.get_submodule(key).weight += b @ a
    torch.testing.assert_close(run(stock, name, torch.float64), expected, rtol=1e-10, atol=1e-10)


def test_kohya_in_float64(tmp_path):
    model = make("kandinsky", MIXED, torch.float64)
    expected = run(model, "kandinsky", torch.float64)
    path = a3fta.export_lora(model, tmp_path, layout="kohya")
    assert path == tmp_path / "kohya_lora.safetensors"
    tensors = load_file(path)
    stock = models.build("kandinsky", dtype=torch.float64)
    layers = a3fta.projections(model)
    assert len(tensors) == 3 * len(layers)
    with torch.no_grad():
        for key in layers:
            name = f"lora_unet_{key.replace('.', '_')}"
            down, up = (tensors[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
            alpha = tensors[f"{name}.alpha"]
            assert alpha.dtype == torch.float32 and alpha.shape == ()
            stock.get_submodule(key).weight += float(alpha) / len(down) * (up @ down)
    actual = run(stock, "kandinsky", torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_peft_reads_it_without_a_pipeline(name, tmp_path):
    pytest.importorskip("peft")
    model = make(name)
    expected = run(model, name)
    path = a3fta.export_lora(model, tmp_path)
    stock = models.build(name)
    stock.load_lora_adapter(
        load_file(path), prefix="transformer" if name == "flux" else "unet", adapter_name="mine"
    )
    torch.testing.assert_close(run(stock, name), expected, rtol=1e-4, atol=1e-5)


def test_a_is_zero_beside_the_columns_of_attention(tmp_path):
    model = make("flux")
    tensors = load_file(a3fta.export_lora(model, tmp_path))
    for i in range(2):
        key = f"single_transformer_blocks.{i}.proj_out"
        layer = a3fta.projections(model)[key]
        a = tensors[f"transformer.{key}.lora_A.weight"]
        assert layer.columns == (0, 32) and a.shape == (4, layer.in_features)
        assert torch.equal(a[:, :32], layer.adapters["default"].w_down) and not a[:, 32:].any()


def test_the_named_adapter_alone(tmp_path):
    model = make()
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, activation="gelu"), name="curved")
    models.randomize(model, "curved", seed=4)
    alone = load_file(a3fta.export_lora(make(), tmp_path / "alone"))
    for weights in ([0.3, 2.0], [1.0, 0.0]):
        a3fta.set_adapters(model, ["default", "curved"], weights)
        for inactive in (False, True):
            if inactive:
                a3fta.set_adapters(model, "curved")
            among = load_file(a3fta.export_lora(model, tmp_path / "among"))
            assert list(among) == list(alone)
            assert all(torch.equal(among[key], alone[key]) for key in alone)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["default", "second"])
def test_nothing_changes_in_the_model(name, layout, tmp_path):
    model = make()
    a3fta.inject(model, LINEAR, name="second")
    model.train()
    before, expected, draws = snapshot(model), run(model, "sd15"), torch.get_rng_state()
    a3fta.export_lora(model, tmp_path, name, layout=layout)
    assert_unchanged(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)
    assert torch.equal(run(model, "sd15"), expected)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_no_tensor_of_the_file_is_a_view(layout, tmp_path, monkeypatch):
    seen = {}
    write = adapter_file.serialize

    def serialize(tensors, metadata):
        seen.update(tensors)
        return write(tensors, metadata)

    monkeypatch.setattr(adapter_file, "serialize", serialize)
    model = make()
    path = a3fta.export_lora(model, tmp_path, layout=layout)
    stored = [t.untyped_storage() for t in seen.values()]
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len({s.data_ptr() for s in stored}) == len(stored)
    assert not theirs & {s.data_ptr() for s in stored}
    for key, tensor in seen.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, key
    assert all(torch.equal(tensor, seen[key]) for key, tensor in load_file(path).items())


@pytest.mark.parametrize("trunk", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_file(trunk, dtype, tmp_path):
    model = make(dtype=trunk)
    tensors = load_file(a3fta.export_lora(model, tmp_path, dtype=dtype))
    assert {t.dtype for t in tensors.values()} == {dtype or trunk}
    layer = a3fta.projections(model)[MID]
    exact = 0.7 * (layer.weight.double() @ layer.adapters["default"].w_up.double())
    b = tensors[f"unet.{MID}.lora_B.weight"]
    torch.testing.assert_close(b, exact.to(b.dtype), rtol=0, atol=0)


def test_a_large_alpha_is_exact_in_a_file_of_16_bits(tmp_path):
    config = a3fta.AdapterConfig(rank=259, activation="identity", bias=False)
    model = make(config=config, dtype=torch.bfloat16)
    tensors = load_file(a3fta.export_lora(model, tmp_path, layout="kohya"))
    alphas = [t for key, t in tensors.items() if key.endswith(".alpha")]
    assert len(alphas) == 8 and all(float(alpha) == 259 for alpha in alphas)


def test_inside_autocast_and_inference_mode(tmp_path):
    model = make()
    expected = a3fta.export_lora(model, tmp_path / "a").read_bytes()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert a3fta.export_lora(model, tmp_path / "b").read_bytes() == expected


def test_the_base_may_train(tmp_path):
    model = make()
    expected = a3fta.export_lora(model, tmp_path / "a").read_bytes()
    model.requires_grad_(True)
    assert a3fta.export_lora(model, tmp_path / "b").read_bytes() == expected


def test_under_another_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    expected = a3fta.export_lora(model, tmp_path / "a").read_bytes()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_out.0"]))
    assert a3fta.export_lora(model, tmp_path / "b").read_bytes() == expected


@pytest.mark.parametrize("trained", [False, True])
def test_biases_of_zero_are_no_biases(trained, tmp_path):
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, activation="identity"))
    if trained:
        models.randomize(model)
        with torch.no_grad():
            for layer in a3fta.projections(model).values():
                layer.adapters["default"].b_down.zero_()
                layer.adapters["default"].b_up.zero_()
    tensors = load_file(a3fta.export_lora(model, tmp_path))
    assert any(t.any() for key, t in tensors.items() if "lora_B" in key) is trained


def odd_class(model):
    class Odd(nn.Linear):
        pass

    a3fta.eject(model)
    model.get_submodule(MID).__class__ = Odd
    a3fta.inject(model, LINEAR)


def on_meta(model):
    model.get_submodule(MID).weight = nn.Parameter(torch.empty(64, 64, device="meta"))


def adapter_on_meta(model):
    model.get_submodule(MID).adapters["default"].to("meta")


def stored_in_eight_bits(model):
    layer = model.get_submodule(MID)
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)


def set_bias(parameter):
    def prepare(model):
        a3fta.eject(model)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4, activation="identity"))
        with torch.no_grad():
            getattr(model.get_submodule(MID).adapters["default"], parameter)[1] = -0.25

    return prepare


def enlarged(model):
    with torch.no_grad():
        model.get_submodule(MID).adapters["default"].w_up.fill_(1e6)


@pytest.mark.parametrize(
    ("prepare", "options", "error", "message"),
    [
        (None, {"name": "other"}, ValueError, "name: expected adapters that the model has"),
        (None, {"layout": "a1111"}, ValueError, "layout: expected one of diffusers, kohya, got"),
        (None, {"dtype": "float16"}, TypeError, r"dtype: expected None or one of float16, .* got"),
        (None, {"dtype": torch.int8}, TypeError, r"dtype: expected None or one of float16, .* got"),
        (a3fta.eject, {}, ValueError, "expected a model with adapters, got a UNet2DCond"),
        (a3fta.merge, {}, ValueError, "expected unmerged adapters to export.*call unmerge first"),
        (
            lambda m: a3fta.inject(m, a3fta.AdapterConfig(rank=2, targets="mid_block"), "curved"),
            {"name": "curved"},
            ValueError,
            "name: expected linear adapters .*'curved' with activation='gelu' at mid_block",
        ),
        (set_bias("b_down"), {}, ValueError, f"b_down of up to 0.25 at {MID}; .*bias=False"),
        (set_bias("b_up"), {}, ValueError, f"got 'default' with b_up of up to 0.25 at {MID}"),
        (odd_class, {}, ValueError, f"plain weights to export, got {MID}: .*class Odd"),
        (on_meta, {}, ValueError, f"plain weights to export, got {MID}: .*on the meta device"),
        (stored_in_eight_bits, {}, ValueError, f"plain weights .* {MID}: .*torch.float8_e4m3fn"),
        (adapter_on_meta, {}, ValueError, f"parameters at hand, got {MID}'s w_down on the meta"),
        (
            enlarged,
            {"dtype": torch.float16},
            ValueError,
            f"dtype: expected one with the range of {MID}'s lora_B, .*got torch.float16",
        ),
    ],
)
def test_refused(prepare, options, error, message, tmp_path):
    model = make()
    if prepare is not None:
        prepare(model)
    with pytest.raises(error, match=message):
        a3fta.export_lora(model, tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_kohya_is_for_unets(tmp_path):
    for name in ("flux", "unet2d"):
        with pytest.raises(
            ValueError, match=r"layout: expected 'diffusers' for a \w+, got 'kohya'"
        ):
            a3fta.export_lora(make(name), tmp_path, layout="kohya")


def test_a_part_of_a_model_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a whole diffusers model, .*got a UNetMidBlock2D"
    ):
        a3fta.export_lora(make().mid_block, tmp_path)
    with pytest.raises(TypeError, match="model: expected a diffusers model"):
        a3fta.export_lora("sd15", tmp_path)


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = a3fta.export_lora(make(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            a3fta.export_lora(make(config=MIXED), tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", path.name]
    a3fta.export_lora(make(config=MIXED), tmp_path)
    assert path.read_bytes() != before


@pytest.mark.parametrize("design", [name for name, d in DESIGNS.items() if not d.timed])
def test_every_design_without_activation_is_a_lora(design, tmp_path):
    """What gates and factors make of w_up is part of B."""
    model = models.sd15().double()
    config = a3fta.AdapterConfig(rank=3, activation="identity", design=design, bias=False)
    a3fta.inject(model, config)
    with torch.no_grad():
        for parameter in a3fta.trainable_parameters(model):
            parameter.normal_(0.3, 0.2)
    file = load_file(a3fta.export_lora(model, tmp_path))
    for key, layer in a3fta.projections(model).items():
        own = layer.adapters["default"]()
        expected = layer.weight @ own.w_up @ own.w_down
        found = file[f"unet.{key}.lora_B.weight"] @ file[f"unet.{key}.lora_A.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_layers_may_have_scales_of_their_own(tmp_path):
    model = make(dtype=torch.float64)
    layer = a3fta.projections(model)[MID]
    before = load_file(a3fta.export_lora(model, tmp_path))
    layer.adapters["default"].scale *= 3
    after = load_file(a3fta.export_lora(model, tmp_path))
    for name, tensor in after.items():
        factor = 3 if name == f"unet.{MID}.lora_B.weight" else 1
        torch.testing.assert_close(tensor, factor * before[name])
