"""The peak of a step on fakes against the same count on real tensors, and against the GPU's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from a3fta_kernels.memory import ledger, step_peak
from a3fta_kernels.memory.peak import measure

from . import setups
from .test_ledger import there

# every way on one model, and on the others what is their own: blocks of two streams
CASES = [("sd15", way) for way in setups.WAYS]
CASES += [(n, w) for n in ("sd3", "flux") for w in ("native", "adapted, checkpointed", "lora")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_fakes_peak_where_real_tensors_peak(name, way):
    there(name, way)
    model, inputs = setups.build(name, torch.bfloat16)
    setups.set_up(model, way)
    found = step_peak(model, **inputs)
    assert all(p.grad is None for p in model.parameters())
    assert found == measure(model, (), inputs)
    assert found.bytes >= found.after_forward >= ledger(model, **inputs).total
    assert found.gradients <= found.trainable
    assert found.phase in ("forward", "backward", "recomputation")


class Chain(nn.Module):
    """y = x + w, then squares; every tensor is 4 KiB but w, which is one number."""

    def __init__(self, steps: int, checkpointed: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.steps, self.checkpointed = steps, checkpointed

    def squares(self, x):
        for _ in range(self.steps):
            x = x * x
        return x

    def forward(self, x):
        y = x + self.w
        if self.checkpointed:
            return checkpoint(self.squares, y, use_reentrant=False)
        return self.squares(y)


def test_a_count_by_hand():
    size = 4096
    x = torch.randn(size // 4)
    found = step_peak(Chain(3, False), x)
    assert found == step_peak(Chain(3, False), x)
    # x, y, two squares kept, and the result; the loss is four bytes, kept as mean and in a stack
    assert found.after_forward == 5 * size + 4
    assert found.gradients == 4
    lean = step_peak(Chain(3, True), x)
    assert lean.after_forward == 3 * size + 4  # x, y and the result
    assert lean.phase in ("backward", "recomputation")
    # what is computed again shows, though it was never saved for backward
    assert lean.bytes > lean.after_forward + 2 * size
    assert ledger(Chain(3, True), x).total == size


class Wasteful(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.ones(1 << 16).sum()

    @staticmethod
    def backward(ctx, dy):
        return dy * torch.ones(1 << 18).sum()


class Waster(nn.Module):
    def forward(self, x):
        return Wasteful.apply(x)


def test_what_a_function_makes_and_drops_counts_and_is_placed():
    model = nn.Sequential(nn.Linear(8, 8), Waster(), nn.Sigmoid())
    found = step_peak(model, torch.ones(8))
    assert (found.phase, found.module) == ("backward", "1")
    assert found.bytes >= 1 << 20 and found.after_forward < 1 << 16
    assert "in the backward of 1" in str(found)


def test_a_model_that_does_not_train_is_refused():
    with pytest.raises(ValueError, match="parameters that train"):
        step_peak(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))

    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="an output that depends"):
        step_peak(Cut(2, 2), torch.ones(1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["full", "checkpointed", "native", "lora"])
def test_the_allocator_of_a_gpu_agrees(way):
    from a3fta_kernels.memory import models

    model = models.build("sd15", torch.bfloat16).to_empty(device="cuda")
    setups.set_up(model, way)
    inputs = {k: torch.ones_like(v, device="cuda") for k, v in models.inputs(model, 512, 2).items()}
    predicted = step_peak(model, **inputs)
    for _ in range(2):  # the first step makes workspaces
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**inputs).sample.float().square().mean().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    held = sum(x.nbytes for x in inputs.values())
    assert predicted.bytes - held == pytest.approx(peak, rel=0.05)
