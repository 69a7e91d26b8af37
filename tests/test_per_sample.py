"""adapters_per_sample: each sample as if it ran alone with its adapter."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.bank import Batch, banks_of
from a3fta_kernels.conversion import adapt, adapted_class

from . import models
from .integration.common import RUNS, set_backend
from .models import assert_unchanged, snapshot

HALF = {"flux": r"blocks\.0\."}
NAMES = ["a", None, "b", "c", "b"]


def served(
    name: str, dtype: torch.dtype = torch.float64, device: Any = "cpu",
    placements: tuple[str, ...] = ("pre", "pre", "pre"),
) -> nn.Module:  # fmt: skip
    """Three adapters of different rank, design, bias, activation and scale; "b" on some layers."""
    model = models.build(name)
    configs = {
        "a": a3fta.AdapterConfig(rank=4),
        "b": a3fta.AdapterConfig(
            rank=2, targets=HALF.get(name, r"(down|mid|up)_blocks?.*attentions\.0.*"), scale=0.5,
            bias=False, design="gated",
        ),
        "c": a3fta.AdapterConfig(rank=3, activation="silu", design="scaled"),
    }  # fmt: skip
    for key, placement in zip(configs, placements, strict=True):
        configs[key] = dataclasses.replace(configs[key], placement=placement)
    for seed, (key, config) in enumerate(configs.items()):
        a3fta.inject(model, config, name=key)
        models.randomize(model, key, seed=seed, std=0.5)
    return model.to(device, dtype).eval()


def part(inputs: dict[str, Any], rows: slice, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, dict):
            value = part(value, rows, batch)
        # Flux's places are the same for all samples
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
        if batched and key not in ("img_ids", "txt_ids"):
            value = value[rows]
        found[key] = value
    return found


def one_by_one(model: nn.Module, inputs: dict[str, Any], names: list[str | None]) -> Tensor:
    """Each sample through the model on its own, with its adapter chosen by set_adapters."""
    kept = {key: layer.weights for key, layer in a3fta.projections(model).items()}
    found = []
    for b, name in enumerate(names):
        a3fta.set_adapters(model, [] if name is None else name)
        found.append(model(**part(inputs, slice(b, b + 1), len(names))).sample)
    for key, layer in a3fta.projections(model).items():
        layer.choose(kept[key])
    return torch.cat(found)


BESIDE, MIXED = ("parallel",) * 3, ("parallel", "post", "pre")


@pytest.mark.parametrize(
    ("name", "processors", "placements"),
    [
        *((name, "ours", ("pre",) * 3) for name in ("sd15", "sdxl", "kandinsky", "unet2d", "flux")),
        ("sd15", "stock", ("pre",) * 3), ("unet2d", "stock", ("pre",) * 3),
        *((name, "ours", BESIDE) for name in ("sd15", "unet2d", "flux")),
        *((name, "ours", MIXED) for name in ("sd15", "unet2d", "flux")),
    ],
)  # fmt: skip
@torch.no_grad()
def test_equals_every_sample_alone(name, processors, placements):
    model = served(name, placements=placements)
    if processors == "stock":
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor2_0())
    set_backend(model, "reference")
    inputs = models.inputs(name, batch=5, dtype=torch.float64)
    before = model(**inputs).sample
    expected = one_by_one(model, inputs, NAMES)
    with a3fta.adapters_per_sample(model, NAMES):
        y = model(**inputs).sample
        with a3fta.disabled(model):
            stock = model(**inputs).sample
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # and they differ: no sample is what another adapter, or none, makes of it
    assert torch.equal(y[1], stock[1]) or torch.allclose(y[1], stock[1], rtol=1e-12, atol=1e-12)
    for b in (0, 2, 3, 4):
        assert (y[b] - stock[b]).abs().max() > 1e-3 and (y[b] - before[b]).abs().max() > 1e-3
    assert torch.equal(model(**inputs).sample, before), "what set_adapters chose acts again"


@RUNS
@pytest.mark.parametrize("placements", [("pre",) * 3, MIXED], ids=["pre", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_backend(dtype, placements, backend, device):
    """In the trunk's dtype and under autocast, as the adapters alone in that dtype."""
    model = served("sd15", dtype, device, placements)
    set_backend(model, backend)
    inputs = models.inputs("sd15", batch=5, dtype=dtype, device=device)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    expected = one_by_one(model, inputs, NAMES)
    with a3fta.adapters_per_sample(model, NAMES):
        y = model(**inputs).sample
        with torch.autocast(device.type, torch.bfloat16):
            cast = model(**inputs).sample
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cast.to(dtype), expected, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_guidance_concatenates_the_batch():
    model = served("sd15")
    inputs = models.inputs("sd15", batch=6, dtype=torch.float64)
    expected = one_by_one(model, inputs, ["a", None, "b"] * 2)
    with a3fta.adapters_per_sample(model, ["a", None, "b"]):
        y = model(**inputs).sample
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_positional_and_keyword_batches_are_seen():
    model = served("unet2d")
    sample = models.inputs("unet2d", batch=2, dtype=torch.float64)["sample"]
    with a3fta.adapters_per_sample(model, ["a", "c"]):
        expected = model(sample=sample, timestep=7).sample
        assert torch.equal(model(sample, 7).sample, expected)
        assert torch.equal(model(timestep=7, sample=sample).sample, expected)


