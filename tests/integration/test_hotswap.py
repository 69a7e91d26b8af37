"""Other adapters, other weights, other users: compiled code stays, and computes as eager does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import a3fta_kernels as a3fta

from .common import adapted_unet, randomize


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block_of(rank: int = 4, **adapters: a3fta.AdapterConfig) -> nn.Module:
    """A transformer block, with self- and cross-attention, with these adapters beside "default"."""
    block = adapted_unet(rank=rank).mid_block.attentions[0].transformer_blocks[0].eval()
    for name, config in adapters.items():
        a3fta.inject(block, config, name=name)
    randomize(block)
    return block


def inputs(batch: int) -> tuple[Tensor, None, Tensor]:
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(batch, 12, 32, generator=generator)
    return h, None, torch.randn(batch, 5, 16, generator=generator)


def comparing(block: nn.Module, batch: int) -> tuple[Callable[[], Tensor], CompileCounter]:
    """A call that holds the compiled block to the eager one; the counter of its compilations."""
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    arguments = inputs(batch)

    def compare() -> Tensor:
        with torch.no_grad():
            expected = block(*arguments)
            torch.testing.assert_close(compiled(*arguments), expected, rtol=1e-4, atol=1e-5)
        return expected

    return compare, counter


def assert_all_differ(results: list[Tensor]) -> None:
    pairs = ((a, b) for i, a in enumerate(results) for b in results[:i])
    assert not any(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_every_choice_and_every_file_is_one_compilation(tmp_path: Path):
    """Names and weights of `set_adapters`; and hot swaps: files that are loaded into an adapter,
    also of a smaller rank, padded with zeros. Two adapters at once are another compilation."""
    like = a3fta.AdapterConfig(rank=4)
    block, small = block_of(b=like, c=like), block_of(rank=2)
    a3fta.save_adapter(block, tmp_path / "same", "c")
    randomize(small, seed=7)
    a3fta.save_adapter(small, tmp_path / "small")
    compare, counter = comparing(block, 2)
    seen = []
    for name, weight in [("default", 1), ("default", 0.5), ("b", 1), ("c", -0.3), ("default", 2)]:
        a3fta.set_adapters(block, name, weight)
        seen.append(compare())

    a3fta.set_adapters(block, "b")
    a3fta.load_adapter(block, tmp_path / "same", "b")
    seen.append(compare())
    a3fta.load_adapter(block, tmp_path / "small", "b", pad_rank=True)
    seen.append(compare())
    with torch.no_grad():
        torch.testing.assert_close(seen[-1], small(*inputs(2)), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1

    for names, weights in [
        (["default", "b"], None), (["default", "b"], [0.2, 0.9]), (["c", "b"], [0.2, 0.9]),
    ]:  # fmt: skip
        a3fta.set_adapters(block, names, weights)
        seen.append(compare())
    assert counter.frame_count == 2
    assert_all_differ(seen)


def test_a_rank_that_does_not_fit_is_refused(tmp_path: Path):
    block, small = block_of(), block_of(rank=2)
    a3fta.save_adapter(block, tmp_path / "large")
    a3fta.save_adapter(small, tmp_path / "small")
    for model, file, options, message in [
        (block, "small", {}, r"b_down of shape \(4,\), found shape \(2,\)"),
        (small, "large", {"pad_rank": True}, r"b_down of shape \(2,\), found shape \(4,\)"),
    ]:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(a3fta.AdapterFileError, match=message):
            a3fta.load_adapter(model, tmp_path / file, **options)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match="pad_rank: expected True or False, got 1"):
        a3fta.load_adapter(small, tmp_path / "small", pad_rank=1)


def test_padding_of_adapters_that_depend_on_the_timestep(tmp_path: Path):
    """film's gamma and beta are padded each; with time_rank padding would choose other ranks."""
    large, small = (adapted_unet(design="film", rank=rank) for rank in (4, 2))
    a3fta.save_adapter(small, tmp_path / "film")
    a3fta.load_adapter(large, tmp_path / "film", pad_rank=True)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = small(sample, 400, text).sample
        torch.testing.assert_close(large(sample, 400, text).sample, expected)

    large, small = (adapted_unet(time_rank=1, rank=rank) for rank in (4, 2))
    a3fta.save_adapter(small, tmp_path / "shrinking")
    a3fta.load_adapter(small, tmp_path / "shrinking", pad_rank=True)
    before = {k: v.clone() for k, v in large.state_dict().items()}
    with pytest.raises(a3fta.AdapterFileError, match="with time_rank=1 the rank decides"):
        a3fta.load_adapter(large, tmp_path / "shrinking", pad_rank=True)
    assert all(torch.equal(v, before[k]) for k, v in large.state_dict().items())


def test_every_batch_of_users_is_one_compilation():
    """Other adapters, other numbers of them, other ranks among them, a place without one."""
    ranks = {"b": 4, "c": 2}
    block = block_of(**{name: a3fta.AdapterConfig(rank=rank) for name, rank in ranks.items()})
    compare, counter = comparing(block, 4)
    seen = []
    batches: list[list[str | None]] = [
        ["default", "b", "default", "b"], ["default", "b", "c", "c"], ["c", "b", None, None],
        ["b", "b", "b", "b"], ["c", None, None, "c"],
    ]  # fmt: skip
    for names in batches:
        with a3fta.adapters_per_sample(block, names):
            for _ in range(2):
                result = compare()
        seen.append(result)
    assert_all_differ(seen)
    assert counter.frame_count == 1


def test_guidance_and_video_in_compiled_code():
    """The batch of the model and that of a layer: noted, as in eager, by a hook in the graph."""
    block = block_of(b=a3fta.AdapterConfig(rank=4))

    class Frames(nn.Module):
        """Two frames of each sample in the batch of its block."""

        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, h: Tensor, text: Tensor) -> Tensor:
            both = self.block(h.flatten(0, 1), None, text.repeat_interleave(2, 0))
            return both.unflatten(0, h.shape[:2])

    model = Frames()
    h, _, text = inputs(8)
    h, text = h.view(4, 2, 12, 32), text[:4]
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), a3fta.adapters_per_sample(model, ["default", "b"]):
        y, expected = compiled(h, text), model(h, text)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for b, name in enumerate(["default", "b", "default", "b"]):
        a3fta.set_adapters(model, name)
        with torch.no_grad():
            alone = model(h[b : b + 1], text[b : b + 1])
        torch.testing.assert_close(y[b : b + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_weights_follow_the_model():
    """What compiled code reads moves, widens and is copied with the layer."""
    block = block_of(b=a3fta.AdapterConfig(rank=4)).double()
    a3fta.set_adapters(block, "b", 0.1)
    layer = next(iter(a3fta.projections(block).values()))
    ((adapter, weight),) = [(x.adapter, x.factor) for x in layer.acting]
    assert adapter is layer.adapters["b"] and weight.dtype == torch.float64 and weight == 0.1
    a3fta.eject(block, "default")
    assert [x.adapter for x in layer.acting] == [layer.adapters["b"]]
    with pytest.raises(TypeError):  # it would not reach compiled code
        layer.weights["b"] = 0.5
    assert layer.weights == {"b": 0.1}
    a3fta.set_adapters(block, [])
    assert layer.acting == []
