"""On a GPU: the same numbers in the dtypes of training, and real peaks that fall as counted."""

from __future__ import annotations

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.memory import step_peak

from .. import models
from .common import assert_same_step, batch_for, step, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
LEVELS = [("exact", "input"), ("recompute", "input"), ("block", "input"), ("block", "int8"),
          ("compressed", "input")]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level, norms", LEVELS)
@pytest.mark.parametrize(
    ("method", "channels_last"), [("a3fta", False), ("a3fta", True), ("parallel", False)]
)
def test_gradients_of_every_level(level, norms, dtype, method, channels_last):
    model = trained("sdxl", method, dtype=dtype).cuda()
    batch = models.inputs("sdxl", device="cuda", dtype=dtype)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        batch["sample"] = batch["sample"].contiguous(memory_format=torch.channels_last)
    stock = step(model, batch)
    a3fta.lean(model, level, norms=norms)
    found = step(model, batch)
    narrow = norms == "int8" or level == "compressed"
    tolerance = 0.1 if narrow or dtype != torch.float32 else 1e-3
    assert found.grads.keys() == stock.grads.keys()
    for name, grad in stock.grads.items():
        assert (found.grads[name] - grad).norm() <= tolerance * grad.norm() + 1e-6, name


@pytest.mark.parametrize("level, norms", [("exact", "input"), ("block", "int8")])
def test_the_peak_is_the_counted_one(level, norms):
    """SD1.5 in full, batch 1: real bytes above the weights against those of fake tensors."""
    from a3fta_kernels.memory import models as real

    with torch.device("cuda"):
        model = real.build("sd15").to_empty(device="cuda")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    a3fta.inject(model, a3fta.AdapterConfig(rank=64))
    inputs = {
        k: torch.ones(v.shape, dtype=v.dtype, device="cuda") if isinstance(v, torch.Tensor) else v
        for k, v in real.inputs(model, 512).items()
    }
    a3fta.lean(model, level, norms=norms)
    counted = step_peak(model, **inputs).bytes
    model(**inputs).sample.float().square().mean().backward()  # allocates what stays
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(**inputs).sample.float().square().mean().backward()
    found = torch.cuda.max_memory_allocated() - before
    assert found <= 1.1 * counted


@pytest.mark.parametrize("level", ["exact", "recompute", "block"])
@pytest.mark.parametrize("method", ["a3fta", "parallel"])
@pytest.mark.parametrize("name", ["z_image", "z_image_masked"])
def test_gradients_of_z_image(name, method, level):
    """Its rotation is complex, its masks are made of lengths."""
    model = trained(name, method, dtype=torch.float32).cuda()
    batch = {
        key: [x.cuda() for x in value] if isinstance(value, list) else value.cuda()
        for key, value in batch_for(name, torch.float32).items()
    }
    stock = step(model, batch)
    a3fta.lean(model, level)
    found = step(model, batch)
    assert_same_step(found, stock, 1e-3)
    assert found.kept < stock.kept
