"""A training step never waits for the device: nothing is read back, nothing is sent on the way.

What a CUDA graph asks for, as far as it can be seen without a GPU.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import a3fta_kernels as a3fta
from a3fta_kernels.ops.adapter import api as adapter_api
from a3fta_kernels.ops.adapter import contract as adapter_contract
from a3fta_kernels.ops.adapter_linear import api, contract
from a3fta_kernels.processors import qkv

from .common import RUNS, adapted_unet, inputs, loss, set_backend

aten = torch.ops.aten
# the host would have to know values of the device to go on
READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.equal, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.allclose,
}  # fmt: skip


class NoSync(TorchDispatchMode):
    """Refuses operators that read values, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        assert func.overloadpacket not in READS and not by_mask(func, args), f"{func} reads values"
        out = func(*args, **(kwargs or {}))
        given, made = (
            {x.device.type for x in tree_leaves(tree) if isinstance(x, Tensor) and x.dim() > 0}
            for tree in ((args, kwargs), out)
        )
        assert len(given | made) <= 1, f"{func} moves data between {given | made}"
        return out


def by_mask(func: Any, args: Any) -> bool:
    """x[mask]: how many elements that are is known on the device alone."""
    index = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
    return index and any(i is not None and i.dtype == torch.bool for i in args[1])


@pytest.fixture
def eager_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager entries under a dispatch mode too, which then sees what is inside the ops."""
    for module in (contract, adapter_contract, qkv):
        monkeypatch.setattr(module, "is_plain", lambda x: True)


def step(model: nn.Module, batch: dict[str, Tensor]) -> NoSync:
    with NoSync() as watched:
        loss(model, batch).backward()
    assert all(p.grad is not None for p in a3fta.trainable_parameters(model))
    return watched


@RUNS
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.3}, {"scale": 0.5}, {"bias": False}], ids=str
)
def test_eager(backend: str, device: torch.device, options: dict, eager_entries: None):
    model = adapted_unet(device, **options).train()
    set_backend(model, backend)
    batch = inputs(model)
    if backend != "reference":
        a3fta.fuse_qkv(model)
    seen = step(model, batch).seen
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in seen or (
        device.type == "cuda"
    )
    if backend == "native":
        assert any(name.startswith("a3fta_native.") for name in seen)  # the mode looks inside


@RUNS
def test_adapter_apart_from_the_projection(backend: str, device: torch.device, eager_entries: None):
    """A layer that trains, two activations: the ways that do not use the fused op."""
    model = adapted_unet(device).train()
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, activation="relu"), name="other")
    set_backend(model, backend)
    for projection in a3fta.projections(model).values():
        projection.weight.requires_grad_(True)
    step(model, inputs(model))


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_on_a_gpu_that_is_not_there(backend: str, monkeypatch: pytest.MonkeyPatch):
    """A transformer block on fake tensors that say they are on a GPU: a copy to or from it would
    show. Forward alone: PyTorch without CUDA cannot record a backward of such tensors."""
    for module in (api, adapter_api):
        monkeypatch.setattr(module, "resolve", lambda *_: backend)
    block = adapted_unet(dropout=0.2).mid_block.attentions[0].transformer_blocks[0].train()
    with torch.no_grad(), FakeTensorMode(), NoSync() as watched:
        on_fake_gpu(block)
        h = torch.empty(2, 12, 32, device="cuda")
        text = torch.empty(2, 5, 16, device="cuda")
        assert block(h, None, text).device.type == "cuda"
    assert backend == "reference" or "a3fta.adapter_linear.default" in watched.seen


def on_fake_gpu(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)


PACKAGE = Path(a3fta.__file__).parent
# attributes that read a tensor on the host or wait for the device; functions that fill one there
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "synchronize", "pin_memory"}
FILLS = {"torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.equal", "torch.allclose"}


@pytest.mark.parametrize(
    "file",
    [
        *(PACKAGE / "ops").rglob("*.py"), *(PACKAGE / "processors").glob("*.py"),
        *(PACKAGE / "adapters").glob("*.py"), PACKAGE / "projection.py",
        PACKAGE / "triton_support.py",
    ],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)  # fmt: skip
def test_sources(file: Path):
    """What runs in a step has no call that waits; kernels for a GPU cannot run here to show it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in WAITS, f"{file.name}:{node.lineno} .{node.func.attr}()"
            assert ast.unparse(node.func) not in FILLS, f"{file.name}:{node.lineno}"


class TestTheWatch:
    """What it forbids it sees."""

    @pytest.fixture
    def x(self) -> Iterator[Tensor]:
        with NoSync():
            yield torch.ones(3)

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0],
            lambda x: torch.equal(x, x), lambda x: x.nonzero(), lambda x: x.unique(),
        ],
    )  # fmt: skip
    def test_reads(self, x: Tensor, read: Any):
        with pytest.raises(AssertionError, match="reads values"):
            read(x)

    @pytest.mark.parametrize("move", [lambda x: x.cpu(), lambda x: x + torch.ones(3).to(x.device)])
    def test_moves(self, move: Any):
        with FakeTensorMode(), NoSync():
            x = torch.ones(3, device="cuda")
            with pytest.raises(AssertionError, match="moves data"):
                move(x)