def test_frames_of_a_sample_lie_side_by_side():
    """Video layers see (samples x frames); halves of guidance, a part of the batch."""
    adapters = next(iter(a3fta.projections(served("unet2d")).values())).adapters
    a, c = adapters["a"], adapters["c"]
    (bank,) = banks_of([a, None, a], None, batch := Batch())
    assert bank.places(3).tolist() == [0, -1, 0]
    assert bank.places(6).tolist() == [0, -1, 0] * 2, "a layer on its own: by guidance"
    batch.samples = 6
    assert bank.places(12).tolist() == [0, 0, -1, -1, 0, 0] * 2, "two frames of each"
    assert bank.places(3).tolist() == [0, -1, 0], "PAG takes the batch apart"
    with pytest.raises(ValueError, match=r"h: expected .* a multiple of the model's, 6, got 9"):
        bank.places(9)
    first, second = banks_of([a, None, c], None, batch)
    assert first.index.tolist() == [0, -1, -1] and second.index.tolist() == [-1, -1, 0]


@torch.no_grad()
def test_a_video_model():
    """The U-Net of Stable Video Diffusion: in space its batch is samples x frames, in time samples
    x places."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1, cross_attention_dim=16, num_attention_heads=2,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
    )  # fmt: skip
    model = model.double().eval()
    for name, seed in (("a", 1), ("b", 2)):
        a3fta.inject(model, a3fta.AdapterConfig(rank=3), name=name)
        models.randomize(model, name, seed=seed, std=0.5)
    g = torch.Generator().manual_seed(3)
    shapes = dict(
        sample=(4, 3, 4, 8, 8), encoder_hidden_states=(4, 1, 16), added_time_ids=(4, 3)
    )  # fmt: skip
    inputs: dict[str, Any] = {
        key: torch.randn(shape, generator=g, dtype=torch.float64) for key, shape in shapes.items()
    }
    inputs["timestep"] = torch.tensor(7)
    names = ["a", "b", "a", "b"]
    expected = one_by_one(model, inputs, names)
    with a3fta.adapters_per_sample(model, names[:2]):
        y = model(**inputs).sample
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


PLACED = pytest.mark.parametrize(
    "placements", [("pre",) * 3, BESIDE, MIXED], ids=["pre", "beside", "mixed"]
)


@PLACED
def test_gradients_reach_the_adapters_that_were_named(placements):
    """With gradients on, samples of one batch train their own adapters, as one after the other."""
    model = served("sd15", placements=placements)
    names = ["a", None, "c", "a"]
    inputs = models.inputs("sd15", batch=4, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    parameters = {k: p for k, p in parameters.items() if p.requires_grad}
    with a3fta.adapters_per_sample(model, names):
        loss = model(**inputs).sample.square().sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    expected = torch.autograd.grad(
        one_by_one(model, inputs, names).square().sum(),
        list(parameters.values()),
        allow_unused=True,
    )
    seen = set()
    for key, one, other in zip(parameters, found, expected, strict=True):
        assert (one is None) == (other is None) == (".adapters.b." in key), key
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            seen.add(key.split(".adapters.")[1])
    assert {"a.w_down", "a.b_up", "c.s"} <= seen


def test_a_block_that_begins_in_inference_mode_serves_a_backward():
    model = served("unet2d")
    with torch.inference_mode(), a3fta.adapters_per_sample(model, ["a", "c"]):
        banks = [bank for layer in a3fta.projections(model).values() for bank in layer.banks or ()]
    for bank in banks:
        kept = (*bank.stacked, bank.scale, bank.index)
        assert not any(t.is_inference() for t in kept if t is not None)
    assert banks


@PLACED
def test_a_backward_that_computes_again_belongs_inside(placements):
    """The lean levels have the gradients of the stock model inside; outside, level block, whose
    backward runs adapters again, refuses, and recompute, which runs none, has them too."""
    model = served("sd15", placements=placements)
    inputs = models.inputs("sd15", batch=2, dtype=torch.float64)
    weights = [p for k, p in model.named_parameters() if ".adapters.a." in k]
    found = []
    for level in ("off", "block"):
        a3fta.lean(model, level)
        with a3fta.adapters_per_sample(model, ["a", None]):
            loss = model(**inputs).sample.square().sum()
            found.append(torch.autograd.grad(loss, weights))
    a3fta.lean(model, "recompute")
    with a3fta.adapters_per_sample(model, ["a", None]):
        loss = model(**inputs).sample.square().sum()
    found.append(torch.autograd.grad(loss, weights))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    a3fta.lean(model, "block")
    with a3fta.adapters_per_sample(model, ["a", None]):
        loss = model(**inputs).sample.square().sum()
    with pytest.raises(RuntimeError, match="lean: expected the model as it was in the forward"):
        loss.backward()


@PLACED
def test_steps_and_batches_inside_a_block_of_a_lean_model(placements):
    """Each forward reads the adapters as they are, and each backward its own forward's batch."""
    found = {}
    inputs = models.inputs("sd15", batch=4, dtype=torch.float64)
    half = part(inputs, slice(0, 2), 4)
    for level in ("off", "recompute", "block"):
        model = served("sd15", placements=placements)
        weights = [p for k, p in model.named_parameters() if ".adapters.b." not in k]
        optimizer = torch.optim.SGD([p for p in weights if p.requires_grad], lr=0.01)
        a3fta.lean(model, level)
        losses = []
        with a3fta.adapters_per_sample(model, ["a", "c"]):
            for _ in range(3):
                loss = model(**inputs).sample.square().mean()
                with torch.no_grad():  # of another batch, before the backward of the first
                    model(**half)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        assert len(set(losses)) == 3
        found[level] = losses
    assert found["recompute"] == pytest.approx(found["off"], rel=1e-9)
    assert found["block"] == pytest.approx(found["off"], rel=1e-9)


