"""Holds the emulated CUDA library to the oracle. A process of its own: it registers the native ops.

python -m tests.cuda_emulator.run_ops path/to/emulated.so
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product

import torch

from a3fta_kernels.ops.activations import ACTIVATIONS
from tests.oracle import Case, check

# sizes around the tiles of 64 x 64 and 64 x 128, reductions of 16 and 32, rank chunks of 64
ADAPTER = [
    Case((1, 1), 8, 1),
    Case((2, 3), 33, 4, biases=False),
    Case((65,), 72, 16),
    Case((2, 67), 130, 65),
    Case((3, 21), 48, 8, modulation="gamma beta", scale="tensor"),
    Case((5, 1), 17, 3, modulation="gamma"),
    Case((2, 300), 40, 70, modulation="beta"),
    Case((64,), 64, 128),
    Case((9,), 24, 256),
    Case((9,), 24, 700),  # beyond what stays in shared memory
    Case((2, 0), 16, 4),
    Case((3, 0), 16, 4, modulation="gamma beta"),
    Case((2, 9), 32, 8, layout="sliced"),
    Case((2, 9), 32, 8, layout="transposed"),
    Case((1100,), 24, 4),
    *(Case((2, 19), 24, 8, activation=a, modulation="gamma beta") for a in ACTIVATIONS),
]
# for the one-pass forward: its blocks of 64, 32 and 16 rows, padded ranks of 16, 32 and 64, chunks
# of 64 and 128 columns with and without a rest, ranks whose rows are no 16-byte vectors; and past
# what it takes: C too wide, C odd
ROWS = [
    Case((1, 1), 8, 1),
    Case((130,), 328, 4),
    Case((3, 43), 136, 16, modulation="gamma beta", scale="tensor"),
    Case((260,), 72, 24, biases=False),
    Case((2, 67), 256, 33, modulation="gamma"),
    Case((515,), 64, 64),
    Case((70,), 1280, 64, modulation="beta"),
    Case((2, 9), 1544, 20),
    Case((18,), 3072, 64),
    Case((17,), 7200, 8),
    Case((70,), 130, 16),
    Case((2, 9), 32, 8, layout="sliced"),
]
# for the one-pass backward: clusters of 1 to 16 blocks, whose last slices are ragged or empty; more
# row blocks than clusters, a rest of rows; samples that end inside a block of rows; two buffers of
# dy instead of three; and past what it takes
CLUSTER = [
    Case((1, 1), 8, 1),
    Case((67,), 40, 4),
    Case((5, 41), 136, 16, modulation="gamma beta", scale="tensor"),
    Case((330,), 264, 24, biases=False),
    Case((3, 50), 520, 64, modulation="gamma"),
    Case((130,), 1536, 64),
    Case((70,), 2048, 20, modulation="beta"),
    Case((600,), 72, 33),
    Case((70,), 2056, 16),
    Case((9,), 4104, 16),
]
LINEAR = [
    Case((1, 1), 8, 1, n=8),
    Case((2, 3), 33, 4, n=17, biases=False),
    Case((70,), 64, 16, n=136, residual=True),
    Case((2, 33), 130, 65, n=129, scale="tensor", residual=True),
    Case((3, 21), 48, 16, n=48, modulation="gamma beta", residual=True),
    Case((2, 9), 32, 8, n=40, columns=(0, 80)),
    Case((2, 9), 32, 8, n=40, columns=(13, 80), residual=True),
    Case((2, 9), 32, 8, n=40, columns=(48, 80), residual=True),
    Case((66,), 136, 24, n=20, columns=(8, 300), modulation="gamma"),
    Case((9,), 24, 256, n=20),
    Case((9,), 24, 700, n=40, columns=(3, 30), residual=True),
    Case((2, 0), 16, 4, n=8, residual=True),
    Case((0, 6), 16, 4, n=8, modulation="gamma beta"),
    Case((2, 9), 32, 8, n=16, layout="sliced"),
    *(Case((2, 19), 24, 8, n=20, activation=a) for a in ACTIVATIONS),
]


def use(library: str) -> None:
    """Makes the emulated library the native backend."""
    torch.ops.load_library(library)
    backends = importlib.import_module("a3fta_kernels.backends")
    status = backends.BackendStatus(True, ("cpu",), "emulated CUDA kernels")
    backends.native_status = lambda: status
    native = importlib.import_module("a3fta_kernels.ops.adapter_linear.native")
    native.paths = lambda device_type: ("skinny", "fused", "concat")


def checks() -> list[tuple[Case, torch.dtype, str]]:
    """Each shape in one 16-bit type and in fp32, by every path; a few kinds of gradient.

    Those of the one-pass kernels in 16 bits; the last ones, ROWS, again on a chip without clusters.
    """
    found = []
    half = cycle((torch.bfloat16, torch.float16))
    for case in ADAPTER + LINEAR:
        for dtype in (next(half), torch.float32):
            paths = ("auto",) if case.n is None else ("skinny", "fused")
            found += [(replace(case, path=p), dtype, "plain") for p in paths]
    found += [(case, next(half), "plain") for case in ROWS + CLUSTER]
    for kind in ("expanded", "transposed"):
        found += [(Case((2, 11), 24, 8), torch.bfloat16, kind)]
        found += [(Case((2, 11), 24, 8, n=20, path="fused"), torch.bfloat16, kind)]
    return found + [(case, next(half), "plain") for case in ROWS]


def check_nan_stays() -> None:
    """A NaN reaches what depends on it, and nothing that merely shares its tile."""
    ops = torch.ops.a3fta_native
    m, k, n, r, start, channels = 9, 30, 40, 5, 3, 20
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    h, weight, w_down, v = draw(m, k), draw(n, k), draw(r, channels), draw(n, r)
    h[3, start - 1] = h[5, start + channels] = h[7, start] = torch.nan
    y, a = ops.adapter_linear_forward(h, weight, None, w_down, v, None, None, None, None, start, 0)
    assert y.isnan().all(1).nonzero().flatten().tolist() == [3, 5, 7]
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 5, 7]
    assert a.isnan().any(1).nonzero().flatten().tolist() == [7]
    da = draw(m, r)
    da[2, 1] = torch.nan
    dh = ops.adapter_linear_backward_dh(draw(m, n), da, weight, w_down, start)
    expected = torch.zeros(m, k, dtype=torch.bool)
    expected[2, start : start + channels] = True
    assert torch.equal(dh.isnan(), expected)


def check_adapter_nan_stays() -> None:
    """The same for the one-pass kernels: rows, columns, ranks that are padding."""
    ops = torch.ops.a3fta_native
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float16)  # noqa: E731
    h, w_down, w_up = draw(70, 72), draw(20, 72), draw(72, 20)
    h[5, 7], h[66, 71], w_up[9, 2] = torch.nan, torch.inf, torch.nan
    y, a = ops.adapter_forward(h, w_down, w_up, None, None, None, None, 0)
    assert (~a.isfinite()).any(1).nonzero().flatten().tolist() == [5, 66]
    expected = torch.zeros(70, 72, dtype=torch.bool)
    expected[5] = expected[66] = expected[:, 9] = True
    assert torch.equal(~y.isfinite(), expected)

    dy, h, a = draw(70, 264), draw(70, 264), draw(70, 20)
    dy[5, 7], dy[66, 263], h[3, 200] = torch.nan, torch.inf, torch.nan
    w_down, w_up = draw(20, 264), draw(264, 20)
    dh, _, g_up, _, dy_sum, _, _ = ops.adapter_backward(
        dy, h, a, w_down, w_up, None, None, 0, True, True
    )
    assert (~dh.isfinite()).any(1).nonzero().flatten().tolist() == [5, 66]
    assert (~g_up.isfinite()).any(1).nonzero().flatten().tolist() == [7, 263]
    assert (~dy_sum.isfinite()).nonzero().flatten().tolist() == [7, 263]
    _, dw_down, _, da_sum, _, _, _ = ops.adapter_backward(
        draw(70, 264), h, a, w_down, w_up, None, None, 0, False, True
    )
    assert (~dw_down.isfinite()).any(0).nonzero().flatten().tolist() == [200]
    assert da_sum.isfinite().all()


class Emulator:
    """The emulator's own switches and counts."""

    def __init__(self, library: str) -> None:
        self.calls = ctypes.CDLL(library)

    def plan_of_rows(self, chip: tuple[int, int, int], m: int, c: int, r: int) -> tuple[int, int]:
        """Rows of a block and bytes of shared memory; (0, 0): does not fit."""
        found = (ctypes.c_int64 * 2)()
        self.calls.plan_of_rows(*chip, *map(ctypes.c_int64, (m, c, r)), found)
        return tuple(found)

    def plan_of_cluster(
        self, chip: tuple[int, int, int], n: int, c: int, r: int, through: bool
    ) -> tuple[int, ...]:
        """Blocks of a cluster, columns of a slice of dy and of h, buffers of dy, bytes."""
        found = (ctypes.c_int64 * 5)()
        self.calls.plan_of_cluster(*chip, *map(ctypes.c_int64, (n, c, r)), through, found)
        return tuple(found)

    def plan_of_forward(
        self, chip: tuple[int, int, int], m: int, c: int, r: int
    ) -> tuple[int, ...]:
        """Blocks of a cluster, columns of a slice, buffers of h, bytes; zeros: blocks of rows."""
        found = (ctypes.c_int64 * 4)()
        self.calls.plan_of_forward(*chip, *map(ctypes.c_int64, (m, c, r)), found)
        return tuple(found)

    def use_chip(self, capability: int, processors: int, shared: int) -> None:
        """From here on a chip with `shared` KB of shared memory for a block."""
        self.calls.emulator_use_chip(capability, processors, shared * 1024, (shared + 1) * 1024)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        self.calls.emulator_count(True)
        yield
        self.calls.emulator_count(False)

    def traffic(self, x: torch.Tensor) -> tuple[int, int, int, int]:
        """Fewest and most reads, fewest and most writes of a 16-byte vector of x."""
        found = (ctypes.c_long * 4)()
        size = x.numel() * x.element_size()
        self.calls.emulator_traffic(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(size), found)
        return tuple(found)


