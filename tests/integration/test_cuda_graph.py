"""A whole training step in a CUDA graph: forward, loss, backward, optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.backends import why_not

from .common import Batch, adapted_unet, inputs, loss, set_backend

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and none is here"
)
BACKENDS = [
    backend
    for backend in ("reference", "native", "triton")
    if torch.cuda.is_available()
    and why_not(backend, torch.device("cuda"), torch.float32) is None
]  # fmt: skip
WARM_UP = 3
# sums over rows may be taken in another order in each run
CLOSE = dict(rtol=1e-3, atol=1e-5)


class Step:
    """A model with its optimizer; `run` is the whole step, from buffers that stay in place."""

    def __init__(self, backend: str, dtype: torch.dtype, fuse: bool = False) -> None:
        self.model = adapted_unet("cuda").to(dtype).train()
        set_backend(self.model, backend)
        if fuse:
            assert set(a3fta.fuse_qkv(self.model).values()) == {""}
        self.parameters = list(a3fta.trainable_parameters(self.model))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, fused=True, capturable=True)
        self.batch = inputs(self.model)

    def run(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        value = loss(self.model, self.batch)
        value.backward()
        self.optimizer.step()
        return value

    def load(self, batch: Batch) -> None:
        for name, value in batch.items():
            self.batch[name].copy_(value)

    def warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.warm_up()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = self.run()
        return graph, value


def pair(backend: str, dtype: torch.dtype, fuse: bool = False) -> tuple[Step, Step]:
    """Two equal steps; the second one is to be captured."""
    eager, captured = Step(backend, dtype, fuse), Step(backend, dtype, fuse)
    eager.warm_up()
    return eager, captured


def compare(eager: Step, captured: Step) -> None:
    for expected, found in zip(eager.parameters, captured.parameters, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(found.grad, expected.grad, **CLOSE)


@pytest.mark.parametrize("fuse", [False, True], ids=["three products", "fuse_qkv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_equal_eager_steps(backend: str, fuse: bool):
    eager, captured = pair(backend, torch.float32, fuse)
    graph, value = captured.capture()
    before = [p.detach().clone() for p in captured.parameters]
    for seed in range(3):
        batch = inputs(eager.model, seed=10 + seed)
        eager.load(batch)
        captured.load(batch)
        expected = eager.run()
        graph.replay()
        torch.testing.assert_close(value, expected, **CLOSE)
        compare(eager, captured)
    assert not any(torch.equal(a, b) for a, b in zip(before, captured.parameters, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_trunk(backend: str):
    """The casts of fp32 adapters are part of the graph."""
    eager, captured = pair(backend, torch.bfloat16)
    assert {p.dtype for p in captured.parameters} == {torch.float32}
    graph, value = captured.capture()
    for _ in range(2):
        expected = eager.run()
        graph.replay()
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_v_is_computed_inside_the_graph(backend: str):
    """V = scale * weight @ w_up follows whatever writes to w_up, or to the weight, in place."""
    eager, captured = pair(backend, torch.float32)
    graph, value = captured.capture()
    seen = []
    for change in ("w_up", "weight"):
        for step in (eager, captured):
            with torch.no_grad():
                for projection in a3fta.projections(step.model).values():
                    target: nn.Parameter = (
                        projection.weight
                        if change == "weight"
                        else projection.adapters["default"].w_up  # type: ignore[union-attr]
                    )
                    target.data.mul_(1.5).add_(0.05)
        expected = eager.run()
        graph.replay()
        torch.testing.assert_close(value, expected, **CLOSE)
        compare(eager, captured)
        seen.append(float(value))
    assert seen[0] != seen[1]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reduce_overhead(backend: str, fresh_compiler: None):
    """torch.compile with its own CUDA graphs, around an optimizer in eager mode."""
    eager, compiled = Step(backend, torch.float32), Step(backend, torch.float32)
    forward = torch.compile(compiled.model, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        batch = inputs(eager.model, seed=10 + seed)
        eager.load(batch)
        compiled.load(batch)
        expected = eager.run()
        torch.compiler.cudagraph_mark_step_begin()
        compiled.optimizer.zero_grad(set_to_none=True)
        value = forward(**compiled.batch).sample.float().square().mean()
        value.backward()
        compiled.optimizer.step()
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-4)
