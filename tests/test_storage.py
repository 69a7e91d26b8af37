"""save_adapter and load_adapter: what comes back, and which models it fits."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import adapted, load, output, refused, resigned, snapshot

# a test that expects a warning of a load says so
pytestmark = pytest.mark.filterwarnings("error:.*adapter_config.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a3fta.save_adapter(adapted(), tmp_path / "adapter")


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_same_output_bit_for_bit(name: str, tmp_path: Path):
    model = adapted(name)
    expected = output(model, name)
    a3fta.save_adapter(model, tmp_path)
    other = models.build(name)
    assert not torch.equal(output(other, name), expected)
    load(other, tmp_path)
    assert torch.equal(output(other, name), expected)


OPTIONS = [
    {"rank": 3, "activation": "silu", "scale": 0.25},
    {"rank": 5, "bias": False, "dropout": 0.5},
    {"targets": ("attn2",)},
    {"targets": r"mid_block.*attn1", "rank_pattern": {"mid": 2}},
    {"rank_pattern": {"up_blocks": 1, "attn1": 6, "mid": 8}},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_come_back(options: dict[str, Any], tmp_path: Path):
    model = adapted(**options)
    a3fta.save_adapter(model, tmp_path)
    other = models.build("sd15")
    config = load(other, tmp_path)
    assert config == a3fta.AdapterConfig(**{"rank": 4, **options})
    assert list(config.rank_pattern) == list(options.get("rank_pattern", {}))
    assert torch.equal(output(other), output(model))
    mine, theirs = (list(a3fta.trainable_parameters(m)) for m in (model, other))
    assert [p.dtype for p in mine] == [p.dtype for p in theirs]
    assert [p.shape for p in mine] == [p.shape for p in theirs]
    dropouts = {p.adapters["default"].dropout for p in a3fta.projections(other).values()}
    assert dropouts == {options.get("dropout", 0.0)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_copies_of_the_base_are_the_same_base(dtype: torch.dtype, tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path / "full")
    half = models.build("sd15", dtype=dtype)
    load(half, tmp_path / "full")
    assert {p.dtype for p in a3fta.trainable_parameters(half)} == {torch.float32}

    a3fta.save_adapter(half, tmp_path / "half")
    twin = adapted(seed=9)
    load(twin, tmp_path / "half")
    assert torch.equal(output(twin), output(adapted()))
    load(models.build("sd15", dtype=torch.float64), tmp_path / "half")
    load(models.build("sd15", dtype=dtype).float(), tmp_path / "full")


def test_several_names(tmp_path: Path):
    model = adapted()
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, activation="relu"), "second",
                 backend="reference")  # fmt: skip
    models.randomize(model, "second", seed=8)
    a3fta.set_adapters(model, ["default", "second"], [0.5, 2.0])
    expected = output(model)
    a3fta.save_adapter(model, tmp_path / "a", "default")
    a3fta.save_adapter(model, tmp_path / "b", name="second")

    other = models.build("sd15")
    load(other, tmp_path / "b", "second")
    load(other, tmp_path / "a", "first")
    a3fta.set_adapters(other, ["first", "second"], [0.5, 2.0])
    assert torch.equal(output(other), expected)
    a3fta.set_adapters(model, "second")
    a3fta.set_adapters(other, "second")
    assert torch.equal(output(other), output(model))


def test_loads_into_an_adapter_that_is_there(saved: Path):
    model = adapted(seed=5)
    a3fta.set_adapters(model, "default", 0.5)
    parameters = list(a3fta.trainable_parameters(model))
    load(model, saved)
    assert {id(p) for p in a3fta.trainable_parameters(model)} == {id(p) for p in parameters}
    assert all(layer.weights == {"default": 0.5} for layer in a3fta.projections(model).values())
    a3fta.set_adapters(model, "default")
    assert torch.equal(output(model), output(adapted()))


def test_parameters_keep_their_dtype_and_what_trains(saved: Path, device: torch.device):
    model = models.build("sd15", device=device)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, dtype=torch.bfloat16))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    frozen = names[0]
    model.get_parameter(frozen).requires_grad_(False)
    load(model, saved)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names[1:]
    for name, parameter in adapted().named_parameters():
        if ".adapters." in name:
            here = model.get_parameter(name)
            assert here.dtype == torch.bfloat16 and here.device.type == device.type
            assert torch.equal(here.cpu(), parameter.bfloat16())


def test_a_new_adapter_trains_and_the_base_does_not(saved: Path):
    model = models.build("sd15")
    load(model, saved)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if ".adapters." in n}


def test_the_scale_is_saved_as_it_is_now(tmp_path: Path):
    model = adapted()
    for layer in a3fta.projections(model).values():
        layer.adapters["default"].scale = 0.5
    a3fta.save_adapter(model, tmp_path)
    other = models.build("sd15")
    assert load(other, tmp_path).scale == 0.5
    assert torch.equal(output(other), output(model))
    layer.adapters["default"].scale = 2.0
    with pytest.raises(ValueError, match=r"one scale for all layers, got \[0.5, 2.0\]"):
        a3fta.save_adapter(model, tmp_path)


def test_a_pipeline_gives_its_denoiser(tmp_path: Path):
    model = adapted()
    a3fta.save_adapter(SimpleNamespace(unet=model, components={}), tmp_path)
    pipe = SimpleNamespace(unet=models.build("sd15"), components={})
    load(pipe, tmp_path)
    assert torch.equal(output(pipe.unet), output(model))


@pytest.mark.parametrize("save_wrapped", [False, True])
@pytest.mark.parametrize("load_wrapped", [False, True])
def test_peft_wrapping_changes_nothing(save_wrapped: bool, load_wrapped: bool, tmp_path: Path):
    def wrap(model: nn.Module) -> None:
        torch.manual_seed(4)
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"])
        model.add_adapter(lora)

    plain = adapted()
    model = adapted()
    if save_wrapped:
        wrap(model)
    a3fta.save_adapter(model, tmp_path)
    assert not any("base_layer" in key for key in adapter_file.read(tmp_path).tensors)
    other = models.build("sd15")
    if load_wrapped:
        wrap(other)
    load(other, tmp_path)
    if load_wrapped:
        wrap(plain)
    assert torch.equal(output(other), output(plain))


def test_frozen_caches_are_dropped(saved: Path):
    """The native backend keeps V between forwards; a load must not."""
    model = models.build("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    models.randomize(model, seed=12)
    a3fta.freeze_for_inference(model)
    output(model)
    load(model, saved)
    assert all(layer.frozen is None for layer in a3fta.projections(model).values())
    torch.testing.assert_close(output(model), output(adapted()), rtol=1e-4, atol=1e-5)


def test_the_files_are_for_others_too(saved: Path):
    """Any safetensors reader, and any reader of JSON."""
    with safe_open(saved / WEIGHTS_NAME, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    layers = a3fta.projections(adapted())
    parameters = ("w_down", "w_up", "b_down", "b_up")
    assert sorted(names) == sorted(f"{layer}.{p}" for layer in layers for p in parameters)
    assert metadata["a3fta_format"] == "1" and metadata["library_version"] == a3fta.__version__
    twin = json.loads((saved / CONFIG_NAME).read_text())
    assert a3fta.AdapterConfig.from_dict(twin["config"]).rank == 4
    assert twin["base"]["model"] == "UNet2DConditionModel"
    assert set(twin["base"]["layers"]) == set(layers)
    assert json.loads(metadata["config"]) == twin["config"]


def test_another_base(saved: Path):
    other = models.build("sd15", seed=1)
    refused(other, saved, "an adapter for this base.*allow_other_base=True accepts it")
    load(other, saved, allow_other_base=True)
    expected = models.build("sd15", seed=1)
    a3fta.inject(expected, a3fta.AdapterConfig(rank=4), backend="reference")
    models.randomize(expected)
    assert torch.equal(output(other), output(expected))


def test_a_fine_tune_is_another_base(saved: Path):
    model = models.build("sd15")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    refused(model, saved, "an adapter for this base")


@pytest.mark.parametrize("other", ["sdxl", "unet2d", "kandinsky"])
def test_another_architecture_even_if_another_base_is_allowed(other: str, saved: Path):
    refused(models.build(other), saved, "expected", allow_other_base=True)


def test_other_widths(saved: Path):
    wide = models.build("sd15", block_out_channels=(32, 96))
    refused(wide, saved, "96x96.*64x64", allow_other_base=True)


@pytest.mark.parametrize("stored", ["32x160", "32x160[32:64]", "32x160[0:64]"])
@pytest.mark.parametrize("existing", [False, True], ids=["stock", "adapted"])
def test_another_slice_of_the_input(existing: bool, stored: str, tmp_path: Path):
    a3fta.save_adapter(adapted("flux"), tmp_path)
    name = "single_transformer_blocks.1.proj_out"
    layers = adapter_file.read(tmp_path).base["layers"]
    assert layers[name] == "32x160[0:32]"
    resigned(tmp_path, base={"layers": {**layers, name: stored}})
    match = re.escape(f"{name} of shape 32x160[0:32]") + ".*" + re.escape(f"shape {stored} (")
    model = adapted("flux", seed=6) if existing else models.build("flux")
    refused(model, tmp_path, match, allow_other_base=True)


def test_a_model_without_attention(saved: Path):
    refused(nn.Sequential(nn.Linear(4, 4)), saved, "an adapter for a Sequential")


def test_weights_not_at_hand_are_not_compared(saved: Path, caplog: pytest.LogCaptureFixture):
    """Quantized, offloaded or cast for storage: names and shapes still are."""
    model = models.build("sd15", seed=1)
    for name, module in model.named_modules():
        if name.endswith("to_out.0"):
            module.to(torch.float8_e4m3fn)
    with caplog.at_level(logging.INFO, logger="a3fta_kernels"):
        load(model, saved)
    assert "weights were not compared" in caplog.text

    meta = models.build("sd15").to("meta")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="a3fta_kernels"):
        load(meta, saved)
    assert "weights were not compared" in caplog.text
    values = dict(adapted().named_parameters())
    for name, parameter in meta.named_parameters():
        assert (parameter.device.type == "meta") == (".adapters." not in name)
        if ".adapters." in name:
            assert torch.equal(parameter, values[name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 2}, "of shape"),
        ({"activation": "relu"}, "activation='relu'.*found activation='gelu'"),
        ({"scale": 0.5}, "scale=0.5.*found scale=1.0"),
        ({"bias": False}, "bias=False.*found bias=True"),
        ({"targets": "attn1"}, "attn2.to_out.0 not adapted"),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_is_there(options: dict[str, Any], match: str, saved: Path):
    refused(adapted(**options), saved, match)
    load(adapted(**options), saved, "another_name")


def test_arguments(saved: Path, tmp_path: Path):
    model = models.build("sd15")
    before = snapshot(model)
    for name in ("a.b", "", "keys"):
        with pytest.raises(ValueError, match="name: expected"):
            a3fta.load_adapter(model, saved, name)
    with pytest.raises(TypeError, match="allow_other_base: expected True or False"):
        a3fta.load_adapter(model, saved, allow_other_base="yes")
    with pytest.raises(ValueError, match="backend: expected one of"):
        a3fta.load_adapter(model, saved, backend="fast")
    with pytest.raises(TypeError, match="model: expected"):
        a3fta.load_adapter("model", saved)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="call inject first"):
        a3fta.save_adapter(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"expected adapters .*default.*got 'other'"):
        a3fta.save_adapter(adapted(), tmp_path / "none", "other")
    assert not (tmp_path / "none").exists()


def test_merged_and_offloaded_models(saved: Path, tmp_path: Path):
    model = adapted(activation="identity")
    a3fta.merge(model)
    with pytest.raises(ValueError, match="unmerge first"):
        a3fta.save_adapter(model, tmp_path / "none")
    with pytest.raises(ValueError, match="unmerge first"):
        load(model, saved)
    a3fta.unmerge(model)
    a3fta.save_adapter(model, tmp_path / "unmerged")

    offloaded = adapted().to("meta")
    with pytest.raises(ValueError, match="on the meta device"):
        a3fta.save_adapter(offloaded, tmp_path / "none")
    with pytest.raises(ValueError, match="on the meta device"):
        load(offloaded, saved)
    assert not (tmp_path / "none").exists()
