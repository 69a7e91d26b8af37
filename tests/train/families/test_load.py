"""Which folders are pipelines of a known family."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from a3fta_kernels.train import TrainingError
from a3fta_kernels.train.families import FAMILIES, load
from tests.train.families import common


@pytest.mark.parametrize("name", common.PIPELINES)
def test_a_pipeline_is_of_its_family(pipeline, name):
    kind = json.loads((pipeline(name) / "model_index.json").read_text())["_class_name"]
    (family,) = (family for family in FAMILIES if kind in family.pipelines)
    found = load(str(pipeline(name)), torch.bfloat16)
    assert type(found) is family
    assert all(p.dtype == torch.bfloat16 for p in found.denoiser.parameters())
    assert found.resolution % found.multiple == 0


def test_a_variant_s_files_are_read(pipeline, tmp_path):
    from diffusers import DiffusionPipeline

    folder = str(tmp_path / "pipeline")
    stock = DiffusionPipeline.from_pretrained(pipeline("sd"))
    stock.save_pretrained(folder, variant="fp16")
    found = load(folder, torch.bfloat16, "fp16")
    for ours, theirs in zip(found.denoiser.parameters(), stock.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    for variant in ("", "fp8"):
        with pytest.raises(TrainingError, match=r"^model: .* cannot be loaded: "):
            load(folder, torch.bfloat16, variant)


def test_families_do_not_share_names():
    for names in ([f.name for f in FAMILIES], [p for f in FAMILIES for p in f.pipelines]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "expected a pipeline's folder.* without a model_index.json"),
        ('{"_class_name": "KandinskyPipeline"}', "expected one of .*FluxPipeline.* got Kandinsky"),
        ("{}", "expected one of .*, got None"),
        ('{"_class_name": "Flu', "cannot be loaded"),
        ("[1]", "cannot be loaded"),
        ('{"_class_name": "FluxPipeline"}', "cannot be loaded"),
    ],
)
def test_other_folders_are_refused(tmp_path, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(TrainingError, match=f"(?s)^model: .*{message}"):
        load(str(tmp_path), torch.float32)


def test_a_damaged_part_is_named(pipeline, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline("sd"), folder)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(TrainingError, match=r"(?s)cannot be loaded.*unet"):
        load(str(folder), torch.float32)
