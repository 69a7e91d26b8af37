"""Architectures by name: their sizes, what they take, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from a3fta_kernels.memory import ledger, levels, methods, models

from .. import models as small

# parameters; of Stable Diffusion and FLUX the counts of the published checkpoints
SIZES = {
    "sd15": 859520964, "sd21": 865910724, "sdxl": 2567463684, "sd3-medium": 2028328000,
    "flux-dev": 11901408320, "pixart": 611349152, "z-image": 6154908736,
}  # fmt: skip


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_architectures_have_their_size_and_run(name):
    model = models.build(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.training
    multiple = models.multiple_of(model)
    assert models.resolution_of(name) % multiple == 0
    found = ledger(model, **models.inputs(model, 4 * multiple, 2))
    buffers = sum(b.nbytes for b in model.buffers())
    assert found.total > 0 and found.parameters == 2 * SIZES[name] + buffers


def test_a_folder_is_read_for_its_configuration_alone(tmp_path):
    stock = small.build("sd15")
    stock.save_config(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        model = models.build(str(folder), torch.float32)
        assert [tuple(p.shape) for p in model.parameters()] == [
            tuple(p.shape) for p in stock.parameters()
        ]
        assert models.resolution_of(str(folder)) == 16 * 8
    assert models.inputs(model, 128, 3)["sample"].shape == (3, 4, 16, 16)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(models.UnknownModelError, match=r"one of sd15, .*got 'sd7'"):
        models.build("sd7")
    path = tmp_path / "config.json"
    for text, says in (("{", "configuration of a diffusers model"), ("{}", "_class_name")):
        path.write_text(text)
        with pytest.raises(models.UnknownModelError, match=says):
            models.build(str(tmp_path))
    path.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(models.UnknownModelError, match="got 'AutoencoderKL'"):
        models.build(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "resolution", "says"),
    [
        ("sd15", 500, "a multiple of 64 .*got 500"),
        ("sdxl", 1000, "a multiple of 32"),
        ("flux-dev", 1000, "a multiple of 16"),
        ("z-image", 1000, "a multiple of 16"),
        ("sd3-medium", 4096, "at most 3072"),
        ("sd15", 0, "a multiple of 64"),
    ],
)
def test_resolutions_that_a_model_cannot_take(name, resolution, says):
    with pytest.raises(ValueError, match=f"resolution: expected {says}"):
        models.inputs(models.build(name), resolution)


@pytest.mark.parametrize("method", methods.METHODS)
def test_methods_train_what_they_say(method):
    model = models.build("sd15")
    rank = methods.adapt(model, method, None, torch.bfloat16)
    assert rank == methods.METHODS[method].rank
    trained = [p for p in model.parameters() if p.requires_grad]
    counts = {
        "a3fta": 3221888,
        "parallel": 3221888,
        "lora": 3188736,
        "lora-fp32": 3188736,
        "full": 859520964,
    }
    assert sum(p.numel() for p in trained) == counts[method]
    dtype = torch.bfloat16 if method in ("lora", "full") else torch.float32
    assert {p.dtype for p in trained} == {dtype}


def test_adapters_of_flux():
    """Image and text of 19 dual blocks, and 38 single ones: each of 3072 channels."""
    model = models.build("flux-dev")
    methods.adapt(model, "a3fta", None, torch.bfloat16)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == (2 * 19 + 38) * (2 * 64 * 3072 + 64 + 3072)


def test_methods_and_levels_that_are_not_there():
    with pytest.raises(ValueError, match="method: expected one of a3fta, parallel"):
        methods.adapt(models.build("sd15"), "magic", None, torch.bfloat16)
    with pytest.raises(levels.UnsupportedLevelError, match="got a Linear"):
        levels.LEVELS["checkpointing"].apply(torch.nn.Linear(2, 2))
