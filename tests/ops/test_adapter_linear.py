"""`adapter_linear` on every backend and path, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels import BackendUnavailableError, ops
from a3fta_kernels.ops.activations import ACTIVATIONS
from a3fta_kernels.ops.adapter_linear import contract

from ..oracle import Case, check, run_id, runs, with_paths
from .test_adapter import draw_case

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)

CASES = [
    Case((1, 1), 8, 1, n=8),
    Case((2, 3), 33, 4, n=17, biases=False),
    Case((2, 17), 40, 8, n=24, scale=0.5, residual=True),
    Case((70,), 64, 16, n=80, activation="silu"),
    Case((3, 2, 9), 96, 64, n=40, scale="tensor", residual=True),
    Case((1, 40), 72, 128, n=72, activation="gelu_tanh"),
    Case((2, 7), 24, 3, n=24, modulation="gamma", activation="relu"),
    Case((3, 5), 20, 5, n=30, modulation="beta", activation="identity", residual=True),
    Case((3, 21), 48, 16, n=48, modulation="gamma beta", scale="tensor", residual=True),
    Case((2, 9), 32, 8, n=16, layout="sliced"),
    Case((2, 9), 32, 8, n=16, layout="transposed", residual=True),
    Case((2, 9), 32, 8, n=40, columns=(0, 80)),
    Case((2, 9), 32, 8, n=40, columns=(13, 80), residual=True, scale="tensor"),
    Case((2, 33), 40, 16, n=40, adapter_dtype=torch.float32, scale="tensor", residual=True),
    Case((2, 33), 40, 16, n=72, adapter_dtype=torch.float32, scale=0.5, modulation="gamma"),
    Case((2, 9), 40, 16, n=24, adapter_dtype=torch.float64, scale=-1.5),
    Case((2, 0), 16, 4, n=8, residual=True),
    Case((0, 6), 16, 4, n=8, modulation="gamma beta", scale="tensor"),
    Case((2, 5), 16, 4, n=8, scale=0.0),
]


@RUNS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    for one in with_paths(case, run):
        check(one, run)


@RUNS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [True, False])
def test_every_activation(activation, biases, run, poisoned):
    case = Case((2, 19), 24, 8, n=20, activation=activation, biases=biases, residual=True)
    for one in with_paths(case, run):
        check(one, run)


@RUNS
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_of_any_stride(kind, run, poisoned):
    for one in with_paths(Case((2, 11), 24, 8, n=20, residual=True), run):
        check(one, run, kind)


@RUNS
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64, 128])
def test_every_rank(rank, run, poisoned):
    for one in with_paths(Case((35,), 40, rank, n=36), run):
        check(one, run)


@RUNS
def test_zero_scale_has_a_gradient(run):
    """dscale does not divide by the scale."""
    backend, device, dtype = run
    inputs = Case((2, 6), 16, 4, n=12, scale="tensor").inputs(dtype, device)
    inputs["scale"].data.zero_()
    y = ops.adapter_linear(**inputs, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), inputs["scale"])
    assert grad.isfinite() and grad != 0


@RUNS
def test_only_h_and_narrow_tensors_are_saved(run):
    """Of size M x C, the op keeps h alone."""
    backend, device, dtype = run
    inputs = Case((2, 64), 48, 4, n=48, residual=True).inputs(dtype, device)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.adapter_linear(**inputs, backend=backend)
    given_ = {
        v.untyped_storage().data_ptr() for v in inputs.values() if isinstance(v, torch.Tensor)
    }
    assert inputs["h"].untyped_storage().data_ptr() in kept
    fresh = sum(n for p, n in kept.items() if p not in given_)
    assert fresh == 2 * 64 * 4 + 48 * 4  # a (M, R) and V (N, R)


@RUNS
def test_beside_a_slice_nothing_of_h_is_saved(run):
    """Of an input four times as wide as the adapter, its own columns alone."""
    backend, device, dtype = run
    inputs = Case((64,), 16, 4, n=24, columns=(8, 64)).inputs(dtype, device)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.adapter_linear(**inputs, backend=backend)
    assert kept.pop(inputs["h"].untyped_storage().data_ptr(), None) is None
    for name in ("weight", "w_down", "w_up", "b_down", "b_up"):
        kept.pop(inputs[name].untyped_storage().data_ptr(), None)
    # hs (M, C), a (M, R) and V (N, R)
    size = 64 * 16 + 64 * 4 + 24 * 4
    assert sum(storage.nbytes() for storage in kept.values()) == size * dtype.itemsize


@RUNS
@given(data=st.data())
def test_property(data, run):
    case = draw_case(
        data,
        n=data.draw(st.integers(1, 70)),
        residual=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        start, after = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
        case = Case(**(case.__dict__ | {"columns": (start, start + case.c + after)}))
    kind = data.draw(st.sampled_from(["plain", "expanded", "transposed"]))
    for one in with_paths(case, run):
        check(one, run, kind)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_trainable_weight_takes_a_path_that_trains_it(backend):
    inputs = Case((2, 6), 16, 4, n=12).inputs(torch.float64, "cpu")
    inputs["weight"].requires_grad_()
    inputs["bias"].requires_grad_()
    y = ops.adapter_linear(**inputs, backend=backend)
    composed = F.linear(
        ops.adapter(**{k: v for k, v in inputs.items() if k not in ("weight", "bias")}),
        inputs["weight"],
        inputs["bias"],
    )
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    ours = torch.autograd.grad(y.sum(), leaves)
    expected = torch.autograd.grad(composed.sum(), leaves)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@RUNS
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_trainable_weight_is_refused_by_a_named_path(name, run):
    backend, device, dtype = run
    inputs = Case((2, 6), 16, 4, n=12).inputs(dtype, device)
    inputs[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected a frozen tensor on path 'skinny'"):
        ops.adapter_linear(**inputs, backend=backend, path="skinny")


@RUNS
def test_unknown_path_on_this_device(run, monkeypatch):
    backend, device, dtype = run
    inputs = Case((2, 6), 16, 4, n=12).inputs(dtype, device)
    monkeypatch.setattr(contract.backend_module(backend), "paths", lambda kind: ("skinny",))
    with pytest.raises(BackendUnavailableError, match=r"path 'fused': backend .* knows skinny"):
        ops.adapter_linear(**inputs, backend=backend, path="fused")


@pytest.mark.parametrize("run", [r for r in runs() if r[0] == "triton"], ids=run_id)
def test_a_rank_beyond_a_path_is_refused(run):
    """The fused kernel stays one kernel: it does not become another path in silence."""
    backend, device, dtype = run
    inputs = Case((2, 6), 16, 65, n=12).inputs(dtype, device)
    message = r"path 'fused': backend 'triton' takes ranks up to 64, got 65; use path='auto' or one"
    with pytest.raises(BackendUnavailableError, match=message):
        ops.adapter_linear(**inputs, backend=backend, path="fused")
    assert ops.adapter_linear(**inputs, backend=backend).isfinite().all()


H, DOWN, UP = torch.zeros(2, 5, 16), torch.zeros(4, 16), torch.zeros(16, 4)
W = torch.zeros(12, 16)
BAD = [
    (dict(weight=W.T), ValueError, r"weight: expected shape \(16, 16\), .*got \(16, 12\)"),
    (dict(weight=W[0]), ValueError, r"weight: expected a matrix, got shape \(16,\)"),
    (dict(weight=W.half()), TypeError, r"weight: expected dtype torch.float32 .*got torch.float16"),
    (dict(weight=W.to("meta")), ValueError, r"weight: expected device cpu .*got meta"),
    (dict(weight=None), TypeError, r"weight: expected a torch.Tensor, got None"),
    (dict(bias=torch.zeros(16)), ValueError, r"bias: expected shape \(12,\), .*got \(16,\)"),
    (dict(residual=H), ValueError, r"residual: expected shape \(2, 5, 12\), .*got \(2, 5, 16\)"),
    (dict(columns=(8, 16)), ValueError, r"columns: expected .* inside h's 16 columns"),
    (dict(columns=(True, 8)), ValueError, r"columns: expected .*got \(True, 8\)"),
    (dict(columns=3), ValueError, r"columns: expected \(start, length\).*got 3"),
    (dict(columns=(0, 8)), ValueError, r"w_down: expected shape \(4, 8\), .*got \(4, 16\)"),
    (dict(path="quick"), ValueError, r"path: expected one of auto, .*got 'quick'"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto, .*got 'cuda'"),
    (
        dict(path="skinny", backend="reference"),
        BackendUnavailableError,
        r"path 'skinny': the reference backend has no paths",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.adapter_linear(**({"h": H, "w_down": DOWN, "w_up": UP, "weight": W} | change))
