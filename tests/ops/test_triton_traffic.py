"""What the Triton kernels read, write and multiply, counted from the run itself.

The interpreter's loads, stores and products are hooked: bytes come from the addresses that a
kernel touched, FLOP from the operands it multiplied, launches from the launcher. Counts are of
what programs ask for: a second read of the same rows by the same program comes out of a cache.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from a3fta_kernels.backends import triton_interpreted
from a3fta_kernels.ops.adapter import contract as adapter_contract
from a3fta_kernels.ops.adapter_bank import contract as bank_contract
from a3fta_kernels.ops.adapter_bank.reference import adapter_bank as bank_reference
from a3fta_kernels.ops.adapter_linear import choice
from a3fta_kernels.ops.adapter_linear import contract as linear_contract
from benchmarks import floors
from benchmarks.measure import _VIEWS
from benchmarks.workloads import Workload

if not triton_interpreted():
    pytest.skip("counted in the interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.runtime import interpreter

from a3fta_kernels import triton_support

DTYPE = torch.bfloat16
PATHS = linear_contract.PATHS


@dataclass
class Traffic(TorchDispatchMode):
    """The record of one run; a dispatch mode, so that it sees PyTorch's own products too."""

    # the number of the launch, load or store, and the addresses
    touched: list[tuple[int, str, np.ndarray]] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    library: Counter[str] = field(default_factory=Counter)
    made: list[Tensor] = field(default_factory=list)
    products: list[tuple[int, ...]] = field(default_factory=list)
    flop: int = 0
    inside: bool = False  # a kernel runs

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        # a kernel in the interpreter uses PyTorch, too
        if self.inside or _VIEWS.fullmatch(name):
            return result
        if name.startswith(("empty", "new_empty")):
            self.made.append(result)
        elif name in ("mm", "addmm_", "addmm"):
            left = args[0] if name == "mm" else args[1]
            self.flop += 2 * left.numel() * result.shape[1]
            self.products.append(tuple(result.shape))
            self.library["products"] += 1
            self.made.append(result)
        else:
            self.library["others"] += 1
            if isinstance(result, Tensor):
                self.made.append(result)
        return result

    def elements(self, kind: str, tensor: Tensor, kernel: str = "") -> int:
        """How many elements of `tensor` were loaded or stored, each as often as it was."""
        return sum(int(self._inside(a, tensor).sum()) for a in self._of(kind, kernel))

    def once(self, kind: str, tensor: Tensor, kernel: str = "") -> bool:
        """Whether each element of `tensor` was touched exactly once."""
        parts = [a[self._inside(a, tensor)] for a in self._of(kind, kernel)]
        found = np.concatenate([np.empty(0, np.uint64), *parts])
        return len(found) == len(np.unique(found)) == tensor.numel()

    def stored(self) -> int:
        return sum(len(a) for a in self._of("store", ""))

    def _of(self, kind: str, kernel: str) -> Iterator[np.ndarray]:
        for launch, its_kind, addresses in self.touched:
            if its_kind == kind and kernel in ("", self.kernels[launch]):
                yield addresses

    def passes(self, *tensors: Tensor) -> int:
        """How often memory is passed over: the launches that touch a tensor, tensor by tensor."""
        return sum(
            len({i for i, _, addresses in self.touched if self._inside(addresses, x).any()})
            for x in tensors
        )

    @staticmethod
    def _inside(addresses: np.ndarray, tensor: Tensor) -> np.ndarray:
        """Of a tensor that fills its storage."""
        first = np.uint64(tensor.data_ptr())
        return (addresses >= first) & (addresses < first + np.uint64(tensor.nbytes))


@pytest.fixture
def traffic(monkeypatch) -> Traffic:
    record = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store, product = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
    )
    launch = triton_support.Launcher._launch

    def note(kind: str, pointers: Any, mask: Any) -> None:
        where = np.broadcast_to(mask.data, pointers.data.shape)
        record.touched.append((len(record.kernels) - 1, kind, pointers.data[where]))

    def noted_load(self, pointers, mask, *rest, **options):
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def noted_store(self, pointers, value, mask, *rest, **options):
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def noted_product(self, a, b, *rest, **options):
        record.flop += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return product(self, a, b, *rest, **options)

    def noted_launch(self, *arguments):
        record.kernels.append(self.kernel.__name__.removesuffix("_kernel"))
        record.inside = True
        launch(self, *arguments)
        record.inside = False

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    monkeypatch.setattr(builder, "create_dot", noted_product)
    monkeypatch.setattr(triton_support.Launcher, "_launch", noted_launch)
    return record


