"""torch.compile of an adapted model: one graph, forward and backward, as in eager."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.processors import engines

from .common import (
    RUNS,
    adapted_unet,
    adapter_grads,
    randomize,
    set_backend,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def aot(called: Callable) -> Callable:
    return torch.compile(called, backend="aot_eager", fullgraph=True)


def check(model: nn.Module, called: Callable, compiled: Callable, *args: Any, tolerance: float):
    """Values and all adapter gradients."""
    found = []
    for each in (called, compiled):
        model.zero_grad(set_to_none=True)
        value = each(*args).float().square().mean()
        value.backward()
        found.append((value.detach(), adapter_grads(model)))
    (expected, expected_grads), (value, grads) = found
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    for name, grad in expected_grads.items():
        assert grad.norm() > 0, name
        error = (grads[name] - grad).norm() / grad.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def attention(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """The attention block in the middle, with self- and cross-attention, and what it takes."""
    block = adapted_unet(device).mid_block.attentions[0].transformer_blocks[0]
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(2, 12, 32, generator=generator).to(device)
    return block, h, torch.randn(2, 5, 16, generator=generator).to(device)


@RUNS
@pytest.mark.parametrize("processors", ["ours", "stock"])
def test_forward_and_backward(processors: str, backend: str, device: torch.device):
    block, h, text = attention(device)
    if processors == "stock":
        block.attn1.set_processor(AttnProcessor2_0())
        block.attn2.set_processor(AttnProcessor2_0())
    set_backend(block, backend)
    check(block, block, aot(block), h, None, text, tolerance=1e-3)


@RUNS
def test_under_autocast(backend: str, device: torch.device):
    """The dtype rule is that of eager: bf16 inside, float32 gradients."""
    block, h, text = attention(device)
    set_backend(block, backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        check(block, block, aot(block), h, None, text, tolerance=0.03)
    assert {p.grad.dtype for p in a3fta.trainable_parameters(block)} == {torch.float32}


def test_switches_are_followed(device: torch.device):
    """What the adapters do is no constant of the compiled code."""
    block, h, text = attention(device)
    a3fta.inject(block, a3fta.AdapterConfig(rank=2, activation="relu"), name="other")
    randomize(block, seed=4)
    compiled = aot(block)
    seen = []

    def compare() -> None:
        with torch.no_grad():
            expected = block(h, None, text)
            torch.testing.assert_close(compiled(h, None, text), expected, rtol=1e-4, atol=1e-5)
        seen.append(expected)

    compare()
    a3fta.disable_adapters(block)
    compare()
    a3fta.enable_adapters(block)
    a3fta.set_adapters(block, ["default", "other"], [0.5, 1.5])
    compare()
    a3fta.set_adapters(block, "other")
    compare()
    randomize(block, seed=40)
    compare()
    assert not any(torch.allclose(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_inductor(device: torch.device):
    """The default compiler, on the layer that is ours: generated code around the op."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("inductor writes C++ for the CPU, and no compiler is here")
    model = adapted_unet(device)
    projection = next(iter(a3fta.projections(model).values()))

    def layer(h: Tensor) -> Tensor:
        return torch.nn.functional.silu(projection(h * 2)) + h

    h = torch.randn(2, 12, projection.in_features, device=device, requires_grad=True)
    results = []
    for called in (layer, torch.compile(layer, fullgraph=True)):
        model.zero_grad(set_to_none=True)
        h.grad = None
        y = called(h)
        y.square().sum().backward()
        grads = [p.grad for p in projection.adapters.parameters()]
        results.append([y.detach(), h.grad, *grads])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["flash", "measured"])
def test_attention_engine(engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """A kernel of PyTorch by name, and one that was measured to be the fastest: still one graph."""
    block, h, text = attention(device)
    block, h, text = block.bfloat16(), h.bfloat16(), text.bfloat16()
    head_dim = block.attn1.to_q.out_features // block.attn1.heads
    if engine == "measured":
        monkeypatch.setitem(engines.MEASURED, (engines.device_class(device), head_dim), "flash")
    else:
        a3fta.set_attention(block, engine)
    check(block, block, aot(block), h, None, text, tolerance=0.05)


def test_weights_side_by_side(device: torch.device):
    """`fuse_qkv` changes nothing for the compiler: it sees three layers."""
    block, h, text = attention(device)
    assert set(a3fta.fuse_qkv(block).values()) == {""}
    check(block, block, aot(block), h, None, text, tolerance=1e-3)
