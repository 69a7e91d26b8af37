"""Attention to text in one op with its projection: who takes it, when, and what it computes.

On kernels written in plain PyTorch, so that it runs everywhere, and on Triton's.
"""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels import projection
from a3fta_kernels.backends import backends, triton_interpreted
from a3fta_kernels.ops.adapter_linear import choice
from a3fta_kernels.ops.cross_attention_adapter import api, contract, limits
from a3fta_kernels.processors import A3FTAAttnProcessor, unet

from .. import models
from ..ops import attention_protocol

CONFIG = a3fta.AdapterConfig(rank=4)
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not backends()["triton"].available, reason=backends()["triton"].reason
    ),
)


class Engine:
    """Kernels to run with, and how often they ran."""

    def __init__(self, backend: str, device: str, dtype: torch.dtype) -> None:
        self.backend, self.device, self.dtype = backend, device, dtype
        self.calls = 0


@pytest.fixture(params=["plain", TRITON])
def engine(request, monkeypatch) -> Engine:
    if request.param == "plain":
        monkeypatch.setattr(contract, "kernels", lambda: attention_protocol)
        monkeypatch.setattr(api, "resolve", lambda *_: "triton")
        found = Engine("auto", "cpu", torch.float32)
    elif triton_interpreted():
        found = Engine("triton", "cpu", torch.float32)
    else:
        found = Engine("triton", "cuda", torch.float16)
    monkeypatch.setattr(limits, "DTYPES", (*limits.DTYPES, found.dtype))
    plain = api.apply_prepared

    def counted(*arguments):
        found.calls += 1
        return plain(*arguments)

    monkeypatch.setattr(api, "apply_prepared", counted)
    return found


def close(engine: Engine, one: torch.Tensor, other: torch.Tensor) -> None:
    tolerance = 2e-4 if engine.dtype == torch.float32 else 3e-2
    size = other.abs().max().item() + 1e-6
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


def gradients(model: nn.Module, name: str, engine: Engine, masked: bool, **options):
    inputs = models.inputs(name, device=engine.device, dtype=engine.dtype, masked=masked)
    inputs["sample"].requires_grad_()
    y = model(**inputs, **options).sample
    leaves = [inputs["sample"], *a3fta.trainable_parameters(model)]
    return y, torch.autograd.grad(y.float().square().mean(), leaves)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_trains_as_on_the_reference(masked, engine):
    found = []
    for backend in ("reference", engine.backend):
        model = models.build("sd15", device=engine.device, dtype=engine.dtype)
        a3fta.inject(model, CONFIG, backend=backend)
        models.randomize(model)
        before = engine.calls
        found.append(gradients(model, "sd15", engine, masked))
        cross = sum(isinstance(m, Attention) and m.is_cross_attention for m in model.modules())
        if backend == engine.backend:
            assert cross == 4 and engine.calls - before == cross
        elif engine.backend == "triton":
            assert engine.calls == before
    (y, grads), (expected, wanted) = found[1], found[0]
    close(engine, y, expected)
    for one, other in zip(grads, wanted, strict=True):
        close(engine, one, other)


class Holder(nn.Module):
    def __init__(self, engine: Engine, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8, **options)
        self.to(engine.device, engine.dtype)
        self.x = torch.randn(2, 9, 32).to(engine.device, engine.dtype)
        self.text = torch.randn(2, 7, 24).to(engine.device, engine.dtype)

    def forward(self, **options) -> torch.Tensor:
        return self.attn(self.x, encoder_hidden_states=self.text, **options)


def layer(engine: Engine, config=CONFIG, **options) -> Holder:
    holder = Holder(engine, **options)
    a3fta.inject(holder, config, backend=engine.backend)
    models.randomize(holder)
    return holder.eval()


def composed(holder: Holder, monkeypatch, **options) -> torch.Tensor:
    """The same layer, attention first."""
    with monkeypatch.context() as patch:
        patch.setattr(unet, "FUSABLE", ())
        return holder(**options)


def test_one_layer_with_its_residual_and_a_mask(engine, monkeypatch):
    holder = layer(engine, residual_connection=True, rescale_output_factor=2.0)
    mask = torch.zeros(2, 1, 7, device=engine.device, dtype=engine.dtype)
    mask[0, :, 5:] = -10000.0
    y = holder(attention_mask=mask)
    assert engine.calls == 1
    close(engine, y, composed(holder, monkeypatch, attention_mask=mask))
    assert not torch.equal(y, holder())


def test_self_attention_is_not_asked(engine):
    holder = layer(engine)
    holder.attn.to_k = holder.attn.to_v = holder.attn.to_q
    holder.attn(holder.x)
    assert engine.calls == 0


def test_dropout_draws_once(engine, monkeypatch):
    holder = layer(engine, a3fta.AdapterConfig(rank=4, dropout=0.5)).train()
    torch.manual_seed(3)
    y = holder()
    assert engine.calls == 1
    torch.manual_seed(3)
    close(engine, y, composed(holder, monkeypatch))


