"""`layer_norm` on every backend, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels import ops

from .norm_protocol import NormCase, check, saved_tensors
from .test_group_norm import EVERY_RUN, RUNS

CASES = [
    NormCase((1, 1)),
    NormCase((7,)),
    NormCase((5, 8)),
    NormCase((2, 3, 33)),
    NormCase((70, 320)),
    NormCase((2, 9, 40), weight="no"),
    NormCase((2, 9, 40), weight="weight"),
    NormCase((2, 9, 40), weight="bias"),
    NormCase((2, 9, 40), weight="float32"),
    NormCase((2, 9, 40), layout="sliced"),
    NormCase((4, 9, 40), layout="expanded"),
    NormCase((4, 40, 9), layout="last"),  # transposed rows
    NormCase((3, 1111)),
    NormCase((2, 5000)),
    NormCase((0, 6)),
    NormCase((2, 0, 6)),
    NormCase((5, 8), eps=0.1),
]


@EVERY_RUN
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    check(case, run)


@EVERY_RUN
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_of_any_stride(kind, run, poisoned):
    check(NormCase((2, 9, 40)), run, kind)


@EVERY_RUN
@pytest.mark.parametrize("mean", [-30.0, 300.0])
def test_a_mean_far_beyond_the_deviation(mean, run):
    # float64's own truth is no better; the 16-bit types hold few digits beside a large mean
    if run[2] != torch.float32:
        mean /= 10
    check(NormCase((20, 320), mean=mean), run)


@EVERY_RUN
def test_what_it_returns_may_be_written_into(run):
    """As models do that turn some of the queries after their norm."""
    backend, device, dtype = run
    x = torch.randn(2, 5, 8, device=device, dtype=dtype, requires_grad=True)
    y = ops.layer_norm(x, backend=backend)
    expected = y.detach().clone()
    y[:, 3:] = 2 * y[:, 3:]
    assert torch.equal(y[:, :3], expected[:, :3]) and torch.equal(y[:, 3:], 2 * expected[:, 3:])
    (dx,) = torch.autograd.grad(y[:, 3:].square().sum() + y[:, :3].sum(), x)
    assert dx[:, 3:].norm() > 0


@EVERY_RUN
def test_what_is_kept(run):
    backend, device, dtype = run
    inputs = NormCase((2, 9, 40)).inputs(dtype, device)
    given_ = {v.untyped_storage().data_ptr(): k for k, v in inputs.items() if torch.is_tensor(v)}
    kept = saved_tensors(lambda: ops.layer_norm(**inputs, backend=backend))
    names = [given_.get(t.untyped_storage().data_ptr(), "") for t in kept]
    fresh = [t for t, name in zip(kept, names, strict=True) if not name]
    assert "x" in names
    if backend == "reference":
        return
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [(t.shape, t.dtype) for t in fresh] == 2 * [((18,), wide)]
    assert sorted(filter(None, names)) == ["weight", "x"]


@EVERY_RUN
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_non_finite_values_stay_in_their_row(value, run):
    backend, device, dtype = run
    inputs = NormCase((12, 40)).inputs(dtype, device)
    dy = torch.randn(12, 40, device=device).to(dtype)
    inputs["x"].data[3, 7] = value
    dy[8, 39] = value
    y = ops.layer_norm(**inputs, backend=backend)
    (dx,) = torch.autograd.grad(y, inputs["x"], dy)
    assert (~y.isfinite()).all(1).nonzero().flatten().tolist() == [3]
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    assert (~dx.isfinite()).all(1).nonzero().flatten().tolist() == [3, 8]
    assert (~dx.isfinite()).any(1).nonzero().flatten().tolist() == [3, 8]


@EVERY_RUN
@given(data=st.data())
def test_property(data, run):
    lead = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    case = NormCase(
        (*lead, data.draw(st.integers(1, 70))),
        0,
        "identity",
        data.draw(st.sampled_from(["same", "no", "weight", "bias", "float32"])),
        data.draw(st.sampled_from(["plain", "sliced", "last"])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    check(case, run, data.draw(st.sampled_from(["plain", "expanded", "transposed"])))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_parameter_that_trains_takes_a_path_that_trains_it(trained, backend):
    inputs = NormCase((6, 20)).inputs(torch.float64, "cpu")
    inputs[trained].requires_grad_()
    leaves = [inputs["x"], inputs[trained]]
    ours = torch.autograd.grad(ops.layer_norm(**inputs, backend=backend).sum(), leaves)
    y = F.layer_norm(inputs["x"], (20,), inputs["weight"], inputs["bias"])
    for one, other in zip(ours, torch.autograd.grad(y.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@RUNS
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_parameter_that_trains_is_refused_by_a_named_backend(trained, run):
    backend, device, dtype = run
    inputs = NormCase((6, 20)).inputs(dtype, device)
    inputs[trained].requires_grad_()
    with pytest.raises(ValueError, match=rf"{trained}: expected a frozen tensor on backend"):
        ops.layer_norm(**inputs, backend=backend)


X = torch.zeros(2, 3, 8)
BAD = [
    (dict(x=1.0), TypeError, r"x: expected a torch.Tensor, got 1.0"),
    (dict(x=X[0, 0, 0]), ValueError, r"x: expected shape \(\.\.\., C\), got \(\)"),
    (dict(x=X[..., :0]), ValueError, r"x: expected at least one channel, got shape \(2, 3, 0\)"),
    (dict(x=X.int()), TypeError, r"x: expected dtype .* got torch.int32"),
    (dict(weight=torch.ones(4)), ValueError, r"weight: expected shape \(8,\), .*got \(4,\)"),
    (dict(bias=torch.ones(8).int()), TypeError, r"bias: expected dtype .* got torch.int32"),
    (dict(bias=torch.ones(8, device="meta")), ValueError, r"bias: expected device cpu .*got meta"),
    (dict(eps=-1.0), ValueError, r"eps: expected a number of at least 0, got -1.0"),
    (dict(keep="nothing"), ValueError, r"keep: expected one of input.*, got 'nothing'"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto, .*got 'cuda'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm(**({"x": X} | change))


@EVERY_RUN
def test_its_output_may_be_written_to(run):
    backend, device, dtype = run
    inputs = NormCase((2, 9, 40)).inputs(dtype, device)
    y = ops.layer_norm(**inputs, backend=backend)
    y[:, 1:] = 2 * y[:, 1:]
    (dx,) = torch.autograd.grad(y.float().square().sum(), inputs["x"])
    assert dx.isfinite().all()
