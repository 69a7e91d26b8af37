"""Time-aware adapters in models: the timestep is that of their forward, whenever they compute."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import AdapterConfig
from a3fta_kernels.adapters.timestep import now

from . import models

TIMED = pytest.mark.parametrize("design", ["film", "time_scaled"])
STEPS = {"flux": (0.02, 0.6)}  # of a flow model: 0 to 1; of the others 0 to 1000


def adapted(name: str, design: str = "film", **options: Any) -> nn.Module:
    model = models.sd3() if name == "sd3" else models.build(name, **options)
    a3fta.inject(model, AdapterConfig(rank=4, design=design))
    models.randomize(model, std=0.3)
    return model.train()


def call(model: Callable, name: str, timestep: Any, **changed: Any) -> Tensor:
    batch = models.sd3_inputs() if name == "sd3" else models.inputs(name)
    return model(**{**batch, "timestep": timestep, **changed}).sample


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def at_both(name: str, batch: int = 2) -> tuple[Tensor, Tensor]:
    return tuple(torch.full((batch,), float(t)) for t in STEPS.get(name, (20, 600)))


def plainly(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of each of two timesteps, from a forward and a backward of its own."""
    found = []
    for t in at_both(name):
        call(model, name, t).square().mean().backward()
        found.append(gradients(model))
    return tuple(found)


def checkpointed(model: nn.Module) -> Callable:
    model.enable_gradient_checkpointing()
    return model


def reentrantly(model: nn.Module) -> Callable:
    model.enable_gradient_checkpointing(lambda f, *args: checkpoint(f, *args, use_reentrant=True))

    def run(**batch: Any) -> Any:  # an input has to need a gradient there
        first = next(iter(batch))
        return model(**{**batch, first: batch[first].requires_grad_()})

    return run


def as_a_whole(model: nn.Module) -> Callable:
    return lambda **batch: checkpoint(model, use_reentrant=False, **batch)


def twice(model: nn.Module) -> Callable:
    return as_a_whole(checkpointed(model))


def leanly(level: str) -> Callable:
    def run(model: nn.Module) -> Callable:
        a3fta.lean(model, level)
        return model

    return run


def leanly_checkpointed(model: nn.Module) -> Callable:
    a3fta.lean(model, "block")
    return checkpointed(model)


WAYS = {
    "as it is": lambda model: model,
    "gradient checkpointing": checkpointed,
    "reentrant": reentrantly,
    "checkpointed as a whole": as_a_whole,
    "checkpointed twice over": twice,
    **{f"lean {level}": leanly(level) for level in ("exact", "recompute", "block", "compressed")},
    "lean and checkpointing": leanly_checkpointed,
}
CASES = [("sd15", way) for way in WAYS]
CASES += [
    (name, way)
    for name in ("unet2d", "sd3", "flux")
    for way in ("gradient checkpointing", "lean block", "checkpointed as a whole")
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_two_forwards_before_one_backward(name: str, way: str):
    model = adapted(name)
    first, second = plainly(model, name)
    run = WAYS[way](model)
    losses = [call(run, name, t).square().mean() for t in at_both(name)]
    assert now() is None
    sum(losses).backward()
    assert now() is None
    found = gradients(model)
    expected = {key: first[key] + second[key] for key in first}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(expected) == trained  # none is unused
    tolerance = 0.02 if way == "lean compressed" else 1e-3
    for key, grad in expected.items():
        assert grad.any(), key
        assert (found[key] - grad).norm() <= tolerance * grad.norm(), key
    key = next(key for key in first if key.endswith("w_time"))
    assert not torch.allclose(2 * first[key], expected[key], rtol=0.1)  # a stale one would show


@pytest.mark.parametrize("way", ["as it is", "gradient checkpointing", "lean block"])
def test_a_gradient_of_the_timestep_itself(way: str):
    model = adapted("sd15")
    found = []
    for run in (model, WAYS[way](model)):
        t = torch.tensor([20.0, 600.0], requires_grad=True)
        call(run, "sd15", t).square().mean().backward()
        found.append(t.grad)
    assert found[0].all()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-8)