@torch.no_grad()
def test_the_stacked_copy_is_used_without_gradients():
    model = served("unet2d")
    inputs = models.inputs("unet2d", batch=2, dtype=torch.float64)
    with a3fta.adapters_per_sample(model, ["a", "c"]):
        before = model(**inputs).sample
        models.randomize(model, "a", seed=9, std=0.5)
        assert torch.equal(model(**inputs).sample, before)
        with torch.enable_grad():
            assert not torch.allclose(model(**inputs).sample, before)
    with a3fta.adapters_per_sample(model, ["a", "c"]):
        assert not torch.allclose(model(**inputs).sample, before)


@torch.no_grad()
def test_beside_freeze_moves_and_copies():
    model = served("sd15", torch.float32)
    inputs = models.inputs("sd15", batch=2, dtype=torch.float32)
    expected = one_by_one(model, inputs, ["a", "b"])
    a3fta.set_adapters(model, "a")
    frozen = a3fta.freeze_for_inference(model)
    kept = model(**inputs).sample
    with a3fta.adapters_per_sample(model, ["a", "b"]):
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**inputs).sample, kept)
    assert frozen == sum(x.frozen is not None for x in a3fta.projections(model).values())
    with a3fta.adapters_per_sample(model, ["a", "b"]):
        model.double()
        y = model(**models.inputs("sd15", batch=2, dtype=torch.float64)).sample
        torch.testing.assert_close(y.float(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_copy_made_inside_is_outside():
    """Of a batch of any size, with what `set_adapters` chose; also of a layer of another class."""
    model = served("unet2d")
    layers = list(a3fta.projections(model).values())
    layers[0].__class__ = adapted_class(type("Other", (nn.Linear,), {}))
    inputs = models.inputs("unet2d", batch=3, dtype=torch.float64)
    expected = model(**inputs).sample
    with a3fta.adapters_per_sample(model, ["a", "b"]):
        twin = copy.deepcopy(model)
        assert all(layer.banks is not None for layer in layers)
        torch.testing.assert_close(twin(**inputs).sample, expected, rtol=1e-12, atol=1e-12)
    a3fta.set_adapters(twin, "b")
    with a3fta.adapters_per_sample(twin, ["a", "b", None]):
        assert not torch.allclose(twin(**inputs).sample, expected)


@torch.no_grad()
def test_a_wrapper_that_passes_its_arguments_on():
    """Its first parameter names no argument: the batch is that of the latents."""

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    model = served("unet2d")
    inputs = models.inputs("unet2d", batch=2, dtype=torch.float64)
    with a3fta.adapters_per_sample(model, ["a", "c"]):
        expected = model(**inputs).sample
    wrapper = Wrapper(model)
    with a3fta.adapters_per_sample(wrapper, ["a", "c"]):
        y = wrapper(timestep=torch.tensor([7]), sample=inputs["sample"]).sample
        torch.testing.assert_close(y, model(inputs["sample"], 7).sample, rtol=0, atol=0)
        torch.testing.assert_close(wrapper(**inputs).sample, expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"expected its batch as the first .* got timestep$"):
            wrapper(timestep=torch.tensor([7]))


@torch.no_grad()
def test_nothing_stays_behind(monkeypatch):
    model = served("sd15")
    before = snapshot(model)
    with pytest.raises(KeyError), a3fta.adapters_per_sample(model, ["a"]):
        raise KeyError
    assert_unchanged(model, before)
    assert not model._forward_pre_hooks
    assert all(layer.banks is None for layer in a3fta.projections(model).values())
    assert {k: v for k, v in model.state_dict().items() if "bank" in k} == {}


def test_a_layer_of_another_class_and_a_residual():
    """A layer that is no plain Linear computes itself, after the bank."""

    class Scaled(nn.Linear):
        def forward(self, h: Tensor) -> Tensor:
            return 2 * super().forward(h)

    holder = served("unet2d")
    adapters = next(iter(a3fta.projections(holder).values())).adapters
    linear = Scaled(adapters["a"].w_down.shape[1], 5).double()
    layer = adapt(linear)
    layer.banks = banks_of([adapters["a"], None], None, Batch())
    h, residual = torch.randn(2, 3, linear.in_features).double(), torch.randn(2, 3, 5).double()
    a = adapters["a"]
    changed = a3fta.ops.adapter(h, a.w_down, a.w_up, a.b_down, a.b_up, backend="reference")
    expected = 2 * torch.nn.functional.linear(torch.stack([changed[0], h[1]]), *linear.parameters())
    torch.testing.assert_close(layer(h, residual), expected + residual, rtol=1e-12, atol=1e-12)
