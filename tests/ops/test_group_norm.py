"""`group_norm` on every backend, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels import ops

from ..oracle import IN_ORDER, run_id, runs
from .norm_protocol import NormCase, check, saved_tensors

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)
REFERENCE = [
    ("reference", device, dtype)
    for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
]
EVERY_RUN = pytest.mark.parametrize("run", [*REFERENCE, *runs()], ids=run_id)

CASES = [
    NormCase((1, 1, 1, 1), 1),
    NormCase((2, 6, 5, 7), 3),
    NormCase((2, 6, 5, 7), 3, "silu"),
    NormCase((2, 32, 9, 8), 4, "silu", layout="last"),
    NormCase((3, 10, 4, 4), 10, layout="last"),  # groups of one channel
    NormCase((3, 10, 4, 4), 10, "silu"),
    NormCase((2, 7, 3, 5), 1, "silu"),  # one group
    NormCase((2, 7, 3, 5), 1, layout="last"),
    NormCase((2, 24, 33), 8, "silu"),
    NormCase((2, 24, 33), 8, "silu", layout="last"),
    NormCase((5, 24), 8, "silu"),
    NormCase((5, 24), 24),  # groups of one element: xhat is 0
    NormCase((1, 4, 3, 4, 5), 2, "silu"),
    NormCase((1, 4, 3, 4, 5), 2, layout="last"),
    NormCase((2, 12, 6, 6), 4, weight="no"),
    NormCase((2, 12, 6, 6), 4, "silu", weight="no", layout="last"),
    NormCase((2, 12, 6, 6), 4, "silu", weight="weight"),
    NormCase((2, 12, 6, 6), 4, "silu", weight="bias", layout="last"),
    NormCase((2, 12, 6, 6), 4, "silu", weight="float32"),
    NormCase((2, 12, 6, 6), 4, weight="float32", layout="last"),
    NormCase((2, 8, 5, 6), 2, "silu", layout="sliced"),
    NormCase((3, 8, 5, 6), 2, layout="expanded"),
    NormCase((1, 20, 70, 70), 2, "silu"),  # a group of several parts
    NormCase((1, 20, 70, 70), 2, "silu", layout="last"),
    NormCase((1, 330, 9, 9), 33, "silu", layout="last"),  # more channels than a block holds
    NormCase((0, 6, 4, 4), 3),
    NormCase((2, 6, 0, 4), 3, "silu"),
    NormCase((2, 6, 5, 7), 3, eps=0.1),
]


@EVERY_RUN
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    check(case, run)


@EVERY_RUN
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
@pytest.mark.parametrize("layout", ["plain", "last"])
def test_gradients_of_any_stride(kind, layout, run, poisoned):
    check(NormCase((2, 6, 5, 7), 3, "silu", layout=layout), run, kind)


@EVERY_RUN
@pytest.mark.parametrize("layout", ["plain", "last"])
@pytest.mark.parametrize("mean", [-30.0, 300.0])
def test_a_mean_far_beyond_the_deviation(mean, layout, run):
    """The variance is of differences from the mean, never a difference of squares."""
    # float64's own truth is no better; the 16-bit types hold few digits beside a large mean
    if run[2] != torch.float32:
        mean /= 10
    check(NormCase((1, 4, 40, 40), 2, "silu", mean=mean, layout=layout), run)


@RUNS
@pytest.mark.parametrize("layout", ["plain", "last"])
def test_a_constant_has_no_variance(layout, run):
    backend, device, dtype = run
    x = torch.full((2, 6, 40, 40), 3.7, device=device, dtype=dtype)
    if layout == "last":
        x = x.to(memory_format=torch.channels_last)
    bias = torch.randn(6, device=device, dtype=dtype)
    y = ops.group_norm(x, 3, bias=bias, backend=backend)
    # what the roundings of a sum by blocks make of the mean, times 1 / sqrt(eps)
    bound = 4 * 3.7 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 320
    error = (y.double() - bias.double().view(1, 6, 1, 1)).abs().max()
    assert error <= bound + torch.finfo(dtype).eps * bias.abs().max()


@EVERY_RUN
@pytest.mark.parametrize("layout", ["plain", "last"])
def test_what_is_kept(layout, run):
    """x itself, mean and rstd: the eager pair keeps the input of silu, too."""
    backend, device, dtype = run
    case = NormCase((2, 32, 8, 8), 4, "silu", layout=layout)
    inputs = case.inputs(dtype, device)
    given_ = {v.untyped_storage().data_ptr(): k for k, v in inputs.items() if torch.is_tensor(v)}
    kept = saved_tensors(lambda: ops.group_norm(**inputs, backend=backend))
    names = [given_.get(t.untyped_storage().data_ptr(), "") for t in kept]
    fresh = [t for t, name in zip(kept, names, strict=True) if not name]
    # PyTorch's CUDA kernel keeps a copy of an x that is channels last
    assert "x" in names or (backend, device, layout) == ("reference", "cuda", "last")
    if backend == "reference":
        assert sum(t.nbytes for t in fresh) >= inputs["x"].nbytes
        return
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [(t.shape, t.dtype) for t in fresh] == 2 * [((2, 4), wide)]
    assert sorted(filter(None, names)) == ["bias", "weight", "x"]


@EVERY_RUN
def test_nothing_is_kept_without_a_gradient(run):
    backend, device, dtype = run
    inputs = NormCase((2, 6, 4, 4), 3, "silu").inputs(dtype, device)
    inputs["x"] = inputs["x"].detach()
    assert not ops.group_norm(**inputs, backend=backend).requires_grad


@EVERY_RUN
@pytest.mark.parametrize("layout", ["plain", "last"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_non_finite_values_stay_in_their_group(value, layout, run):
    """A NaN or an infinity reaches its own group, all of it, and no other."""
    backend, device, dtype = run
    case = NormCase((2, 6, 9, 5), 3, "silu", layout=layout)
    inputs = case.inputs(dtype, device)
    dy = torch.randn(case.shape, device=device).to(dtype)
    inputs["x"].data[1, 3, 2, 4] = value
    expected = torch.zeros(case.shape, dtype=torch.bool, device=device)
    expected[1, 2:4] = True
    y = ops.group_norm(**inputs, backend=backend)
    (dx,) = torch.autograd.grad(y, inputs["x"], dy)
    assert torch.equal(~y.isfinite(), expected) and torch.equal(~dx.isfinite(), expected)

    inputs["x"].data[1, 3, 2, 4] = 0.0
    dy[0, 0, 0, 0] = value
    y = ops.group_norm(**inputs, backend=backend)
    (dx,) = torch.autograd.grad(y, inputs["x"], dy)
    expected = torch.zeros_like(expected)
    expected[0, :2] = True
    assert y.isfinite().all() and torch.equal(~dx.isfinite(), expected)


@IN_ORDER
@EVERY_RUN
@pytest.mark.parametrize("layout", ["plain", "last"])
def test_the_same_bits_every_time(layout, run):
    backend, device, dtype = run
    inputs = NormCase((1, 20, 70, 70), 2, "silu", layout=layout).inputs(dtype, device)
    first = ops.group_norm(**inputs, backend=backend)
    (grad,) = torch.autograd.grad(first.square().sum(), inputs["x"])
    for _ in range(3):
        y = ops.group_norm(**inputs, backend=backend)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"])
        assert torch.equal(y, first) and torch.equal(dx, grad)


@EVERY_RUN
@given(data=st.data())
def test_property(data, run):
    groups = data.draw(st.integers(1, 6))
    spatial = data.draw(st.lists(st.integers(1, 9), max_size=3))
    case = NormCase(
        (data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 6)), *spatial),
        groups,
        data.draw(st.sampled_from(["identity", "silu"])),
        data.draw(st.sampled_from(["same", "no", "weight", "bias", "float32"])),
        data.draw(st.sampled_from(["plain", "last", "sliced"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    check(case, run, data.draw(st.sampled_from(["plain", "expanded", "transposed"])))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_parameter_that_trains_takes_a_path_that_trains_it(trained, backend):
    inputs = NormCase((2, 6, 5, 7), 3, "silu").inputs(torch.float64, "cpu")
    inputs[trained].requires_grad_()
    leaves = [inputs["x"], inputs[trained]]
    ours = torch.autograd.grad(ops.group_norm(**inputs, backend=backend).sum(), leaves)
    y = F.silu(F.group_norm(inputs["x"], 3, inputs["weight"], inputs["bias"]))
    for one, other in zip(ours, torch.autograd.grad(y.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@RUNS
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_parameter_that_trains_is_refused_by_a_named_backend(trained, run):
    backend, device, dtype = run
    inputs = NormCase((2, 6, 5, 7), 3).inputs(dtype, device)
    inputs[trained].requires_grad_()
    with pytest.raises(ValueError, match=rf"{trained}: expected a frozen tensor on backend"):
        ops.group_norm(**inputs, backend=backend)
    with torch.no_grad():
        assert ops.group_norm(**inputs, backend=backend).isfinite().all()


X = torch.zeros(2, 8, 4, 4)
BAD = [
    (dict(x=[1.0]), TypeError, r"x: expected a torch.Tensor, got \[1.0\] \(list\)"),
    (dict(x=X[0, 0, 0]), ValueError, r"x: expected shape \(B, C, \*spatial\), got \(4,\)"),
    (dict(x=X.int()), TypeError, r"x: expected dtype .* got torch.int32"),
    (dict(x=X[:, :0]), ValueError, r"num_groups: expected a divisor of x's 0 channels, got 4"),
    (dict(num_groups=3), ValueError, r"num_groups: expected a divisor of x's 8 channels, got 3"),
    (dict(num_groups=0), ValueError, r"num_groups: expected a positive integer, got 0"),
    (dict(num_groups=2.0), ValueError, r"num_groups: expected a positive integer, got 2.0"),
    (dict(num_groups=True), ValueError, r"num_groups: expected a positive integer, got True"),
    (dict(weight=torch.ones(4)), ValueError, r"weight: expected shape \(8,\), .*got \(4,\)"),
    (dict(bias=torch.ones(8, 1)), ValueError, r"bias: expected shape \(8,\), .*got \(8, 1\)"),
    (dict(weight=torch.ones(8).long()), TypeError, r"weight: expected dtype .* got torch.int64"),
    (dict(weight=1.0), TypeError, r"weight: expected a torch.Tensor, got 1.0"),
    (dict(bias=torch.ones(8, device="meta")), ValueError, r"bias: expected device cpu .*got meta"),
    (dict(eps=-1.0), ValueError, r"eps: expected a number of at least 0, got -1.0"),
    (dict(eps="small"), ValueError, r"eps: expected a number of at least 0, got 'small'"),
    (dict(eps=float("nan")), ValueError, r"eps: expected a number of at least 0, got nan"),
    (dict(activation="gelu"), ValueError, r"activation: expected one of identity, silu, got 'gelu"),
    (dict(keep="nothing"), ValueError, r"keep: expected one of input.*, got 'nothing'"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto, .*got 'cuda'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.group_norm(**({"x": X, "num_groups": 4} | change))


@EVERY_RUN
@pytest.mark.parametrize("layout", ["plain", "last"])
def test_its_output_may_be_written_to(layout, run):
    backend, device, dtype = run
    inputs = NormCase((2, 6, 5, 7), 3, layout=layout).inputs(dtype, device)
    y = ops.group_norm(**inputs, backend=backend)
    y[:, 1:] = 2 * y[:, 1:]
    (dx,) = torch.autograd.grad(y.float().square().sum(), inputs["x"])
    assert dx.isfinite().all()
