"""Holds the emulated kernels of `adapter_bank` to the oracle.

A process of its own, as run_ops: python -m tests.cuda_emulator.run_bank path/to/emulated.so
"""

from __future__ import annotations

import sys
from itertools import cycle

import torch

from a3fta_kernels.ops.activations import ACTIVATIONS
from tests.cuda_emulator.run_ops import Emulator, use
from tests.oracle import Case, check

# the first sample has no adapter. One-pass blocks of 64, 32 and 16 rows, ranks padded to 16, 32 and
# 64, samples that end inside a block; then what only the kernel for any shape takes: widths and
# places that are no whole vectors, rank chunks, ranks that take two turns
CASES = [
    Case((3, 1), 8, 1, bank=2),
    Case((4, 70), 72, 16, bank=2, scale="tensor"),
    Case((3, 43), 136, 24, bank=1, biases=False),
    Case((3, 65), 1280, 64, bank=2, scale="tensor"),
    Case((5, 2, 9), 256, 33, bank=3),
    Case((3, 9), 33, 4, bank=2, scale="tensor"),
    Case((3, 9), 5, 1, bank=2),
    Case((3, 67), 130, 65, bank=2, biases=False),
    Case((2, 9), 24, 300, bank=1, scale="tensor"),
    Case((3, 9), 32, 8, bank=2, layout="sliced"),
    Case((3,), 24, 4, bank=2),
    Case((2, 0), 16, 4, bank=2),
    Case((0, 6), 16, 4, bank=2),
    *(Case((3, 19), 24, 8, bank=2, activation=a) for a in ACTIVATIONS),
]


def check_traffic(emulator: Emulator) -> None:
    """h is read once and y written once, with an adapter and without; of the bank what the samples
    have, once per block of rows."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16)  # noqa: E731
    emulator.use_chip(90, 4, 227)
    h, w_down, w_up = draw(4 * 100, 640), draw(3, 32, 640), draw(3, 640, 32)
    index = torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    with emulator.counting():
        y = torch.ops.a3fta_native.adapter_bank_forward(
            h, h, w_down, w_up, None, None, torch.ones(3), index, 2
        )
        assert emulator.traffic(h) == (1, 1, 0, 0)
        assert emulator.traffic(y) == (0, 0, 1, 1)
        for weight in (w_down, w_up):
            readers = [emulator.traffic(weight[k]) for k in range(3)]
            assert readers == [(2, 2, 0, 0), (0, 0, 0, 0), (4, 4, 0, 0)], readers
    emulator.use_chip(90, 17, 227)


def check_beside_the_bank() -> None:
    """An index of no adapter: that sample is NaN, the others are what they are."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float16)  # noqa: E731
    for channels in (72, 33):
        h, bank = draw(4 * 5, channels), (draw(2, 8, channels), draw(2, channels, 8))
        for place in (-2, 2, 2**31 - 1):
            index = torch.tensor([1, place, -1, 0], dtype=torch.int32)
            y = torch.ops.a3fta_native.adapter_bank_forward(
                h, h, *bank, None, None, torch.ones(2), index, 2
            )
            assert y.view(4, -1).isnan().all(1).tolist() == [False, True, False, False]
            assert torch.equal(y[10:15], h[10:15]) and y[[0, 15]].isfinite().all()


def main(library: str) -> int:
    torch.set_num_threads(1)
    use(library)
    check_traffic(Emulator(library))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    check_beside_the_bank()
    half, failures = cycle((torch.bfloat16, torch.float16)), 0
    todo = [(case, dtype) for case in CASES for dtype in (next(half), torch.float32)]
    for case, dtype in todo:
        try:
            check(case, ("native", "cpu", dtype))
        except Exception as error:
            failures += 1
            print(f"{case} {dtype}: {type(error).__name__}: {error}")
    print(f"{len(todo)} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
