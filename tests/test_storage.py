"""save_adapter and load_adapter: the round trip, and every refusal with the model untouched."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import resigned, snapshot, twin_edited

ROOT = Path(__file__).resolve().parents[1]


def adapted(name: str = "sd15", seed: int = 2, **options: Any) -> nn.Module:
    """A small model whose adapter has weights, on the reference backend."""
    model = models.build(name)
    a3fta.inject(model, a3fta.AdapterConfig(**{"rank": 4, **options}), backend="reference")
    models.randomize(model, seed=seed)
    return model


def output(model: nn.Module, name: str = "sd15") -> Tensor:
    with torch.no_grad():
        return models.run(model, name)


def load(model: Any, folder: Path, *args: Any, **options: Any) -> a3fta.AdapterConfig:
    return a3fta.load_adapter(model, folder, *args, **{"backend": "reference", **options})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a3fta.save_adapter(adapted(), tmp_path / "adapter")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning is part of the behaviour: tests that expect one say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refused(model: Any, folder: Path, match: str, *args: Any, **options: Any) -> None:
    """The load fails with `match`, and the model is as it was."""
    root = getattr(model, "unet", model)
    before = snapshot(root)
    with pytest.raises(a3fta.AdapterFileError, match=match) as caught:
        load(model, folder, *args, **options)
    assert str(folder) in str(caught.value)
    assert "expected" in str(caught.value) and "found" in str(caught.value)
    assert snapshot(root) == before


# the round trip


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


# files that are refused


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:40])


def empty(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(b"")


def trailing(folder: Path) -> None:
    with open(folder / WEIGHTS_NAME, "ab") as file:
        file.write(b"more")


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


def lora_file(folder: Path) -> None:
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    save_file({key: torch.randn(4, 64)}, folder / WEIGHTS_NAME, {"format": "pt"})


def bare_file(folder: Path) -> None:
    save_file({"x": torch.randn(4)}, folder / WEIGHTS_NAME)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Bomb()))


def torch_saved(folder: Path) -> None:
    torch.save({"x": torch.randn(4)}, folder / WEIGHTS_NAME)


def newer_version(folder: Path) -> None:
    resigned(folder, a3fta_format="2")


def newer_twin(folder: Path) -> None:
    twin_edited(folder, lambda twin: twin.update(a3fta_format=2))


def edited_rank(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"scale": 1.0', '"scale": 2.0'))


def reordered_twin(folder: Path) -> None:
    twin_edited(folder, lambda t: t.update(config=dict(reversed(t["config"].items()))), sign=False)


def twin_of_another(folder: Path) -> None:
    twin_edited(folder, lambda twin: twin["config"].update(scale=3.0))


def twin_not_json(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("rank: 4")


def twin_is_a_list(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("[1]")


def twin_nan(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"scale": 1.0', '"scale": NaN'))


def twin_doubled(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 4, "rank": 4'))


def twin_deep(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("[" * 100_000)


class Bomb:
    """Sets the flag if anything ever unpickles it."""

    went_off = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "went_off", True)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "whole tensors"),
    (truncate_header, "a safetensors file"),
    (empty, "a safetensors file"),
    (trailing, "whole tensors"),
    (flip_weight, "SHA-256"),
    (no_weights, "a readable file"),
    (lora_file, "an adapter saved by a3fta_kernels"),
    (bare_file, "an adapter saved by a3fta_kernels"),
    (pickled, "a safetensors file"),
    (torch_saved, "a safetensors file"),
    (newer_version, "format version '1'.*format version '2'; a newer a3fta-kernels"),
    (newer_twin, "format version 1.*format version 2"),
    (edited_rank, "SHA-256.*edited"),
    (reordered_twin, "SHA-256.*edited"),
    (twin_of_another, "the settings that adapter_model.safetensors holds"),
    (twin_not_json, "valid JSON"),
    (twin_is_a_list, "a JSON object, found list"),
    (twin_nan, "valid JSON, found the number NaN"),
    (twin_doubled, "valid JSON, found the key 'rank' twice"),
    (twin_deep, "valid JSON"),
]


@pytest.mark.parametrize("existing", [False, True], ids=["stock", "adapted"])
@pytest.mark.parametrize(("damage", "match"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damaged_and_foreign_files(
    damage: Callable[[Path], None], match: str, existing: bool, saved: Path
):
    damage(saved)
    model = adapted(seed=6) if existing else models.build("sd15")
    refused(model, saved, match)
    assert not Bomb.went_off


def test_a_folder_that_is_none(tmp_path: Path):
    refused(models.build("sd15"), tmp_path / "nowhere", "a readable file, found No such file")
    (tmp_path / "file").write_text("x")
    refused(models.build("sd15"), tmp_path / "file", "a readable file, found Not a directory")


def key_of(folder: Path, ending: str) -> str:
    return next(k for k in sorted(adapter_file.read(folder).tensors) if k.endswith(ending))


def replace(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


# edits whose checksums are right, as another program might write them
SIGNED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown config key": ({"config": {"colour": 1}}, "got colour"),
    "bad rank": ({"config": {"rank": 0}}, "rank: expected at least 1, got 0"),
    "boolean scale": ({"config": {"scale": True}}, "scale: expected a number"),
    "unknown activation": ({"config": {"activation": "selu"}}, "activation: expected one of"),
    "unknown design": ({"config": {"design": "lora"}}, "design: expected one of"),
    "bad regex": ({"config": {"targets": "("}}, "targets: expected a regular expression"),
    "bad dtype": ({"config": {"dtype": "int8"}}, "dtype: expected one of"),
    "another rank": ({"config": {"rank": 3}}, "w_down of shape|b_down of shape"),
    "huge rank": ({"config": {"rank": 10**15}}, "tensors of rank 1000000000000000, found"),
    "no bias": ({"config": {"bias": False}}, "no tensor .*b_down"),
    "other targets": ({"config": {"targets": "attn2"}}, "attn1.to_out.0 not adapted"),
    "targets of none": ({"config": {"targets": "nothing"}}, "targets: expected parts"),
    "another class": ({"base": {"model": "UNet2DModel"}}, "an adapter for a UNet2DConditionModel"),
    "a layer less": ({"base": {"layers": {}}}, "of shape 64x64"),
    "layers as text": ({"base": {"layers": "all"}}, "a base with model and layers"),
    "extra in base": ({"base": {"extra": 1}}, "a base with model and layers"),
    "samples as text": ({"samples": {"x": "y"}}, "samples of adapted layers"),
    "extra metadata": ({"note": "hello"}, "metadata with the keys"),
}


@pytest.mark.parametrize(("edit", "match"), SIGNED.values(), ids=SIGNED.keys())
def test_signed_but_wrong(edit: dict[str, Any], match: str, saved: Path):
    resigned(saved, **edit)
    refused(models.build("sd15"), saved, match)


TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor] | None, str]] = {
    "missing": ("w_up", None, r"a tensor .*w_up, found none"),
    "wrong shape": ("w_up", lambda t: t[:-1], r"w_up of shape \(64, 4\), found shape \(63, 4\)"),
    "transposed": ("w_up", lambda t: t.t(), r"w_up of shape \(64, 4\), found shape \(4, 64\)"),
    "integers": ("b_up", lambda t: t.int(), "a dtype of F16, BF16, F32, F64 for .*I32"),
    "float8": ("b_up", lambda t: t.to(torch.float8_e4m3fn), "a dtype of F16, BF16, F32, F64"),
    "too large": ("b_up", lambda t: t.double() * 1e300, "b_up in the range of torch.float32"),
}


@pytest.mark.parametrize("existing", [False, True], ids=["stock", "adapted"])
@pytest.mark.parametrize(("ending", "change", "match"), TENSORS.values(), ids=TENSORS.keys())
def test_signed_but_other_tensors(
    ending: str, change: Any, match: str, existing: bool, saved: Path
):
    key = key_of(saved, ending)
    edit = (lambda ts: ts.pop(key)) if change is None else replace(key, change)
    resigned(saved, tensors=edit)
    refused(adapted(seed=6) if existing else models.build("sd15"), saved, match)


def test_an_unknown_tensor(saved: Path):
    resigned(saved, tensors=lambda ts: ts.update({"mid_block.w_down": torch.zeros(2)}))
    refused(models.build("sd15"), saved, "no tensor mid_block.w_down, found it")


# models that do not fit


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


# writing


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_replaces_the_adapter_and_keeps_other_files(saved: Path):
    (saved / "README.md").write_text("mine")
    a3fta.save_adapter(adapted(seed=7, rank=2), saved)
    assert set(files(saved)) == {WEIGHTS_NAME, CONFIG_NAME, "README.md"}
    other = models.build("sd15")
    assert load(other, saved).rank == 2
    assert torch.equal(output(other), output(adapted(seed=7, rank=2)))


def test_the_same_adapter_gives_the_same_bytes(saved: Path, tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)


@pytest.mark.parametrize("failing", ["first write", "second write", "first rename"])
def test_an_error_while_saving_leaves_the_old_adapter(
    failing: str, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    before = files(saved)
    full = OSError(28, "No space left on device")
    calls = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == (2 if failing == "second write" else 1):
            raise full
        return real(*args, **options)

    target = "replace" if failing == "first rename" else "fsync"
    real = getattr(os, target)
    monkeypatch.setattr(adapter_file.os, target, fail)
    with pytest.raises(OSError, match="No space left"):
        a3fta.save_adapter(adapted(seed=7), saved)
    monkeypatch.undo()
    assert calls and files(saved) == before
    other = models.build("sd15")
    load(other, saved)
    assert torch.equal(output(other), output(adapted()))


def test_an_error_between_the_two_renames(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """The weights file is the newer one, and stands alone."""
    real, calls = os.replace, []

    def cut(source: Any, target: Any) -> None:
        calls.append(Path(target).name)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    old_config = (saved / CONFIG_NAME).read_bytes()
    monkeypatch.setattr(adapter_file.os, "replace", cut)
    with pytest.raises(OSError, match="Input/output"):
        a3fta.save_adapter(adapted(seed=7, rank=2), saved)
    monkeypatch.undo()
    assert calls == [WEIGHTS_NAME, CONFIG_NAME]
    assert set(files(saved)) == {WEIGHTS_NAME, CONFIG_NAME}
    assert (saved / CONFIG_NAME).read_bytes() == old_config
    other = models.build("sd15")
    with pytest.warns(UserWarning, match="describes other weights"):
        assert load(other, saved).rank == 2
    assert torch.equal(output(other), output(adapted(seed=7, rank=2)))


KILLED = """
import os, sys
from pathlib import Path
from a3fta_kernels import adapter_file