@dataclass
class Run:
    """Forward and backward of one op, each under a record of its own."""

    forward: Traffic
    backward: Traffic
    h: Tensor
    dy: Tensor
    y: Tensor
    dh: Tensor
    residual: Tensor | None = None
    v: Tensor | None = None


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape).to(dtype)


def fresh(traffic: Traffic) -> Traffic:
    """A copy of what was recorded, which then begins anew."""
    done = Traffic(
        traffic.touched[:], traffic.kernels[:], Counter(traffic.library), traffic.made[:],
        traffic.products[:], traffic.flop,
    )  # fmt: skip
    for part in (traffic.touched, traffic.kernels, traffic.library, traffic.made, traffic.products):
        part.clear()
    traffic.flop = 0
    return done


def run_adapter(traffic: Traffic, m: int, c: int, r: int) -> Run:
    h, dy, w_down, w_up = draw(m, c), draw(m, c), draw(r, c), draw(c, r)
    with traffic:
        y, a = adapter_contract.forward(
            h, w_down, w_up, None, None, None, None, None, None, 1.0, "gelu", "triton"
        )
        forward = fresh(traffic)
        grads = adapter_contract.backward(
            dy, h, a, w_down, w_up, None, None, None, None, None, False, 1.0, "gelu", "triton",
            [True, True, True, False, False, False, False, False],
        )  # fmt: skip
        backward = fresh(traffic)
    return Run(forward, backward, h, dy, y, grads[0])


def run_linear(
    traffic: Traffic, path: str, m: int, c: int, n: int, r: int, residual: bool = False
) -> Run:
    h, dy, weight = draw(m, c), draw(m, n), draw(n, c)
    w_down, w_up = draw(r, c), draw(c, r)
    added = draw(m, n) if residual else None
    with traffic:
        y, a, v = linear_contract.forward(
            h, weight, w_down, w_up, None, None, None, None, None, added, None, None, None, 1.0,
            0, "gelu", path, "triton",
        )  # fmt: skip
        forward = fresh(traffic)
        grads = linear_contract.backward(
            dy, a, v, h, weight, w_down, w_up, None, None, None, None, None, 1.0, 0, "gelu", path,
            "triton", [True, True, True, False, False, False, False, False],
        )  # fmt: skip
        backward = fresh(traffic)
    return Run(forward, backward, h, dy, y, grads[0], added, v)


# past one tile in every direction, the last of each partly filled
M, C, N, R = 150, 200, 280, 24


def test_adapter_forward(traffic):
    """The two loops: h for the way down and again, out of the cache, for the residual."""
    run = run_adapter(traffic, M, C, R)
    assert run.forward.elements("load", run.h) == 2 * M * C
    assert run.forward.once("store", run.y)


@pytest.mark.parametrize("apart", [False, True], ids=["", "base"])
def test_a_bank_is_one_launch_over_all_samples(traffic, monkeypatch, apart):
    """h twice, y once; of the bank what the samples have, once per block of rows. Without an
    adapter a sample is copied. With a base apart it and h are read once."""
    bank = importlib.import_module("a3fta_kernels.ops.adapter_bank.triton")
    chosen = [triton_support.config(8, 1, BLOCK_M=32, BLOCK_C=64, BLOCK_R=32)]
    monkeypatch.setattr(bank.launch_bank, "configs", lambda *_: chosen)
    samples = M // 50  # of 50 rows: two blocks each
    h, w_down, w_up, b_up = draw(M, C), draw(3, R, C), draw(3, C, R), draw(3, C)
    index, scale = torch.tensor([2, -1, 0]), torch.tensor([0.5, 1.0, 2.0])
    base = draw(M, C) if apart else None
    with traffic:
        y = bank_contract.forward(h, w_down, w_up, index, None, b_up, scale, base, "gelu", "triton")
        found = fresh(traffic)
    assert found.kernels == ["bank"] and found.once("store", y)
    assert found.elements("load", h) == (2 if apart else 2 * 2 + 1) * M // samples * C
    assert base is None or found.once("load", base)
    for weight in (w_down, w_up):
        read = [found.elements("load", one) for one in weight]
        assert read == [2 * R * C, 0, 2 * R * C]
    eager = bank_reference(
        h.view(samples, 50, C), w_down, w_up, index, None, b_up, scale=scale, activation="gelu",
        base=None if base is None else base.view(samples, 50, C),
    )  # fmt: skip
    torch.testing.assert_close(
        y.view_as(eager), eager, rtol=0.02, atol=0.02 * float(eager.abs().max())
    )