# capability, processors, KB of shared memory a block may have
H200, A100, RTX4090 = (90, 132, 227), (80, 108, 163), (89, 128, 99)
B200, RTX5090 = (100, 148, 227), (120, 170, 99)
# chip, M, C, R: rows of a block, blocks that a processor's shared memory holds
ROW_PLANS = [
    (H200, 16384, 320, 64, 64, 3),
    (H200, 16384, 640, 64, 64, 2),
    (H200, 16384, 640, 16, 64, 2),
    (H200, 4096, 640, 64, 32, 3),
    (H200, 4096, 1280, 64, 32, 2),
    (H200, 256, 1280, 64, 16, 3),
    (H200, 16384, 1536, 64, 16, 2),
    (H200, 4096, 3072, 64, 16, 1),
    (H200, 4096, 8192, 64, 0, 0),
    (H200, 4096, 640, 65, 0, 0),
    (A100, 16384, 640, 64, 32, 2),
    (A100, 4096, 3072, 16, 16, 1),
    (RTX4090, 16384, 640, 64, 16, 2),
    (RTX4090, 16384, 1280, 64, 16, 1),
    (RTX4090, 4096, 3072, 64, 0, 0),
    (B200, 16384, 640, 64, 64, 2),
]
# chip, N, C, R, with dh: blocks of a cluster, columns of a slice of dy and of h, buffers of dy
CLUSTER_PLANS = [
    (H200, 320, 320, 64, True, 2, 160, 160, 3),
    (H200, 640, 640, 64, True, 4, 160, 160, 3),
    (H200, 640, 640, 16, True, 4, 160, 160, 3),
    (H200, 1152, 1152, 64, True, 8, 144, 144, 3),
    (H200, 1280, 1280, 64, True, 8, 160, 160, 3),
    (H200, 1280, 1280, 16, True, 8, 160, 160, 3),
    (H200, 1536, 1536, 64, True, 8, 192, 192, 2),
    (H200, 2048, 2048, 16, True, 8, 256, 256, 3),
    (H200, 3072, 3072, 64, True, 16, 192, 192, 2),
    (H200, 3072, 1536, 16, False, 16, 192, 96, 3),
    (H200, 1280, 0, 64, False, 8, 160, 0, 3),
    (H200, 4104, 4104, 16, True, 0, 0, 0, 0),
    (H200, 640, 640, 65, True, 0, 0, 0, 0),
    (RTX4090, 640, 640, 16, True, 0, 0, 0, 0),
    (B200, 640, 640, 64, True, 4, 160, 160, 3),
    (RTX5090, 640, 640, 16, True, 8, 80, 80, 3),
]