@TIMED
@pytest.mark.parametrize("name", ["sd15", "unet2d", "flux"])
def test_each_sample_at_its_own_timestep(name: str, design: str):
    model = adapted(name, design).eval()
    early, late = at_both(name, 1)
    with torch.no_grad():
        alone = [call(model, name, t.expand(2)) for t in (early, late)]
        together = call(model, name, torch.cat((early, late)))
        with a3fta.disabled(model):
            stock = call(model, name, torch.cat((early, late)))
    torch.testing.assert_close(together[0], alone[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], alone[1][1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, stock, atol=1e-3)


@TIMED
def test_the_adapter_itself_depends_on_it(design: str):
    """With the model's own dependence on the timestep taken away."""
    model = adapted("sd15", design).eval()
    model.time_proj.forward = lambda t: torch.zeros(2, 32)
    with torch.no_grad():
        early, late = (call(model, "sd15", t) for t in (20, 600))
        assert not torch.allclose(early, late, atol=1e-3)
        with a3fta.disabled(model):
            assert torch.equal(call(model, "sd15", 20), call(model, "sd15", 600))


@pytest.mark.parametrize(
    "given",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0]), torch.tensor([7, 7])],
)
def test_forms_of_one_timestep(given: Any):
    model = adapted("sd15").eval()
    with torch.no_grad():
        torch.testing.assert_close(call(model, "sd15", given), call(model, "sd15", 7))


def test_guidance_doubles_the_batch_at_one_timestep():
    model = adapted("sd15").eval()
    batch = models.inputs("sd15")
    doubled = {k: torch.cat((batch[k], batch[k])) for k in ("sample", "encoder_hidden_states")}
    with torch.no_grad():
        once, y = call(model, "sd15", 7), call(model, "sd15", torch.tensor(7), **doubled)
    torch.testing.assert_close(y, torch.cat((once, once)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "given"), [("sd15", 600), ("unet2d", 600), ("flux", 0.6)])
def test_the_scale_is_0_to_1000_in_every_family(name: str, given: float):
    model, seen = adapted(name), []
    layer = next(iter(a3fta.projections(model).values()))
    layer.register_forward_pre_hook(lambda *_: seen.append(now().t.tolist()))
    call(model, name, torch.tensor([given, given / 2]))
    assert seen[0] == pytest.approx([600, 300])


def test_the_timestep_may_come_by_place_or_by_name():
    model = adapted("sd15").eval()
    batch = models.inputs("sd15")
    with torch.no_grad():
        y = model(batch["sample"], 7, batch["encoder_hidden_states"], return_dict=False)[0]
        assert torch.equal(y, call(model, "sd15", 7))


class SmallDenoiser(nn.Module):
    """Quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(query_dim=16, heads=2, dim_head=8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample + self.attention(sample)


@pytest.mark.parametrize("what", ["model", "step", "layer"])
def test_compiled_once_for_all_timesteps(what: str):
    """The whole model; a function around it; a layer inside it, as regional compilation does."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = SmallDenoiser()
    a3fta.inject(model, AdapterConfig(rank=4, design="film"))
    models.randomize(model, std=0.5)
    twin = copy.deepcopy(model)
    h = torch.randn(2, 5, 16)

    def step(h: Tensor, t: Tensor) -> Tensor:
        return model(h, t)

    if what == "layer":
        model.attention.compile(fullgraph=True, backend=counter)
        compiled: Callable = model
    else:
        called = model if what == "model" else step
        compiled = torch.compile(called, fullgraph=True, backend=counter)
    counts = []
    for t in (20, 600, 3):
        results = []
        for each, run in ((model, compiled), (twin, twin)):
            y = run(h, torch.tensor([t, t + 1]))
            y.square().mean().backward()
            results.append((y, list(gradients(each).values())))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] > 0 and now() is None


@TIMED
def test_frozen_for_inference(design: str):
    model = adapted("sd15", design).eval()
    with torch.no_grad():
        expected = [call(model, "sd15", t) for t in (20, 600)]
        a3fta.freeze_for_inference(model)
        found = [call(model, "sd15", t) for t in (20, 600)]
    for y, before in zip(found, expected, strict=True):
        torch.testing.assert_close(y, before)


