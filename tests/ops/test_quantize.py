"""`quantize` and `dequantize` on every backend: the bound, the layouts, what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from a3fta_kernels import ops
from a3fta_kernels.ops.quantize.layout import BLOCK, LARGEST, SMALLEST_HALF, is_dense

from ..oracle import DTYPES, run_id, runs

TINY = 2.0**-126  # bf16 conversions may make zeros of what is smaller

EVERY = [
    *(("reference", "cpu", dtype) for dtype in DTYPES),
    *(r for r in runs()),
]
RUNS = pytest.mark.parametrize("run", EVERY, ids=run_id)


def draw(*shape: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) + offset


def by_element(ranges: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """mid and half (n, 2) of each code, in memory order, in float64."""
    return ranges.double().repeat_interleave(BLOCK, 0)[: codes.numel()]


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.numel(),), (1,))


def check_bound(x: torch.Tensor, run: tuple[str, str, torch.dtype]) -> torch.Tensor:
    """Quantises a dense x and brings it back: the bound holds for every element."""
    backend = run[0]
    codes, ranges = ops.quantize(x, backend=backend)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and codes.stride() == x.stride()
    blocks = -(-x.numel() // BLOCK)
    assert ranges.dtype == torch.bfloat16 and ranges.shape == (blocks, 2)
    assert codes.numel() == 0 or int(codes.abs().max()) <= 127
    back = ops.dequantize(codes, ranges, x.dtype, backend=backend)
    assert back.dtype == x.dtype and back.shape == x.shape and back.stride() == x.stride()
    mid, half = by_element(ranges, flat(codes)).unbind(1)
    exact, ours = flat(x).double(), flat(back).double()
    assert ((half == 0) | (half >= SMALLEST_HALF)).all()
    # half is no wider than it has to be, up to its own rounding; mid is in the middle
    for b in range(blocks):
        values = exact[b * BLOCK : (b + 1) * BLOCK]
        need = (values - mid[b * BLOCK]).abs().max()
        assert min(need * (1 - 1e-6), LARGEST) <= half[b * BLOCK] <= max(1.01 * need, SMALLEST_HALF)
        middle = (values.min() / 2 + values.max() / 2) - mid[b * BLOCK]
        assert middle.abs() <= 0.004 * mid[b * BLOCK].abs() + TINY
    eps = torch.finfo(x.dtype).eps
    inner = 4 * (eps if x.dtype == torch.float64 else 2.0**-23)
    allowed = half / 254 + inner * (half + mid.abs()) + eps * ours.abs()
    allowed += 2 * TINY if x.dtype != torch.float16 else 2.0**-24  # of mid, and of the result
    assert ((ours - exact).abs() <= allowed).all()
    return back


@RUNS
@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (129,), (3, 5, 70), (2, 640), (0, 4), ()])
def test_the_bound(shape, run, poisoned):
    check_bound(draw(*shape).to(run[1], run[2]), run)


@RUNS
def test_an_offset_costs_no_precision(run):
    x = draw(40, 128, offset=100.0).to(run[1], run[2])
    _, ranges = ops.quantize(x, backend=run[0])
    assert ranges[:, 1].max() < 6
    check_bound(x, run)


@RUNS
def test_layouts(run, poisoned):
    x = draw(2, 6, 5, 7).to(run[1], run[2])
    for dense in (x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2), x[:1], x[1]):
        assert is_dense(dense)
        back = check_bound(dense, run)
        assert back.stride() == dense.stride()
    for gaps in (x[..., ::2], x[:, 1:3], x[:, :1].expand(2, 6, 5, 7)):
        assert not is_dense(gaps)
        codes, ranges = ops.quantize(gaps, backend=run[0])
        expected = ops.quantize(gaps.contiguous(), backend=run[0])
        assert codes.is_contiguous()
        assert torch.equal(codes, expected[0]) and torch.equal(ranges, expected[1])


@RUNS
def test_constant_blocks_come_back_as_their_middle(run):
    for value in (0.0, 1.5, -3.0, 2.0**-120 if run[2] != torch.float16 else 2.0**-14):
        x = torch.full((300,), value, dtype=run[2], device=run[1])
        if float(x[0].bfloat16()) != float(x[0]):
            continue
        codes, ranges = ops.quantize(x, backend=run[0])
        assert not ranges[:, 1].any() and not codes.any()
        assert torch.equal(ops.dequantize(codes, ranges, run[2], backend=run[0]), x)
    # no bf16 number: half covers what is missing
    x = torch.full((300,), 1.0009765625, dtype=run[2], device=run[1])
    back = check_bound(x, run)
    assert (back.double() - x.double()).abs().max() <= 2.0**-9 / 254 + torch.finfo(run[2]).eps


@RUNS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 77, 127, 128, 299])
def test_what_is_not_finite_stays_so_in_its_block(value, place, run):
    x = draw(300).to(run[1], run[2])
    clean = ops.dequantize(*ops.quantize(x, backend=run[0]), run[2], backend=run[0])
    x[place] = value
    back = ops.dequantize(*ops.quantize(x, backend=run[0]), run[2], backend=run[0])
    start = place // BLOCK * BLOCK
    inside = torch.zeros(300, dtype=torch.bool, device=run[1])
    inside[start : start + BLOCK] = True
    assert not back[inside].isfinite().any()
    assert torch.equal(back[~inside], clean[~inside])


@RUNS
def test_infinities_of_both_signs_are_not_lost(run):
    x = draw(128).to(run[1], run[2])
    x[3], x[70] = float("inf"), float("-inf")
    back = ops.dequantize(*ops.quantize(x, backend=run[0]), run[2], backend=run[0])
    assert not back.isfinite().any()


@RUNS
def test_the_largest_numbers_stay_finite(run):
    largest = min(torch.finfo(run[2]).max, torch.finfo(torch.float32).max)
    for values in ([largest], [-largest], [largest, -largest], [largest, 0.0], [-largest, 1.0]):
        x = torch.tensor(values, dtype=run[2], device=run[1]).repeat(130)
        assert check_bound(x, run).isfinite().all()
    x = (draw(500).clamp(-1, 1) * largest).to(run[1], run[2])
    assert check_bound(x, run).isfinite().all()


@RUNS
def test_tiny_numbers(run):
    for size in (2.0**-110, 2.0**-126, 2.0**-140):
        check_bound((draw(300) * size).to(run[1], run[2]), run)


@pytest.mark.parametrize(
    "run", [r for r in EVERY if r[2] == torch.float64], ids=run_id
)  # the one dtype that holds more than bf16 reaches
def test_float64_out_of_reach_is_not_finite(run):
    x = torch.tensor([1e300, 1.0], dtype=torch.float64)
    codes, ranges = ops.quantize(x, backend=run[0])
    assert not ops.dequantize(codes, ranges, torch.float64, backend=run[0]).isfinite().any()


@RUNS
def test_a_narrower_result_is_held_at_its_largest_number(run):
    codes, ranges = ops.quantize(torch.full((200,), 1e6, device=run[1]), backend="reference")
    back = ops.dequantize(codes, ranges, run[2], backend=run[0])
    expected = torch.full((200,), min(1e6, torch.finfo(run[2]).max), dtype=run[2], device=run[1])
    assert torch.equal(back, expected)


@pytest.mark.parametrize("run", runs(), ids=run_id)
@given(data=st.data())
def test_agrees_with_the_reference(data, run):
    """The same ranges; codes that may round to the other side where they lie between two."""
    n = data.draw(st.integers(0, 700))
    x = draw(n, seed=data.draw(st.integers(0, 2**31)), offset=data.draw(st.floats(-9, 9)))
    x = (x * 2.0 ** data.draw(st.integers(-12, 12))).to(run[1], run[2])
    codes, ranges = ops.quantize(x, backend=run[0])
    expected = ops.quantize(x, backend="reference")
    assert torch.equal(ranges, expected[1])
    assert (codes.int() - expected[0].int()).abs().max() <= 1 if n else codes.numel() == 0
    ours = ops.dequantize(codes, ranges, run[2], backend=run[0])
    theirs = ops.dequantize(codes, ranges, run[2], backend="reference")
    # mid and half * code / 127 may cancel: what is lost there counts in their size
    eps = torch.finfo(torch.float64 if run[2] == torch.float64 else torch.float32).eps
    size = float(ranges.abs().max()) if n else 0.0
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(run[2]).eps, atol=4 * eps * size)


def test_it_takes_x_as_a_constant():
    x = draw(40).requires_grad_()
    codes, ranges = ops.quantize(x)
    back = ops.dequantize(codes, ranges, torch.float64)
    assert not (codes.requires_grad or ranges.requires_grad or back.requires_grad)


def test_bytes():
    codes, ranges = ops.quantize(torch.randn(64, 1280).bfloat16())
    assert codes.nbytes + ranges.nbytes == 64 * 1280 * (1 + 4 / BLOCK)
    assert float(ranges.max()) < LARGEST


@pytest.mark.parametrize("run", runs(), ids=run_id)
def test_opcheck(run):
    if run[0] == "triton" and run[1] == "cpu":
        pytest.skip("the interpreter knows only real tensors it can read: no tracing through it")
    x = draw(2, 6, 5, 7).to(run[1], run[2])
    for y in (x, x.to(memory_format=torch.channels_last), x[..., ::2]):
        torch.library.opcheck(torch.ops.a3fta.quantize, (y, run[0]))
        codes, ranges = ops.quantize(y, backend=run[0])
        torch.library.opcheck(torch.ops.a3fta.dequantize, (codes, ranges, run[2], run[0]))


@RUNS
def test_compiles_whole(run):
    def there_and_back(x):
        codes, ranges = ops.quantize(x * 2, backend=run[0])
        return codes, ops.dequantize(codes, ranges, x.dtype, backend=run[0]) + 1

    x = draw(2, 3, 4, 50).to(run[1], run[2]).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), there_and_back(x), strict=True):
        assert torch.equal(ours, expected) and ours.stride() == expected.stride()


@RUNS
def test_fake_tensors(run):
    with FakeTensorMode() as mode:
        x = mode.from_tensor(draw(2, 6, 5, 7).to(run[1], run[2]).permute(0, 2, 3, 1))
        codes, ranges = ops.quantize(x, backend=run[0])
        assert codes.stride() == x.stride() and ranges.shape == (4, 2)
        back = ops.dequantize(codes, ranges, run[2], backend=run[0])
        assert back.stride() == x.stride() and back.dtype == run[2]


CODES, RANGES = torch.zeros(3, 100, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.bfloat16)
BAD = [
    (dict(codes=[1]), TypeError, r"codes: expected a torch.Tensor, got \[1\] \(list\)"),
    (dict(codes=CODES.float()), TypeError, r"codes: expected dtype torch.int8, got torch.float32"),
    (dict(codes=CODES[:, ::2]), ValueError, r"codes: expected a tensor without gaps in memory"),
    (dict(ranges=RANGES.float()), TypeError, r"ranges: expected dtype torch.bfloat16, got"),
    (dict(ranges=RANGES[:2]), ValueError, r"ranges: expected shape \(3, 2\), .*got \(2, 2\)"),
    (dict(ranges=RANGES.to("meta")), ValueError, r"ranges: expected device cpu .*got meta"),
    (dict(dtype=torch.int8), TypeError, r"dtype: expected one of torch.float16, .*got torch.int8"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto, .*got 'cuda'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    good = {"codes": CODES, "ranges": RANGES, "dtype": torch.float32}
    with pytest.raises(error, match=message):
        ops.dequantize(**(good | change))


def test_bad_input_of_quantize():
    with pytest.raises(TypeError, match=r"x: expected dtype .* got torch.int32"):
        ops.quantize(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got None"):
        ops.quantize(None)
