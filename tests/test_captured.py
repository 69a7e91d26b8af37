"""`Captured`: on the CPU with a stand-in for CUDA graphs, on a GPU with theirs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta

from . import graphs
from .integration.common import adapted_unet, inputs

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")


@pytest.fixture
def stand_in(monkeypatch):
    """Lets `Captured` run on the CPU; the pools that recordings were given."""
    return graphs.stand_in(monkeypatch)


def model_and_loss():
    """A linear layer, a parameter without a part in the loss, and that loss; its calls."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.unused = nn.Parameter(torch.ones(2))
    calls = []

    def loss(batch):
        calls.append(batch["x"].shape)
        return (model(batch["x"]) - batch["y"]).square().mean()

    return model, loss, calls


def batch(seed, rows=4):
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 3, generator=g), "y": torch.randn(rows, 2, generator=g)}


def grads_of(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_calls_are_loss_and_backward(stand_in):
    model, loss, _ = model_and_loss()
    step = a3fta.Captured(loss, model.parameters(), warm_up=2)
    given = batch(0)
    untouched = {k: v.clone() for k, v in given.items()}
    for seed in range(3):
        for rows in (4, 5):
            model.zero_grad()
            found, grads = step(batch(seed, rows)), grads_of(model)
            model.zero_grad()
            expected = loss(batch(seed, rows))
            expected.backward()
            torch.testing.assert_close(found, expected.detach())
            assert not found.requires_grad
            same(grads, grads_of(model))
    step(given)
    assert all(torch.equal(given[k], untouched[k]) for k in given)
    # one recording for each shape, in the memory of the first
    assert stand_in == [None, "pool"]


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_gradients_add_up(stand_in, to_none):
    model, loss, _ = model_and_loss()
    step = a3fta.Captured(loss, model.parameters())
    for _ in range(2):
        model.zero_grad(set_to_none=to_none)
        values = [step(batch(1)), step(batch(2)), step(batch(3, rows=2)), step(batch(4))]
        found = grads_of(model)
        model.zero_grad(set_to_none=to_none)
        for seed, rows in ((1, 4), (2, 4), (3, 2), (4, 4)):
            loss(batch(seed, rows)).backward()
        same(found[:2], grads_of(model)[:2])
        torch.testing.assert_close(values[0], loss(batch(1)).detach())
        torch.testing.assert_close(values[3], loss(batch(4)).detach())


def test_gradients_of_another_recording_are_kept(stand_in):
    """Its memory is written over by this one's replay."""
    model, loss, _ = model_and_loss()
    step = a3fta.Captured(loss, model.parameters())
    for seed, rows in ((1, 4), (2, 5), (3, 5), (4, 4)):
        if seed == 3:
            model.zero_grad()
        step(batch(seed, rows))
    found = grads_of(model)
    model.zero_grad()
    for seed, rows in ((3, 5), (4, 4)):
        loss(batch(seed, rows)).backward()
    same(found, grads_of(model))


def test_every_gradient_is_a_tensor_of_its_own(stand_in):
    """As `backward` makes them, so that what clips in place clips once."""
    p, q, r = (nn.Parameter(torch.ones(2, 3) * i) for i in (1, 2, 3))

    def loss(given):
        return ((p + q) * given["x"]).sum() + r.t().sum()

    step = a3fta.Captured(loss, [p, q, r])
    step({"x": torch.ones(2, 3)})
    assert p.grad is not q.grad and p.grad.data_ptr() != q.grad.data_ptr()
    assert r.grad.is_contiguous()
    torch.nn.utils.clip_grad_norm_([p, q, r], 1.0)
    for grad in (p.grad, q.grad, r.grad):
        torch.testing.assert_close(grad, torch.full((2, 3), 18**-0.5), rtol=1e-4, atol=0)


def test_weights_may_change_in_place_and_move(stand_in):
    model, loss, _ = model_and_loss()
    step = a3fta.Captured(loss, model.parameters(), warm_up=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        values.append(float(step(batch(0))))
        optimizer.step()
    assert values[0] > values[1] > values[2]
    assert len(stand_in) == 1
    model.weight.data = model.weight.data.clone()
    step(batch(0))
    assert stand_in == [None, None]  # all anew
    step.reset()
    step(batch(0))
    assert len(stand_in) == 3


def test_recording_uses_up_no_random_numbers(stand_in):
    model, _, _ = model_and_loss()
    drawn = []

    def loss(given):
        drawn.append(torch.rand(()))
        return model(given["x"]).square().mean()

    torch.manual_seed(5)
    a3fta.Captured(loss, model.parameters())(batch(0))
    torch.manual_seed(5)
    # warm-up, recording, and the call itself
    assert len(drawn) == 5 and torch.equal(drawn[-1], torch.rand(()))


def test_a_loss_that_is_still_held_does_not_matter(stand_in):
    """autograd's nodes of its leaves belong to the stream that it was computed on."""
    model, loss, _ = model_and_loss()
    weight, nodes = model.weight, []

    def node():
        return weight.expand_as(weight).grad_fn.next_functions[0][0]

    held = loss(batch(0))
    before, place, version = node(), weight.data_ptr(), weight._version

    def watched(given):
        nodes.append(node())
        return loss(given)

    value = a3fta.Captured(watched, model.parameters())(batch(0))
    assert all(found is not before for found in nodes)
    assert (weight.data_ptr(), weight._version) == (place, version)
    found = grads_of(model)
    model.zero_grad()
    held.backward()
    same(found, grads_of(model))
    torch.testing.assert_close(value, held.detach())


def test_what_cannot_be_recorded(stand_in, monkeypatch):
    model, loss, _ = model_and_loss()

    @contextlib.contextmanager
    def graph(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    step = a3fta.Captured(loss, model.parameters())
    with pytest.raises(RuntimeError, match="loss: expected what a CUDA graph can hold, got: oper"):
        step(batch(0))
    assert all(p.grad is None for p in model.parameters())


def test_bad_arguments():
    model, loss, _ = model_and_loss()
    with pytest.raises(ValueError, match="parameters: expected all on one GPU, got them on cpu"):
        a3fta.Captured(loss, model.parameters())
    with pytest.raises(ValueError, match="parameters: expected some to train, got none"):
        a3fta.Captured(loss, [])


def test_bad_inputs(stand_in):
    model, loss, calls = model_and_loss()
    step = a3fta.Captured(loss, model.parameters())
    with pytest.raises(TypeError, match="inputs: expected a dictionary of tensors, got"):
        step(torch.ones(2))
    with pytest.raises(TypeError, match=r"inputs\['y'\]: expected a torch.Tensor, got 1"):
        step(batch(0) | {"y": 1})
    with pytest.raises(ValueError, match=r"inputs\['y'\]: expected a tensor on cpu, that of the"):
        step(batch(0) | {"y": torch.ones(2, device="meta")})
    assert not calls


def unet_loss(unet):
    def loss(given):
        return unet(**given, return_dict=False)[0].float().square().mean()

    return loss


@GPU
@pytest.mark.parametrize("level", ["off", "exact", "recompute", "block"])
def test_a_unet_on_a_gpu(level):
    unet = adapted_unet("cuda").train()
    if level != "off":
        a3fta.lean(unet, level)
    parameters = list(a3fta.trainable_parameters(unet))
    step, loss = a3fta.Captured(unet_loss(unet), parameters), unet_loss(unet)
    for seed in range(3):
        given = inputs(unet, seed=10 + seed)
        for extra in (given, {k: torch.cat([v, v]) for k, v in given.items()}):
            unet.zero_grad()
            found = step(extra), [p.grad.clone() for p in parameters]
            unet.zero_grad()
            expected = loss(extra)
            expected.backward()
            torch.testing.assert_close(found[0], expected.detach(), rtol=1e-4, atol=1e-6)
            for ours, p in zip(found[1], parameters, strict=True):
                torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-5)


@GPU
def test_random_numbers_on_a_gpu():
    """New ones in each call, the same after the same seed, and those that eager code draws."""
    weight = nn.Parameter(torch.ones(1000, device="cuda"))

    def loss(given):
        return nn.functional.dropout(weight * given["x"], 0.5).sum()

    step = a3fta.Captured(loss, [weight])
    x = {"x": torch.ones(1000, device="cuda")}
    torch.manual_seed(3)
    first, second = float(step(x)), float(step(x))
    torch.manual_seed(3)
    assert (float(step(x)), float(step(x))) == (first, second) and first != second
    torch.manual_seed(3)
    assert float(loss(x)) == first


@GPU
def test_several_sizes_share_memory_and_no_gradients():
    unet = adapted_unet("cuda").train()
    parameters = list(a3fta.trainable_parameters(unet))
    loss = unet_loss(unet)
    step = a3fta.Captured(loss, parameters)
    small = inputs(unet, seed=10)
    large = {k: torch.cat([v, v, v]) for k, v in inputs(unet, seed=11).items()}
    for given in (small, large):
        step(given)
    unet.zero_grad()
    for given in (large, small):
        step(given)
    found = [p.grad.clone() for p in parameters]
    unet.zero_grad()
    for given in (large, small):
        loss(given).backward()
    for ours, p in zip(found, parameters, strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-5)


@GPU
def test_under_the_callers_autocast():
    """Casts of weights are in the graph: it sees what an optimizer changes."""
    layer = nn.Linear(8, 8, device="cuda")
    step = a3fta.Captured(lambda g: layer(g["x"]).float().square().mean(), layer.parameters())
    x = {"x": torch.ones(4, 8, device="cuda")}
    with torch.autocast("cuda", torch.bfloat16):
        layer(x["x"])  # fills autocast's cache
        before = float(step(x))
        with torch.no_grad():
            layer.weight.mul_(2)
            layer.bias.mul_(2)
        assert float(step(x)) == pytest.approx(4 * before, rel=0.05)


@GPU
def test_after_a_loss_that_cannot_be_recorded():
    weight = nn.Parameter(torch.ones(4, device="cuda"))
    x = {"x": torch.ones(4, device="cuda")}

    def reads(given):
        value = (weight * given["x"]).sum()
        return value * value.item()

    with pytest.raises(RuntimeError, match="loss: expected what a CUDA graph can hold"):
        a3fta.Captured(reads, [weight])(x)
    assert weight.grad is None
    assert torch.rand(4, device="cuda").isfinite().all()  # not for a graph alone
    assert float(a3fta.Captured(lambda g: (weight * g["x"]).sum(), [weight])(x)) == 4
    assert weight.grad.tolist() == [1] * 4
