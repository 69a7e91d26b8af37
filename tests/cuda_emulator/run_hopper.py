"""Holds the emulated Hopper products to the oracle. A process of its own, like run_ops.

python -m tests.cuda_emulator.run_hopper path/to/emulated.so
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from itertools import cycle

import torch

from a3fta_kernels.ops.activations import ACTIVATIONS
from tests.oracle import Case, check

from .run_ops import use

# Edges of the tiles: 64 rows per warpgroup, 128 per block; 128, 160, 192 or 256 columns; steps of
# 64 along the reduction, its rest in 16s; ranks padded to 16, 32, 64. Rows are 16-byte vectors.
EDGES = [
    Case((1, 1), 8, 8, n=8, biases=False),
    Case((63,), 64, 16, n=128),
    Case((64,), 72, 24, n=136, residual=True),
    Case((65,), 136, 40, n=160),
    Case((127,), 40, 64, n=192, residual=True, scale="tensor"),
    Case((128,), 200, 8, n=160, biases=False),
    Case((129,), 64, 32, n=128, residual=True),
    Case((2, 65), 128, 32, n=160, modulation="gamma beta", residual=True),
    Case((130,), 80, 24, n=192, biases=False, residual=True),
    Case((3, 43), 96, 16, n=192, modulation="gamma"),
    Case((2, 9), 64, 64, n=128, modulation="beta"),
    Case((257,), 72, 64, n=160),
    Case((70,), 256, 16, n=256),
    Case((5,), 264, 48, n=520, residual=True),
    Case((9,), 192, 16, n=264),
    *(Case((2, 19), 24, 8, n=24, activation=a, modulation="gamma beta") for a in ACTIVATIONS),
]
# adapters on a slice of the columns: before, between, behind; a last step that is not whole
SLICES = [
    Case((66,), 64, 16, n=128, columns=(0, 136), residual=True),
    Case((66,), 64, 16, n=160, columns=(64, 200)),
    Case((66,), 128, 40, n=192, columns=(64, 192)),
    Case((66,), 72, 24, n=128, columns=(128, 200), residual=True),
]
# what the kernel leaves to the others, and how many of forward and backward it still does
PARTLY = [
    (Case((66,), 72, 16, n=24, columns=(8, 200)), {"fused": 1, "concat": 2}),
    (Case((9,), 40, 72, n=24), {"fused": 1, "concat": 2}),
    (Case((9,), 40, 16, n=24, layout="sliced"), {"fused": 1, "concat": 1}),
    (Case((9,), 40, 12, n=24), {"fused": 0, "concat": 0}),
    (Case((9,), 36, 8, n=24), {"fused": 0, "concat": 0}),
    (Case((9,), 40, 8, n=20), {"fused": 0, "concat": 0}),
    (Case((0, 6), 16, 8, n=8, modulation="gamma beta"), {"fused": 0, "concat": 0}),
]
# each tile width with each padded rank, in two dtypes; concat and dgrad
KERNELS = 2 * (3 * 3 + 4 + 4)


class Emulator:
    """The emulator's own switches and counts."""

    def __init__(self, library: str) -> None:
        self.calls = ctypes.CDLL(library)

    def use_chip(self, capability: int, processors: int) -> None:
        self.calls.emulator_use_chip(capability, processors, 227 * 1024, 228 * 1024)

    def launches(self) -> int:
        """Of warp-specialised kernels so far."""
        return self.calls.emulator_hopper_launches()

    def kernels(self) -> int:
        """How many of them there were, each counted once."""
        return self.calls.emulator_hopper_kernels()


def run(emulator: Emulator, case: Case, dtype: torch.dtype, kind: str, expected: int) -> bool:
    before = emulator.launches()
    try:
        check(case, ("native", "cpu", dtype), kind)
        found = emulator.launches() - before
        assert found == expected, f"{found} Hopper products, expected {expected}"
    except Exception as error:
        print(f"{case} {dtype} {kind}: {type(error).__name__}: {error}")
        return False
    return True


