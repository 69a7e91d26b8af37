"""`geglu` on every backend, against the float64 oracle."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from a3fta_kernels import ops
from a3fta_kernels.backends import native_status
from a3fta_kernels.ops.activations import ACTIVATIONS
from a3fta_kernels.ops.geglu.reference import geglu as reference

from ..oracle import compare, evaluate, gradient, jitter, run_id, runs, upcast

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)
FP64 = [("reference", "cpu", torch.float64), *(r for r in runs() if r[2] == torch.float64)]
TRACED = [r for r in runs() if r[:2] != ("triton", "cpu")]


def inputs(shape, run, layout="plain", seed=0, activation="gelu") -> torch.Tensor:
    """p of the given shape and layout, a leaf."""
    g = torch.Generator().manual_seed(seed)
    wide = {"sliced": (*shape[:-1], shape[-1] + 3), "strided": (*shape[:-1], 2 * shape[-1])}
    if layout == "transposed":
        p = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=g, dtype=torch.float64).mT
    else:
        p = torch.randn(wide.get(layout, shape), generator=g, dtype=torch.float64)
    p = 3 * p.to(run[1], run[2])
    if activation == "relu":
        # its derivative jumps at 0: nothing may lie close
        p = torch.where(p < 0, p - 0.125, p + 0.125)
    if layout == "sliced":
        p = p[..., 1 : 1 + shape[-1]]
    if layout == "strided":
        p = p[..., ::2]
    return p.detach().requires_grad_()


def check(p: torch.Tensor, run, activation="gelu", dy_kind="plain", **options) -> None:
    backend, device, dtype = run
    shape = torch.Size((*p.shape[:-1], p.shape[-1] // 2))
    dy = gradient(shape, dtype, device, dy_kind, 0)
    given = {"p": p}
    ours = evaluate(
        partial(ops.geglu, activation=activation, backend=backend, **options), given, dy
    )
    assert ours.y.dtype == dtype and ours.y.shape == shape and ours.y.is_contiguous()
    assert ours.grads["p"].dtype == dtype and ours.grads["p"].shape == p.shape
    plain = partial(reference, activation=activation)
    exact = evaluate(plain, upcast(given), dy.double())
    bars = [evaluate(plain, given, dy)]
    for seed in range(8):
        moved = jitter(upcast(given), dtype, seed), jitter(dy.double(), dtype, seed)
        bars.append(evaluate(plain, *moved))
    compare("y", ours.y, [b.y for b in bars], exact.y, dtype, 2.0)
    compare("dp", ours.grads["p"], [b.grads["p"] for b in bars], exact.grads["p"], dtype, 2.0)


SHAPES = [
    (1, 2),
    (2, 3, 66),
    (5, 34),
    (70,),
    (3, 2, 9, 14),
    (1, 2600),
    (2, 0, 8),
    (0, 6),
    (40, 512),
]


@RUNS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, run, poisoned):
    check(inputs(shape, run), run)


@RUNS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, run, poisoned):
    check(inputs((2, 19, 70), run, activation=activation), run, activation)


@RUNS
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed"])
@pytest.mark.parametrize("kind", ["plain", "expanded", "transposed"])
def test_any_strides(layout, kind, run, poisoned):
    check(inputs((2, 11, 26), run, layout), run, dy_kind=kind)


@RUNS
@given(data=st.data())
def test_property(data, run):
    lead = data.draw(st.lists(st.integers(0, 9), max_size=3).map(tuple))
    layouts = ["plain", "sliced", "strided"] + (["transposed"] if lead else [])
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    shape = (*lead, 2 * data.draw(st.integers(1, 70)))
    p = inputs(shape, run, data.draw(st.sampled_from(layouts)), data.draw(st.integers(0, 2**31)),
               activation)  # fmt: skip
    check(p, run, activation, data.draw(st.sampled_from(["plain", "expanded", "transposed"])))


@RUNS
def test_many_rows_and_wide_rows(run):
    """Several tasks, programs and blocks along either axis."""
    if run[0] == "triton" and run[1] == "cpu":
        pytest.skip("minutes in the interpreter")
    for shape in ((700, 130), (3, 20_002)):
        check(inputs(shape, run), run)


@pytest.mark.parametrize("run", FP64, ids=run_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, run):
    p = inputs((2, 5, 6), run, activation=activation)
    call = partial(ops.geglu, activation=activation, backend=run[0])
    assert torch.autograd.gradcheck(call, [p])


@RUNS
def test_only_the_input_is_kept(run):
    """p itself, whose storage the projection's output is anyway: nothing of gelu(gate)."""
    p = inputs((2, 16, 64), run)
    kept = saved(lambda: ops.geglu(p, backend=run[0]))
    assert [t.untyped_storage().data_ptr() for t in kept] == [p.untyped_storage().data_ptr()]
    assert sum(t.nbytes for t in kept) == p.nbytes


@RUNS
def test_the_bytes_of_int8(run):
    p = inputs((2, 16, 64), run)
    kept = saved(lambda: ops.geglu(p, keep="int8", backend=run[0]))
    assert sum(t.nbytes for t in kept) == p.numel() + 4 * p.numel() // 128
    with torch.no_grad():
        assert saved(lambda: ops.geglu(p, keep="int8", backend=run[0])) == []


