"""Holds the emulated kernels of group_norm and layer_norm to their tests' rule.

A process of its own, as run_ops: python -m tests.cuda_emulator.run_norms path/to/emulated.so
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import cycle

import torch

from tests.cuda_emulator.run_ops import Emulator, use

HALF = (torch.bfloat16, torch.float16)
TWICE, THRICE = (2, 2, 0, 0), (3, 3, 0, 0)
# of the kernels' own: runs of several parts with a rest, packs and single elements, rows of several
# blocks of columns, columns that leave threads idle, parts of few positions
OWN = [
    ((2, 8, 96, 100), 2),  # 38400 elements: two parts
    ((1, 3, 107, 311), 1),  # odd, four parts
    ((2, 320, 9, 10), 32),
    ((1, 1280, 5, 6), 32),
    ((1, 2600, 4, 4), 8),
    ((1, 40, 30, 33), 4),
    ((1, 1031, 3, 11), 1),
    ((3, 8, 1, 1), 2),
]


def check_oracle() -> int:
    # imported late: the tests' modules ask for the native backend, and get the emulated one
    from tests.ops import norm_protocol, test_group_norm, test_layer_norm

    half, done = cycle(HALF), 0
    cases = test_group_norm.CASES + test_layer_norm.CASES
    for i, (shape, groups) in enumerate(OWN):
        for layout in ("plain", "last"):
            activation = ("identity", "silu")[i % 2]
            cases.append(norm_protocol.NormCase(shape, groups, activation, layout=layout))
    cases += [replace(c, mean=mean) for c in cases[-2:] for mean in (-30.0, 300.0)]
    cases += [norm_protocol.NormCase(s) for s in ((9, 1536), (20, 328), (3, 7000), (5, 1001))]
    for case in cases:
        for dtype in (next(half), torch.float32):
            if case.mean == 300.0 and dtype != torch.float32:
                continue
            norm_protocol.check(case, ("native", "cpu", dtype))
            done += 1
    for kind in ("expanded", "transposed"):
        for layout in ("plain", "last"):
            case = norm_protocol.NormCase((2, 6, 5, 8), 3, "silu", layout=layout)
            norm_protocol.check(case, ("native", "cpu", next(half)), kind)
            done += 1
        norm_protocol.check(norm_protocol.NormCase((9, 40)), ("native", "cpu", next(half)), kind)
    for dtype in (torch.float32, *HALF):
        run = ("native", "cpu", dtype)
        for layout in ("plain", "last"):
            test_group_norm.test_a_constant_has_no_variance(layout, run)
            for value in (torch.nan, torch.inf, -torch.inf):
                test_group_norm.test_non_finite_values_stay_in_their_group(value, layout, run)
                test_layer_norm.test_non_finite_values_stay_in_their_row(value, run)
                done += 2
    return done


def check_traffic(emulator: Emulator) -> None:
    """How often each vector of 16 bytes is asked for: again only by the block that has read it
    (a part's mean, its squares), and once more when the parts apply what the group found."""
    native = torch.ops.a3fta_native
    for shape, groups, last, reads, again in (
        ((2, 8, 320), 2, False, THRICE, TWICE),  # one launch
        ((1, 8, 9600), 2, False, THRICE, TWICE),
        ((2, 80, 96), 4, True, THRICE, TWICE),
    ):
        x, dy = (torch.randn(shape).bfloat16() for _ in range(2))
        if last:
            x, dy = (t.mT.contiguous().mT for t in (x, dy))
        with emulator.counting():
            y, mean, rstd = native.group_norm_forward(x, groups, None, None, 1e-5, 4)
            assert emulator.traffic(memory(x)) == reads
            assert emulator.traffic(memory(y)) == (0, 0, 1, 1)
        with emulator.counting():
            dx = native.group_norm_backward(dy, x, mean, rstd, None, None, 4)
            assert emulator.traffic(memory(x)) == emulator.traffic(memory(dy)) == again
            assert emulator.traffic(memory(dx)) == (0, 0, 1, 1)
    x, dy = (torch.randn(20, 320).bfloat16() for _ in range(2))
    with emulator.counting():
        y, mean, rstd = native.layer_norm_forward(x, None, None, 1e-5)
        assert emulator.traffic(x) == THRICE and emulator.traffic(y) == (0, 0, 1, 1)
    with emulator.counting():
        dx = native.layer_norm_backward(dy, x, mean, rstd, None)
        assert emulator.traffic(x) == emulator.traffic(dy) == TWICE
        assert emulator.traffic(dx) == (0, 0, 1, 1)


def memory(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else x.mT


def main(library: str) -> int:
    torch.set_num_threads(1)
    use(library)
    check_traffic(Emulator(library))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    print(f"{check_oracle()} cases, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