def check_all(emulator: Emulator) -> list[bool]:
    half = cycle((torch.bfloat16, torch.float16, torch.float16, torch.bfloat16))
    processors = cycle((1, 1, 1, 1, 3, 3, 3, 3))
    found = []
    for path in ("fused", "concat"):
        for case in EDGES + SLICES:
            emulator.use_chip(90, next(processors))
            found.append(run(emulator, replace(case, path=path), next(half), "plain", 2))
    for case, expected in PARTLY:
        for path, products in expected.items():
            found.append(run(emulator, replace(case, path=path), next(half), "plain", products))
    emulator.use_chip(90, 2)
    small = Case((2, 11), 24, 8, n=24)
    for path in ("fused", "concat"):
        case = replace(small, path=path)
        # an expanded gradient has no rows of its own to copy; a transposed one is made dense first
        found.append(run(emulator, case, torch.bfloat16, "expanded", 2))
        found.append(run(emulator, case, torch.bfloat16, "transposed", 2))
        found.append(run(emulator, case, torch.float32, "plain", 0))
    for capability in (80, 100, 120):
        emulator.use_chip(capability, 2)
        found.append(run(emulator, replace(small, path="concat"), torch.bfloat16, "plain", 0))
    return found


def check_every_kernel(emulator: Emulator) -> None:
    """The instances that the cases above left out, by problems whose plan is that tile width."""
    emulator.use_chip(90, 1)
    ops = torch.ops.a3fta_native
    for dtype in (torch.bfloat16, torch.float16):
        draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731, B023
        for n in (128, 160, 192, 256):
            h, weight = draw(40, 72), draw(n, 72)
            for r in (16, 32, 64):
                w_down, v, z = draw(r, 72), draw(n, r), draw(40, r)
                exact = h.double() @ weight.double().T
                if n != 256:
                    y, a = ops.adapter_linear_forward(
                        h, weight, None, w_down, v, None, None, None, None, 0, 0
                    )
                    near(a, h.double() @ w_down.double().T)
                    near(y, exact + a.double() @ v.double().T)
                y = ops.adapter_linear_concat(h, weight, None, z, v, None)
                near(y, exact + z.double() @ v.double().T)
            dy, weight, da, w_down = draw(40, 72), draw(72, n), draw(40, 16), draw(16, n)
            dh = ops.adapter_linear_backward_dh(dy, da, weight, w_down, 0)
            near(dh, dy.double() @ weight.double() + da.double() @ w_down.double())
    assert emulator.kernels() == KERNELS, emulator.kernels()


def near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """One rounding of the result away from exact, and the sums' own."""
    error = (ours.double() - exact).abs()
    unit = torch.finfo(ours.dtype).eps
    assert (error <= unit * (exact.abs() + 0.05)).all(), error.max()


def check_nan_stays(emulator: Emulator) -> None:
    """NaN and infinity reach what depends on them, and nothing that merely shares their tile."""
    emulator.use_chip(90, 2)
    before = emulator.launches()
    ops = torch.ops.a3fta_native
    m, k, n, r, start, channels = 66, 200, 136, 24, 64, 64
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    rows = lambda x, f: f(x.isfinite().logical_not(), 1).nonzero().flatten().tolist()  # noqa: E731
    h, weight, w_down, v = draw(m, k), draw(n, k), draw(r, channels), draw(n, r)
    h[3, start - 1] = h[5, start + channels] = h[7, start] = torch.nan
    h[65, k - 1] = torch.inf
    y, a = ops.adapter_linear_forward(h, weight, None, w_down, v, None, None, None, None, start, 0)
    assert rows(y, torch.all) == rows(y, torch.any) == [3, 5, 7, 65]
    assert rows(a, torch.any) == [7]
    z = draw(m, r)
    z[64, 0], weight[130, 199], v[9, 23] = torch.nan, torch.nan, torch.inf
    y = ops.adapter_linear_concat(draw(m, k), weight, None, z, v, None)
    assert rows(y, torch.all) == [64]
    assert rows(y.T, torch.all) == [9, 130]
    assert y.isfinite().sum() == (m - 1) * (n - 2)
    da = draw(m, r)
    da[2, 1] = torch.nan
    dh = ops.adapter_linear_backward_dh(draw(m, n), da, draw(n, k), w_down, start)
    expected = torch.zeros(m, k, dtype=torch.bool)
    expected[2, start : start + channels] = True
    assert torch.equal(dh.isnan(), expected)
    assert emulator.launches() == before + 3


def main(library: str) -> int:
    torch.set_num_threads(1)
    use(library)
    emulator = Emulator(library)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    check_nan_stays(emulator)
    check_every_kernel(emulator)
    found = check_all(emulator)
    print(f"{len(found)} cases, {found.count(False)} failed")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