def saved(forward) -> list[torch.Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = forward()
    del y
    return kept


@RUNS
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_int8_is_the_backward_of_what_the_codes_stand_for(activation, run, poisoned):
    backend, device, dtype = run
    p = inputs((3, 7, 90), run)
    dy = gradient(torch.Size((3, 7, 45)), dtype, device, "plain", 1)
    call = partial(ops.geglu, activation=activation, backend=backend)
    y = call(p, keep="int8")
    assert torch.equal(y, call(p))
    (ours,) = torch.autograd.grad(y, p, dy)
    codes, ranges = ops.quantize(p, backend=backend)
    restored = ops.dequantize(codes, ranges, dtype, backend=backend).requires_grad_()
    (expected,) = torch.autograd.grad(call(restored), restored, dy)
    assert torch.equal(ours, expected)
    # and not far from the gradient at p itself: half is 9 at most here, |act''| about 1
    (plain,) = torch.autograd.grad(call(p), p, dy)
    assert (ours - plain).norm() <= 0.02 * plain.norm()


@RUNS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(value, run):
    p = inputs((4, 12), run)
    p.data[1, 3] = p.data[2, 8] = value
    dy = torch.ones(4, 6, dtype=run[2], device=run[1])
    call = partial(ops.geglu, backend=run[0])
    y = call(p)
    expected = reference(p)
    assert torch.equal(y.isfinite(), expected.isfinite())
    (dp,) = torch.autograd.grad(y, p, dy)
    (truth,) = torch.autograd.grad(expected, p, dy)
    assert torch.equal(dp.isfinite(), truth.isfinite())
    (dp,) = torch.autograd.grad(call(p, keep="int8"), p, dy)
    assert not dp[1, 9].isfinite() and not dp[2, 2].isfinite()


@RUNS
def test_no_second_derivative(run):
    p = inputs((4, 12), run)
    y = ops.geglu(p, backend=run[0])
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), p, create_graph=True)


def test_the_reference_has_every_derivative():
    p = inputs((3, 8), FP64[0])
    assert torch.autograd.gradgradcheck(partial(ops.geglu, backend="reference"), [p])


@RUNS
def test_no_gradient_where_none_is_asked_for(run):
    p = inputs((4, 12), run)
    with torch.no_grad():
        assert not ops.geglu(p, backend=run[0]).requires_grad
    assert not ops.geglu(p.detach(), keep="int8", backend=run[0]).requires_grad


@pytest.mark.parametrize("run", TRACED, ids=run_id)
@pytest.mark.parametrize("keep", ["input", "int8"])
def test_opcheck(keep, run):
    p = inputs((10, 12), run)
    torch.library.opcheck(torch.ops.a3fta.geglu, (p, "gelu", keep, run[0]))
    dy = torch.randn(10, 6, dtype=run[2], device=run[1])
    for gradient_ in (dy, dy[:1].expand(10, 6)):
        arguments = (gradient_, p.detach(), "silu", run[0])
        torch.library.opcheck(torch.ops.a3fta.geglu_backward, arguments)


@RUNS
@pytest.mark.parametrize("keep", ["input", "int8"])
def test_compiles_whole(keep, run):
    """fullgraph, forward and backward, equal to eager to the bit."""
    p = inputs((2, 5, 24), run)
    call = partial(ops.geglu, keep=keep, backend=run[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: call(p) * 2, fullgraph=True, backend="aot_eager")
    y, eager = compiled(p), call(p) * 2
    dy = torch.randn_like(y)
    assert torch.equal(y, eager)
    assert torch.equal(*(torch.autograd.grad(x, p, dy)[0] for x in (y, eager)))


@RUNS
def test_fake_tensors(run):
    with FakeTensorMode() as mode:
        p = mode.from_tensor(inputs((2, 5, 24), run))
        for keep in ("input", "int8"):
            y = ops.geglu(p, keep=keep, backend=run[0])
            assert y.shape == (2, 5, 12) and y.dtype == run[2]
            assert torch.autograd.grad(y.sum(), p)[0].shape == p.shape


def test_shapes_on_the_meta_device():
    assert ops.geglu(torch.empty(2, 6, 8, device="meta")).shape == (2, 6, 4)


@pytest.mark.skipif(not native_status().available, reason=native_status().reason)
def test_instruction_sets_and_threads_agree():
    native = torch.ops.a3fta_native
    used, threads = native.cpu_capability(), torch.get_num_threads()
    try:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            run = ("native", "cpu", dtype)
            p, dy = inputs((133, 700), run).detach(), inputs((133, 350), run, seed=1).detach()
            results = []
            for name in native.cpu_capabilities().split(","):
                native.set_cpu_capability(name)
                for n in (1, 3):
                    torch.set_num_threads(n)
                    results.append((native.geglu_forward(p, 2), native.geglu_backward(dy, p, 2)))
                assert all(map(torch.equal, results[-1], results[-2]))
            eps = 4 * max(torch.finfo(dtype).eps, 2.0**-52)
            for other in results[1:]:
                for ours, base in zip(other, results[0], strict=True):
                    torch.testing.assert_close(ours, base, rtol=eps, atol=eps * 9)
    finally:
        native.set_cpu_capability(used)
        torch.set_num_threads(threads)


P = torch.zeros(2, 5, 16)
BAD = [
    (dict(p=[1.0]), TypeError, r"p: expected a torch.Tensor, got \[1.0\] \(list\)"),
    (dict(p=P.int()), TypeError, r"p: expected dtype .* got torch.int32"),
    (dict(p=P[0, 0, 0]), ValueError, r"p: expected shape \(\.\.\., C\), got \(\)"),
    (dict(p=P[..., :0]), ValueError, r"p: expected at least one channel, got shape"),
    (dict(p=P[..., :7]), ValueError, r"p: expected shape \(\.\.\., 2F\), .* got \(2, 5, 7\)"),
    (dict(activation="swish"), ValueError, r"activation: expected one of identity, .*got 'swish'"),
    (dict(keep="nothing"), ValueError, r"keep: expected one of input, int8, got 'nothing'"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto, .*got 'cuda'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.geglu(**({"p": P} | change))