def test_adapter_backward(traffic):
    """Two kernels read dy (rows_backward twice, the second time out of the cache), one reads h,
    dh is written once: four passes over memory, where the floor is three."""
    found = run_adapter(traffic, M, C, R)
    run = found.backward
    assert run.elements("load", found.dy, "rows_backward") == 2 * M * C
    assert run.once("load", found.dy, "weight_grad") and run.once("load", found.h)
    assert run.elements("load", found.h, "rows_backward") == 0
    assert run.once("store", found.dh)
    assert run.passes(found.dy, found.h, found.dh) == 4


def test_passes_of_adapter_against_the_floor(traffic):
    """Forward and backward: one pass more than the bytes that a workload must move."""
    run = run_adapter(traffic, M, C, R)
    forward = run.forward.passes(run.h, run.y)
    backward = run.backward.passes(run.dy, run.h, run.dh)
    floor = (
        floors.moved("adapter", Workload("", 1, M, C, R), "forward+backward", DTYPE)
        // DTYPE.itemsize
    )
    narrow = 2 * M * R + 4 * C * R  # a, written and read; both weights, twice
    assert (forward + backward) * M * C == floor - narrow + M * C


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("residual", [False, True])
def test_adapter_linear_forward(path, residual, traffic):
    found = run_linear(traffic, path, M, C, N, R, residual)
    run = found.forward
    columns = -(-N // 128)
    if path != "fused":
        assert run.once("load", found.h, "rows_forward")
    else:
        # each column of tiles reads the rows, with the weight
        assert run.elements("load", found.h) == columns * M * C
    if path == "concat":
        assert run.elements("load", found.h, "concat_gemm") == columns * M * C
    if residual:
        assert run.once("load", found.residual)
    # skinny stores r, to which the library adds in place
    assert run.once("store", found.y)


@pytest.mark.parametrize("path", PATHS)
def test_adapter_linear_backward(path, traffic):
    found = run_linear(traffic, path, M, C, N, R)
    run = found.backward
    assert run.once("load", found.dy, "rows_backward")
    assert run.once("load", found.dy, "weight_grad") and run.once("load", found.h, "weight_grad")
    assert run.elements("load", found.h) == M * C
    if path != "skinny":
        assert run.elements("load", found.dy, "concat_gemm") == -(-C // 128) * M * N
        assert run.once("store", found.dh)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_wide_is_written_beside_y_and_dh(path, traffic):
    found = run_linear(traffic, path, M, C, N, R)
    for run, wide in ((found.forward, found.y), (found.backward, found.dh)):
        mine = {wide.untyped_storage().data_ptr()}
        others = [
            x for x in run.made
            if x.numel() >= M * min(C, N) and x.untyped_storage().data_ptr() not in mine
        ]  # fmt: skip
        assert not others, [tuple(x.shape) for x in others]
        # z, a and da, and two partial sums of each weight gradient
        written = run.stored() - (wide.numel() if run.elements("store", wide) else 0)
        assert written <= 2 * M * R + 2 * (C + N) * (R + 1) + (M // 16 + 1) * R


@pytest.mark.parametrize("path", PATHS)
def test_v_is_made_once(path, traffic):
    found = run_linear(traffic, path, M, C, N, R)
    assert found.forward.once("store", found.v, "merged")
    assert "merged" not in found.backward.kernels and (N, R) not in found.backward.products


# whole tiles of every kernel, so that padding counts nothing
WHOLE = Workload("", 1, 128, 128, 64)


def test_flop_of_adapter(traffic):
    w = WHOLE
    run = run_adapter(traffic, w.m, w.c, w.r)
    forward = floors.flop("adapter", w, "forward")
    assert run.forward.flop == forward
    assert run.forward.flop + run.backward.flop == floors.flop("adapter", w, "forward+backward")


@pytest.mark.parametrize("path", PATHS)
def test_flop_of_adapter_linear(path, traffic):
    """The adapter's arithmetic and no more; the fused kernel makes z once per column of tiles."""
    for n in (128, 384):
        run = run_linear(traffic, path, WHOLE.m, WHOLE.c, n, WHOLE.r)
        m, c, r = WHOLE.m, WHOLE.c, WHOLE.r
        forward = 2 * m * c * n + 2 * m * r * (c + n) + 2 * n * c * r
        backward = 2 * m * c * n + 4 * m * r * (c + n) + 2 * n * c * r
        if n == c:
            assert forward == floors.flop("adapter_linear", WHOLE, "forward")
            assert forward + backward == floors.flop("adapter_linear", WHOLE, "forward+backward")
        again = 2 * m * c * r * (n // 128 - 1) if path == "fused" else 0
        assert run.forward.flop == forward + again
        assert run.backward.flop == backward


# op, path: kernels of ours, products by the library, and what else PyTorch runs: casts of the
# weight gradients
LAUNCHES = {
    ("adapter", ""): (
        (["rows_forward"], 0, 0),
        (["rows_backward", "weight_grad", "weight_grad", "sum"], 0, 2),
    ),
    ("adapter_linear", "skinny"): (
        (["merged", "rows_forward"], 1, 0),
        (["rows_backward", "weight_grad", "weight_grad", "sum", "up_grads"], 2, 1),
    ),
    ("adapter_linear", "fused"): (
        (["merged", "linear_forward"], 0, 0),
        (["rows_backward", "concat_gemm", "weight_grad", "weight_grad", "sum", "up_grads"], 0, 1),
    ),
    ("adapter_linear", "concat"): (
        (["merged", "rows_forward", "concat_gemm"], 0, 0),
        (["rows_backward", "concat_gemm", "weight_grad", "weight_grad", "sum", "up_grads"], 0, 1),
    ),
}


@pytest.mark.parametrize("op, path", LAUNCHES)
def test_launches(op, path, traffic):
    if op == "adapter":
        run = run_adapter(traffic, M, C, R)
    else:
        run = run_linear(traffic, path, M, C, N, R)
    for record, expected in zip((run.forward, run.backward), LAUNCHES[op, path], strict=True):
        found = record.kernels, record.library["products"], record.library["others"]
        assert found == expected


@pytest.mark.parametrize("path", PATHS)
def test_casts_of_an_adapter_in_fp32(path, traffic):
    """As it is trained, with biases: gamma and beta, and w_down for the backward."""
    wide = torch.float32
    h, dy, weight, bias = draw(M, C), draw(M, N), draw(N, C), draw(N)
    adapter = (
        draw(R, C, dtype=wide), draw(C, R, dtype=wide), draw(R, dtype=wide), draw(C, dtype=wide),
        draw(2, R, dtype=wide), draw(2, R, dtype=wide),
    )  # fmt: skip
    options = 1.5, 0, "gelu", path, "triton"
    with traffic:
        _, a, v = linear_contract.forward(
            h, weight, *adapter, None, None, bias, None, None, *options
        )
        assert traffic.library["others"] == 2
        linear_contract.backward(
            dy, a, v, h, weight, *adapter, None, *options, [True] * 7 + [False]
        )
        assert traffic.library["others"] == 2 + 3


@pytest.mark.parametrize("path", PATHS)
def test_the_rule_counts_these_launches(path):
    """choice.py counts the kernels for z, y and dh: less V and dw_up, da and the three for sums."""
    forward, backward = LAUNCHES["adapter_linear", path]
    assert choice.LAUNCHES["triton"][path] == (
        len(forward[0]) + forward[1] - 1,
        len(backward[0]) + backward[1] - 1 - 4,
    )