def test_copies_go_their_own_way():
    model = adapted("sd15").eval()
    with torch.no_grad():
        expected = [call(model, "sd15", t) for t in (20, 600)]
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        twins.append(torch.load(file, weights_only=False))
        a3fta.eject(model)
        for twin in twins:
            for t, y in zip((20, 600), expected, strict=True):
                assert torch.equal(call(twin, "sd15", t), y)
    twin = twins[0].train()
    first, second = plainly(twin, "sd15")
    run = checkpointed(twin)
    sum(call(run, "sd15", t).square().mean() for t in at_both("sd15")).backward()
    for key, grad in gradients(twin).items():
        torch.testing.assert_close(grad, first[key] + second[key], rtol=1e-3, atol=1e-6)


def test_eject_leaves_no_trace():
    model = models.build("sd15")
    model.enable_gradient_checkpointing()
    before = models.snapshot(model)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    a3fta.inject(model, AdapterConfig(rank=4, design="film"))
    a3fta.inject(model, AdapterConfig(rank=2, design="time_scaled"), name="other")
    call(model.train(), "sd15", 7).mean().backward()
    a3fta.eject(model.eval(), "default")
    call(model, "sd15", 7)  # the other one still knows the timestep
    a3fta.eject(model)
    models.assert_unchanged(model, before)
    for hooks in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"):
        assert not vars(model)[hooks]
    assert not model._forward_hooks_always_called
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == functions


def test_beside_an_adapter_without_time_and_peft():
    peft = pytest.importorskip("peft")
    model = adapted("sd15")
    a3fta.inject(model, AdapterConfig(rank=3, activation="relu"), name="plain")
    models.randomize(model, "plain", std=0.3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))
    a3fta.set_trainable(wrapped)
    call(wrapped, "sd15", 600).square().mean().backward()
    assert all(p.grad.any() for p in a3fta.trainable_parameters(wrapped))


# -- refusals --------------------------------------------------------------------------------


def test_a_layer_alone_and_a_block_checkpointed_by_hand():
    model = adapted("sd15")
    layer = next(iter(a3fta.projections(model).values()))
    message = "timestep: expected a forward of the whole denoiser"
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(2, 3, layer.in_features))
    block = model.mid_block.attentions[0]
    inner = block.forward
    block.forward = lambda *args, **kw: checkpoint(inner, *args, use_reentrant=False, **kw)
    y = call(model, "sd15", 7)
    with pytest.raises(RuntimeError, match=message):
        y.mean().backward()


def test_a_forward_that_fails_ends():
    model = adapted("sd15")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(model, "sd15", 7, encoder_hidden_states=torch.ones(2, 7, 3))
    assert now() is None


def test_a_forward_inside_a_forward():
    model, inner = adapted("unet2d"), adapted("unet2d")
    with torch.no_grad():
        expected = call(model, "unet2d", 600.0)
        found = []
        model.mid_block.register_forward_pre_hook(
            lambda *_: found.append(call(inner, "unet2d", 20.0))
        )
        assert torch.equal(call(model, "unet2d", 600.0), expected)
        assert now() is None and len(found) == 1


def test_a_forward_that_was_cut_off_is_not_around_the_next():
    model = adapted("unet2d")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.mid_block.register_forward_pre_hook(interrupt)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            call(model, "unet2d", 600.0)
        hook.remove()
        call(model, "unet2d", 20.0)
    assert now() is None


def test_a_model_without_timesteps_is_refused():
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=r"model: expected a denoiser.* got a AutoencoderKL"):
        a3fta.inject(model, AdapterConfig(rank=2, design="film"))
    models.assert_unchanged(model, before)
    a3fta.inject(model, AdapterConfig(rank=2))


def test_no_timestep_is_asked_for_where_none_is_used():
    model = models.build("sd15")
    block = model.mid_block.attentions[0].transformer_blocks[0]
    a3fta.inject(block, AdapterConfig(rank=2, design="film"))
    h, text = torch.randn(2, 4, 64), torch.randn(2, 7, 32)
    with pytest.raises(RuntimeError, match="got none"):
        block(h, encoder_hidden_states=text)
    a3fta.disable_adapters(block)
    block(h, encoder_hidden_states=text)
