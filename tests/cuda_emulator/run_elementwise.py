"""Holds the emulated kernels of geglu, quantize and dequantize to their tests' rules.

A process of its own, as run_ops: python -m tests.cuda_emulator.run_elementwise path/to/emulated.so
"""

from __future__ import annotations

import sys
from itertools import cycle

import torch

from a3fta_kernels import ops
from a3fta_kernels.ops.activations import ACTIVATIONS
from a3fta_kernels.ops.quantize.layout import BLOCK
from tests.cuda_emulator.run_ops import Emulator, use

HALF = (torch.bfloat16, torch.float16)
# the tests' modules are imported late: they ask for the native backend, and get the emulated one

# rows of whole vectors and not; more packs than the grid has threads (17 processors, 16 blocks)
GEGLU = [(1, 2), (3, 66), (5, 48), (2, 19, 144), (0, 6), (70, 2048), (300, 640)]
# the ends of packs, blocks, pairs of blocks and rounds of the grid
SIZES = [0, 1, 7, 8, 127, 128, 129, 255, 256, 1000, 17 * 16 * 2048 + 130]


def check_geglu() -> int:
    from tests.ops import test_geglu

    half, done = cycle(HALF), 0
    for shape in GEGLU:
        for dtype in (next(half), torch.float32):
            run = ("native", "cpu", dtype)
            test_geglu.check(test_geglu.inputs(shape, run), run)
            done += 1
    for layout in ("sliced", "strided", "transposed"):
        for kind in ("plain", "expanded", "transposed"):
            run = ("native", "cpu", next(half))
            test_geglu.check(test_geglu.inputs((11, 48), run, layout), run, dy_kind=kind)
            done += 1
    for activation in ACTIVATIONS:
        run = ("native", "cpu", next(half))
        p = test_geglu.inputs((19, 48), run, activation=activation)
        test_geglu.check(p, run, activation)
        done += 1
    return done


def check_quantize() -> int:
    from tests.ops import test_quantize

    done = 0
    for dtype in (torch.float32, *HALF):
        run = ("native", "cpu", dtype)
        for n in SIZES if dtype == torch.bfloat16 else SIZES[:-1]:
            x = test_quantize.draw(n, seed=n).to(dtype)
            bound(x, run)
            if 2 < n < 2000:
                bound(x[1:], run)  # no vectors
                agree(x, run)
            done += 1
        test_quantize.test_constant_blocks_come_back_as_their_middle(run)
        test_quantize.test_the_largest_numbers_stay_finite(run)
        test_quantize.test_tiny_numbers(run)
        test_quantize.test_a_narrower_result_is_held_at_its_largest_number(run)
        test_quantize.test_infinities_of_both_signs_are_not_lost(run)
        for value in (float("nan"), float("inf"), float("-inf")):
            for place in (0, 77, 128, 299):
                test_quantize.test_what_is_not_finite_stays_so_in_its_block(value, place, run)
                done += 1
    return done


def bound(x: torch.Tensor, run: tuple[str, str, torch.dtype]) -> None:
    """Slices of codes at odd addresses, too: dequantize takes any that have no gaps."""
    from tests.ops import test_quantize

    back = test_quantize.check_bound(x, run)
    codes, ranges = ops.quantize(x, backend="native")
    if codes.numel() > BLOCK:
        odd = torch.cat([codes[:1], codes])[1:]
        assert torch.equal(ops.dequantize(odd, ranges, x.dtype, backend="native"), back)


def agree(x: torch.Tensor, run: tuple[str, str, torch.dtype]) -> None:
    codes, ranges = ops.quantize(x, backend="native")
    expected = ops.quantize(x, backend="reference")
    assert torch.equal(ranges, expected[1])
    assert (codes.int() - expected[0].int()).abs().max() <= 1


def check_traffic(emulator: Emulator) -> None:
    """Every vector is read once and written once, in packs of 16 bytes (codes: of eight)."""
    native = torch.ops.a3fta_native
    p, dy = torch.randn(40, 640).bfloat16(), torch.randn(40, 320).bfloat16()
    with emulator.counting():
        y = native.geglu_forward(p, 2)
        assert emulator.traffic(p) == (1, 1, 0, 0) and emulator.traffic(y) == (0, 0, 1, 1)
    with emulator.counting():
        dp = native.geglu_backward(dy, p, 2)
        assert emulator.traffic(p) == emulator.traffic(dy) == (1, 1, 0, 0)
        assert emulator.traffic(dp) == (0, 0, 1, 1)
    x = p.view(-1)
    with emulator.counting():
        codes, ranges = native.quantize(x)
        assert emulator.traffic(x) == (1, 1, 0, 0) and emulator.traffic(codes) == (0, 0, 2, 2)
    with emulator.counting():
        back = native.dequantize(codes, ranges, torch.bfloat16)
        assert emulator.traffic(codes) == (2, 2, 0, 0) and emulator.traffic(back) == (0, 0, 1, 1)


def main(library: str) -> int:
    torch.set_num_threads(1)
    use(library)
    check_traffic(Emulator(library))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    done = check_geglu() + check_quantize()
    print(f"{done} cases, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