folder, step = Path(sys.argv[1]), int(sys.argv[2])
file = adapter_file.read(folder)
calls = []
real = os.replace

def replace(source, target):
    calls.append(target)
    if len(calls) == step:
        os._exit(9)  # nothing is cleaned up, as after a SIGKILL
    real(source, target)

os.replace = replace
tensors = {key: tensor * 0 + 0.25 for key, tensor in file.tensors.items()}
adapter_file.write(folder, tensors, file.config, file.base, file.samples, "0")
"""


@pytest.mark.parametrize("step", [1, 2])
def test_killed_before_a_rename(step: int, saved: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved), str(step)], cwd=ROOT)
    assert done.returncode == 9
    model = models.build("sd15")
    if step == 1:
        load(model, saved)
        assert torch.equal(output(model), output(adapted()))
        return
    with pytest.warns(UserWarning, match="describes other weights"):
        load(model, saved)
    assert all(bool((p == 0.25).all()) for p in a3fta.trainable_parameters(model))
    a3fta.save_adapter(model, saved)
    load(models.build("sd15"), saved)  # without a warning again


def test_a_missing_twin_is_a_warning(saved: Path):
    (saved / CONFIG_NAME).unlink()
    model = models.build("sd15")
    with pytest.warns(UserWarning, match="adapter_config.json is missing"):
        load(model, saved)
    assert torch.equal(output(model), output(adapted()))


def test_white_space_in_the_twin_does_not_count(saved: Path):
    path = saved / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7) + "\n\n")
    load(models.build("sd15"), saved)


def test_saving_into_a_read_only_place(saved: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        a3fta.save_adapter(adapted(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_file_modes_follow_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        a3fta.save_adapter(adapted(), tmp_path / "new")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {0o640}
