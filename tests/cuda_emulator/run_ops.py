"""Holds the emulated CUDA library to the oracle. A process of its own: it registers the native ops.

python -m tests.cuda_emulator.run_ops path/to/emulated.so
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from itertools import cycle

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
    """Each shape in one 16-bit type and in fp32, by every path; a few kinds of gradient."""
    found = []
    half = cycle((torch.bfloat16, torch.float16))
    for case in ADAPTER + LINEAR:
        for dtype in (next(half), torch.float32):
            paths = ("auto",) if case.n is None else ("skinny", "fused")
            found += [(replace(case, path=p), dtype, "plain") for p in paths]
    for kind in ("expanded", "transposed"):
        found += [(Case((2, 11), 24, 8), torch.bfloat16, kind)]
        found += [(Case((2, 11), 24, 8, n=20, path="fused"), torch.bfloat16, kind)]
    return found


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


def main(library: str) -> int:
    torch.set_num_threads(1)
    use(library)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    check_nan_stays()
    failures = 0
    todo = checks()
    for case, dtype, kind in todo:
        try:
            check(case, ("native", "cpu", dtype), kind)
        except Exception as error:
            failures += 1
            print(f"{case} {dtype} {kind}: {type(error).__name__}: {error}")
    print(f"{len(todo)} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