def test_what_freeze_for_inference_kept_is_used(engine, monkeypatch):
    holder = layer(engine)
    expected = holder()
    # the backend that freezes is not this test's subject
    monkeypatch.setattr(projection, "resolve", lambda *_: "triton")
    a3fta.freeze_for_inference(holder)
    assert holder.attn.to_out[0].frozen is not None
    monkeypatch.setattr(contract.kernels(), "merged", None)
    y = holder()
    assert engine.calls == 2
    close(engine, y, expected)


def add_hook(holder: Holder) -> None:
    holder.attn.to_out[0].register_forward_hook(lambda *_: None)


def other_activation(holder: Holder) -> None:
    backend = holder.attn.to_out[0].backend
    config = a3fta.AdapterConfig(rank=2, activation="silu")
    a3fta.inject(holder, config, name="second", backend=backend)
    a3fta.set_adapters(holder, ["default", "second"])


def training_projection(holder: Holder) -> None:
    holder.attn.to_out[0].weight.requires_grad_()


def high_rank(holder: Holder) -> None:
    backend = holder.attn.to_out[0].backend
    a3fta.inject(holder, a3fta.AdapterConfig(rank=64), name="second", backend=backend)
    a3fta.set_adapters(holder, ["default", "second"])


@pytest.mark.parametrize(
    "change, reason",
    [
        (add_hook, "the layer carries hooks"),
        (other_activation, "its adapters differ in activation"),
        (training_projection, "the layer itself trains"),
        (high_rank, "rank 68 is more than 64"),
    ],
)
def test_the_reason_is_logged_and_attention_comes_first(
    change, reason, engine, monkeypatch, caplog
):
    monkeypatch.setattr(projection, "_logged", set())
    holder = layer(engine)
    change(holder)
    with caplog.at_level(logging.INFO, "a3fta_kernels"):
        y = holder()
        holder()
    assert engine.calls == 0
    about = [r.message for r in caplog.records if "attention to few keys" in r.message]
    assert len(about) == 1 and reason in about[0]
    assert torch.equal(y, composed(holder, monkeypatch))


def norm_the_queries(holder: Holder) -> None:
    holder.attn.norm_q = nn.LayerNorm(8).to(holder.x)


def take_another_engine(holder: Holder) -> None:
    holder.attn.set_processor(A3FTAAttnProcessor("math"))


def disable(holder: Holder) -> None:
    a3fta.disable_adapters(holder)


@pytest.mark.parametrize("change", [norm_the_queries, take_another_engine, disable])
def test_who_is_not_asked(change, engine):
    holder = layer(engine)
    change(holder)
    assert holder().isfinite().all()
    assert engine.calls == 0


def test_autocast(engine, monkeypatch):
    if engine.dtype != torch.float32:
        pytest.skip("autocast starts from fp32")
    holder = layer(engine)
    with torch.autocast("cpu", torch.bfloat16):
        y = holder()
        expected = composed(holder, monkeypatch)
    assert engine.calls == 1 and y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


# operators of PyTorch that are one kernel on a GPU
KERNELS = {
    f"aten::{name}"
    for name in (
        "mm", "mv", "addmv", "addmm", "addmm_",
        "cat", "copy_", "add", "add_", "mul", "sum", "fill_",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
}  # fmt: skip


def launches(run) -> tuple[int, int]:
    """Triton's launches in `run` and PyTorch's; Triton's do not happen, whose interpreter would
    add operators of its own."""
    from a3fta_kernels.triton_support import Launcher

    count = 0

    def counted(self, plan, like, fixed_block, key):
        nonlocal count
        count += 1
        plan(self.candidates(like, fixed_block)[0].meta)

    with pytest.MonkeyPatch.context() as patch, torch.profiler.profile() as profile:
        patch.setattr(Launcher, "_launch", counted)
        run()

    def inside_another(event) -> bool:
        parent = event.cpu_parent
        return parent is not None and (parent.name in KERNELS or inside_another(parent))

    events = [e for e in profile.events() if e.name in KERNELS and not inside_another(e)]
    return count, len(events)


@pytest.mark.skipif(not triton_interpreted(), reason="counts the CPU's operators")
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_launches_of_a_layer(direction, monkeypatch):
    """Attention to constant text and its projection, without to_q: apart, and in one op."""
    holder = layer(Engine("triton", "cpu", torch.bfloat16), a3fta.AdapterConfig(rank=16))
    processor = holder.attn.processor
    q = torch.randn(2, 9, 32, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(2, 7, 32, dtype=torch.bfloat16)

    def run() -> None:
        y = processor.output(holder.attn, q, k, k, None, True)
        if direction != "forward":
            y.backward(torch.ones_like(y))

    before = {}
    for path in ("skinny", "fused"):
        with monkeypatch.context() as patch:
            patch.setattr(unet, "FUSABLE", ())
            patch.setattr(choice, "choose", lambda *_, path=path: choice.Choice(path, choice.RULE))
            run()
            before[path] = sum(launches(run))
    after = launches(run)
    assert after[0] == (2 if direction == "forward" else 7)
    # large layers leave the wide product to the library; small ones launch the least as they are
    assert sum(after) < before["skinny"] and sum(after) <= before["fused"]
