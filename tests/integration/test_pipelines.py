"""Pipelines around an adapted denoiser: pictures from text, from pictures, in a mask; guided."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import a3fta_kernels as a3fta

from .. import models

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="pipelines encode text by transformers"
)
CONFIG = a3fta.AdapterConfig(rank=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny pipeline on disk, written once."""
    from ..examples import pipelines

    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            getattr(pipelines, f"write_{kind}")(made[kind])
        return made[kind] / "pipeline"

    return write


def controlnet(unet: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    found = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for parameter in found.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return {"controlnet": found}


PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 16:] = 1
IMAGE = {"image": PICTURE, "strength": 0.9}
# pipeline -> what is on disk, what it takes beside the prompt, what it has beside the parts there
PIPELINES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "StableDiffusionPipeline": ("sd", {}, None),
    "StableDiffusionImg2ImgPipeline": ("sd", IMAGE, None),
    "StableDiffusionInpaintPipeline": ("sd", IMAGE | {"mask_image": MASK}, None),
    "StableDiffusionControlNetPipeline": ("sd", {"image": PICTURE}, controlnet),
    "StableDiffusionPAGPipeline": ("sd", {"pag_scale": 3.0}, None),
    "StableDiffusionXLPipeline": ("sdxl", {}, None),
    "StableDiffusionXLPAGPipeline": ("sdxl", {"pag_scale": 3.0}, None),
    "StableDiffusionXLInpaintPipeline": ("sdxl", IMAGE | {"mask_image": MASK}, None),
    "StableDiffusion3Img2ImgPipeline": ("sd3", IMAGE, None),
    "StableDiffusion3PAGPipeline": ("sd3", {"pag_scale": 3.0, "guidance_scale": 4.0}, None),
    "FluxImg2ImgPipeline": ("flux", IMAGE, None),
}


def load(folder: Any, name: str) -> tuple[Any, dict[str, Any]]:
    kind, arguments, more = PIPELINES[name]
    options: dict[str, Any] = {}
    if "PAG" in name:
        options["pag_applied_layers"] = ["blocks.0"] if kind == "sd3" else ["mid"]
    if more is not None:
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder(kind), subfolder="unet")
        options |= more(unet)
    pipeline = getattr(diffusers, name).from_pretrained(folder(kind), **options)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline, arguments


def draw(pipeline: Any, arguments: dict[str, Any]) -> Tensor:
    takes = inspect.signature(pipeline.__call__).parameters
    sizes = {side: 32 for side in ("height", "width") if side in takes}
    return pipeline(
        "a dog", num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0), **sizes, **arguments,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_adapted(name, folder):
    pipeline, arguments = load(folder, name)
    stock = draw(pipeline, arguments)
    a3fta.inject(pipeline, CONFIG)
    torch.testing.assert_close(draw(pipeline, arguments), stock, rtol=1e-3, atol=1e-3)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    models.randomize(denoiser, std=0.3)
    processors = models.attention_processors(denoiser)
    adapted = draw(pipeline, arguments)
    assert adapted.isfinite().all()
    assert not torch.allclose(adapted, stock, rtol=1e-2, atol=1e-2)
    assert models.attention_processors(denoiser) == processors  # PAG takes them away and back
    with a3fta.disabled(pipeline):
        torch.testing.assert_close(draw(pipeline, arguments), stock, rtol=1e-3, atol=1e-3)
    a3fta.eject(pipeline)
    torch.testing.assert_close(draw(pipeline, arguments), stock, rtol=1e-3, atol=1e-3)


def test_free_u():
    """It scales the skips' and the backbone's features: another place than attention."""
    unet = models.build("sd15")
    settings = dict(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with torch.no_grad():
        plain = models.run(unet, "sd15")
        unet.enable_freeu(**settings)
        free = models.run(unet, "sd15")
        a3fta.inject(unet, CONFIG)
        torch.testing.assert_close(models.run(unet, "sd15"), free)
        models.randomize(unet)
        adapted = models.run(unet, "sd15")
        assert not torch.allclose(adapted, free, rtol=1e-2, atol=1e-2)
        unet.disable_freeu()
        assert not torch.allclose(models.run(unet, "sd15"), adapted, rtol=1e-2, atol=1e-2)
        a3fta.eject(unet)
        torch.testing.assert_close(models.run(unet, "sd15"), plain)
