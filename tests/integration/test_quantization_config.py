"""Bases that diffusers quantizes as it loads them: `quantization_config`, GGUF files."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta

from .. import models
from .test_offload import pipeline

# parts of a pipeline that the small one does without
ABSENT = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "image_encoder")
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="diffusers' bitsandbytes loader asks for a GPU"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock model on disk."""
    models.build("sd15").save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def check_training(model: nn.Module, name: str, reason: str, dtype: torch.dtype) -> None:
    """Adapters start as nothing, all get gradients, and one step changes the output."""
    device = next(model.parameters()).device
    with torch.no_grad():
        before = models.run(model, name, device=device, dtype=dtype)
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    packed = {r.why_not_fused.startswith(reason) for r in report.layers.values()}
    assert packed == {True}, report
    models.randomize(model)
    parameters = list(a3fta.trainable_parameters(model))
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(2):
        value = models.run(model, name, device=device, dtype=dtype).float().square().mean()
        value.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        assert sum(bool(p.grad.any()) for p in parameters) == len(parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    assert losses[1] < losses[0]
    a3fta.eject(model)
    with torch.no_grad():
        assert torch.equal(models.run(model, name, device=device, dtype=dtype), before)


@pytest.mark.parametrize("whole", [False, True], ids=["model", "pipeline"])
def test_torchao(folder: Path, tmp_path: Path, whole: bool):
    quantization = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    for_pipeline = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": config})
    if whole:
        pipeline(models.build("sd15")).save_pretrained(tmp_path / "pipe")
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(
            tmp_path / "pipe", dtype=torch.bfloat16, **dict.fromkeys(ABSENT),
            quantization_config=for_pipeline,
        )  # fmt: skip
        model = loaded.unet
    else:
        model = diffusers.UNet2DConditionModel.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )
    check_training(model, "sd15", "its weight is a Int8Tensor", torch.bfloat16)


def test_gguf_file(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    stock = models.build("flux")
    stock.save_config(tmp_path)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    linear = {f"{n}.weight" for n, m in stock.named_modules() if isinstance(m, nn.Linear)}
    for name, value in stock.state_dict().items():
        data = value.numpy()
        if name in linear and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = diffusers.FluxTransformer2DModel.from_single_file(
        str(tmp_path / "flux.gguf"), config=str(tmp_path), dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    with torch.no_grad():
        found, expected = models.run(model, "flux"), models.run(stock, "flux")
    assert (found - expected).norm() < 0.05 * expected.norm()
    check_training(model, "flux", "the layer is of class GGUFLinear", torch.float32)


@needs_cuda
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(folder: Path, bits: int):
    model = diffusers.UNet2DConditionModel.from_pretrained(
        folder, dtype=torch.float16, device_map="cuda",
        quantization_config=diffusers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
    )  # fmt: skip
    reason = {4: "the layer is of class Linear4bit", 8: "the layer is of class Linear8bitLt"}
    check_training(model, "sd15", reason[bits], torch.float16)