# chip, M, C, R: blocks of a cluster, 0 where blocks of rows do; columns of a slice, buffers of h
FORWARD_PLANS = [
    (H200, 16384, 640, 64, 4, 160, 3),
    (H200, 16384, 640, 16, 0, 0, 0),
    (H200, 4096, 1280, 64, 8, 160, 3),
    (H200, 4096, 1280, 16, 0, 0, 0),
    (H200, 16384, 1536, 64, 8, 192, 3),
    (H200, 4096, 3072, 64, 16, 192, 3),
    (A100, 16384, 640, 64, 0, 0, 0),
]


def check_plans(emulator: Emulator) -> None:
    """The choices that the workloads meet, by chip; every plan keeps within its chip."""
    for chip, m, c, r, block_m, blocks in ROW_PLANS:
        found, shared = emulator.plan_of_rows(chip, m, c, r)
        held = (chip[2] + 1) * 1024 // (shared + 1024) if found else 0
        assert (found, held) == (block_m, blocks), (chip, m, c, r, found, held, shared)
    for chip, n, c, r, through, *expected in CLUSTER_PLANS:
        *plan, _ = emulator.plan_of_cluster(chip, n, c, r, through)
        assert plan == expected, (chip, n, c, r, through, plan)
    for chip, m, c, r, *expected in FORWARD_PLANS:
        *plan, shared = emulator.plan_of_forward(chip, m, c, r)
        assert plan == expected and shared <= chip[2] * 1024, (chip, m, c, r, plan)
    for n, c in product(range(8, 2056, 136), range(0, 2056, 136)):
        for r in (1, 17, 64):
            through = n == c
            blocks, n_width, c_width, _, shared = emulator.plan_of_cluster(H200, n, c, r, through)
            assert shared <= 227 * 1024 and blocks in (0, 1, 2, 4, 8, 16)
            if blocks > 0:
                assert blocks * n_width >= n and blocks * c_width >= c
                assert n_width % 16 == c_width % 16 == 0
    for chip in (H200, A100, RTX4090, B200):
        for m in (1, 63, 64, 65, 2**31 // 8 + 1):
            for c in range(8, 8192, 264):
                for r in (1, 4, 16, 17, 64):
                    found, shared = emulator.plan_of_rows(chip, m, c, r)
                    assert found in (0, 16, 32, 64) and shared <= chip[2] * 1024
                    # the rows of h at least, and nothing where they fit generously
                    assert shared >= 2 * found * c
                    assert found > 0 or 16 * 2 * c + 40_000 > chip[2] * 1024


def check_forward_traffic(emulator: Emulator) -> None:
    """h is read once, y written once; the weights once per block of rows, or once per cluster."""
    ops = torch.ops.a3fta_native
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    m = 4 * 64 + 5  # five blocks of 64 rows keep four processors busy
    # a large rank goes to the clusters, of which four processors hold one, where there are any
    for capability, shared, channels, rank, readers in (
        (90, 227, 640, 32, 5), (90, 227, 1280, 16, 9), (90, 227, 640, 64, 1),
        (80, 163, 640, 64, 9), (89, 99, 1280, 64, 17),
    ):  # fmt: skip
        emulator.use_chip(capability, 4, shared)
        h, w_down, w_up = draw(m, channels), draw(rank, channels), draw(channels, rank)
        with emulator.counting():
            y, _ = ops.adapter_forward(h, w_down, w_up, None, None, None, None, 2)
            assert emulator.traffic(h) == (1, 1, 0, 0)
            assert emulator.traffic(y) == (0, 0, 1, 1)
            assert emulator.traffic(w_down) == (readers, readers, 0, 0)
            assert emulator.traffic(w_up) == (readers, readers, 0, 0)
    emulator.use_chip(90, 17, 227)


def check_backward_traffic(emulator: Emulator) -> None:
    """dy and h are read once, dh is written once; the weights are read once per cluster."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    dy, h, a = draw(330, 520), draw(330, 520), draw(330, 64)
    w_down, w_up = draw(64, 520), draw(520, 64)
    arguments = (dy, h, a, w_down, w_up, None, None, 2, True, True)
    once, never = (1, 1, 0, 0), (0, 0, 0, 0)
    for capability, clusters in ((90, 4), (89, 0)):
        emulator.use_chip(capability, 17, 227)
        with emulator.counting():
            dh = torch.ops.a3fta_native.adapter_backward(*arguments)[0]
            # the kernels for chips without clusters do not count
            assert emulator.traffic(dy) == emulator.traffic(h) == (once if clusters else never)
            assert emulator.traffic(dh) == ((0, 0, 1, 1) if clusters else never)
            for weight in (w_down, w_up):
                assert emulator.traffic(weight) == (clusters, clusters, 0, 0)
    emulator.use_chip(90, 17, 227)


def main(library: str) -> int:
    torch.set_num_threads(1)
    use(library)
    emulator = Emulator(library)
    check_plans(emulator)
    check_forward_traffic(emulator)
    check_backward_traffic(emulator)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    check_nan_stays()
    check_adapter_nan_stays()
    failures = 0
    todo = checks()
    for i, (case, dtype, kind) in enumerate(todo):
        if i == len(todo) - len(ROWS):
            emulator.use_chip(80, 2, 163)
        try:
            check(case, ("native", "cpu", dtype), kind)
        except Exception as error:
            failures += 1
            print(f"{case} {dtype} {kind}: {type(error).__name__}: {error}")
    print(f"{len(todo)} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
