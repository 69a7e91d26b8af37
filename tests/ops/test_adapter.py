"""`adapter` on every backend, against the float64 oracle."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels import BackendStatus, BackendUnavailableError, ops
from a3fta_kernels.ops.activations import ACTIVATIONS

from ..oracle import Case, check, run_id, runs

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)

CASES = [
    Case((1, 1), 8, 1),
    Case((2, 3), 33, 4, biases=False),
    Case((2, 17), 40, 8, scale=0.5),
    Case((70,), 64, 16, activation="silu"),
    Case((3, 2, 9), 96, 64, scale="tensor"),
    Case((1, 40), 72, 128, activation="gelu_tanh"),
    Case((2, 7), 24, 3, modulation="gamma", activation="relu"),
    Case((3, 5), 20, 5, modulation="beta", activation="identity"),
    Case((3, 21), 48, 16, modulation="gamma beta", scale="tensor", activation="silu"),
    Case((2, 9), 32, 8, layout="sliced"),
    Case((2, 9), 32, 8, layout="strided"),
    Case((2, 9), 32, 8, layout="transposed"),
    Case((2, 33), 40, 16, adapter_dtype=torch.float32, scale="tensor", modulation="gamma beta"),
    Case((2, 0), 16, 4),
    Case((0, 6), 16, 4, modulation="gamma beta", scale="tensor"),
    Case((2, 5), 16, 4, scale=0.0),
    Case((2, 9), 24, 8, base=40, scale="tensor", modulation="gamma beta"),
    Case((3, 7), 40, 16, base=40, adapter_dtype=torch.float32, scale=0.5, activation="silu"),
    Case((2, 6), 33, 4, base=17, biases=False, layout="transposed"),
    Case((19,), 16, 130, base=24),
    Case((0, 6), 16, 4, base=8),
]


@RUNS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    check(case, run)


@RUNS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [True, False])
def test_every_activation(activation, biases, run, poisoned):
    check(Case((2, 19), 24, 8, activation=activation, biases=biases, modulation="gamma"), run)


@RUNS
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_of_any_stride(kind, run, poisoned):
    check(Case((2, 11), 24, 8), run, kind)
    check(Case((2, 11), 24, 8, base=20), run, kind)


@RUNS
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64, 128])
def test_every_rank(rank, run, poisoned):
    check(Case((35,), 40, rank), run)


@RUNS
def test_only_what_is_asked_for(run):
    """Frozen tensors get no gradient, and the others are the same without them."""
    backend, device, dtype = run
    inputs = Case((2, 6), 16, 4, modulation="gamma beta", scale="tensor").inputs(dtype, device)
    tensors = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]
    full = torch.autograd.grad(
        ops.adapter(**inputs, backend=backend).sum(), [inputs[k] for k in tensors]
    )
    for name, expected in zip(tensors, full, strict=True):
        alone = {
            k: v.detach().requires_grad_(k == name) if k in tensors else v
            for k, v in inputs.items()
        }
        ops.adapter(**alone, backend=backend).sum().backward()
        torch.testing.assert_close(alone[name].grad, expected)
        assert all(alone[k].grad is None for k in tensors if k != name)


@RUNS
def test_fresh_values_are_seen(run):
    """Nothing is cached: an edit of the weights behind autograd's back counts at once."""
    backend, device, dtype = run
    inputs = Case((2, 6), 16, 4).inputs(dtype, device)
    before = ops.adapter(**inputs, backend=backend)
    inputs["w_up"].data.mul_(2)
    after = ops.adapter(**inputs, backend=backend)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("backend", ["reference", *sorted({r[0] for r in runs()})])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("n", [None, 12])
def test_a_scale_of_one_element_in_any_shape(n, shape, backend):
    op = ops.adapter if n is None else ops.adapter_linear
    inputs = Case((2, 6), 16, 4, n=n, scale="tensor").inputs(torch.float32, "cpu")
    expected = op(**inputs)
    inputs["scale"] = inputs["scale"].detach().reshape(shape).requires_grad_()
    if backend != "reference" and not any(r[:2] == (backend, "cpu") for r in runs()):
        pytest.skip(f"{backend} does not run on the CPU here")
    y = op(**inputs, backend=backend)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), inputs["scale"])
    assert grad.shape == shape and grad.isfinite().all()


@pytest.mark.parametrize("n", [None, 12])
def test_shapes_on_the_meta_device(n):
    op = ops.adapter if n is None else ops.adapter_linear
    inputs = Case((2, 6), 16, 4, n=n).inputs(torch.float32, "meta")
    assert op(**inputs).shape == (2, 6, n or 16)


@RUNS
def test_nan_is_not_hidden(run):
    backend, device, dtype = run
    inputs = Case((4,), 16, 4).inputs(dtype, device)
    inputs["h"].data[1, 3] = float("nan")
    y = ops.adapter(**inputs, backend=backend)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


@RUNS
@given(data=st.data())
def test_property(data, run):
    check(draw_case(data), run, data.draw(st.sampled_from(["plain", "expanded", "transposed"])))


def draw_case(data: st.DataObject, **options) -> Case:
    lead = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
    layouts = ["plain", "sliced", "strided"] + (["transposed"] if len(lead) > 1 else [])
    return Case(
        lead=lead,
        c=data.draw(st.integers(1, 70)),
        r=data.draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17, 33, 64])),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        biases=data.draw(st.booleans()),
        modulation=data.draw(st.sampled_from(["", "gamma", "beta", "gamma beta"])),
        scale=data.draw(st.sampled_from([1.0, 0.25, -2.0, "tensor"])),
        layout=data.draw(st.sampled_from(layouts)),
        adapter_dtype=data.draw(st.sampled_from([None, torch.float32])),
        seed=data.draw(st.integers(0, 2**31)),
        **options,
    )


H, DOWN, UP = torch.zeros(2, 5, 16), torch.zeros(4, 16), torch.zeros(16, 4)
BAD = [
    (dict(h=[1.0]), TypeError, r"h: expected a torch.Tensor, got \[1.0\] \(list\)"),
    (dict(h=H.int()), TypeError, r"h: expected dtype .* got torch.int32"),
    (dict(h=H[0, 0, 0]), ValueError, r"h: expected shape \(\.\.\., C\), got \(\)"),
    (dict(h=torch.zeros(2, 0)), ValueError, r"h: expected at least one channel, got shape"),
    (dict(w_down=DOWN[:, :9]), ValueError, r"w_down: expected shape \(4, 16\), .*got \(4, 9\)"),
    (dict(w_down=DOWN[0]), ValueError, r"w_down: expected a matrix, got shape \(16,\)"),
    (dict(w_down=DOWN[:0], w_up=UP[:, :0]), ValueError, r"w_down: expected a rank of at least 1"),
    (dict(w_up=UP.T), ValueError, r"w_up: expected shape \(16, 4\), .*got \(4, 16\)"),
    (dict(b_down=torch.zeros(3)), ValueError, r"b_down: expected shape \(4,\), .*got \(3,\)"),
    (dict(b_up=torch.zeros(3)), ValueError, r"b_up: expected shape \(16,\), .*got \(3,\)"),
    (dict(gamma=torch.zeros(5, 4)), ValueError, r"gamma: expected shape \(2, 4\), .*got \(5, 4\)"),
    (dict(beta=torch.zeros(2, 3)), ValueError, r"beta: expected shape \(2, 4\), .*got \(2, 3\)"),
    (dict(h=H[0, 0], gamma=torch.zeros(1, 4)), ValueError, r"h: expected shape \(B, \.\.\., C\)"),
    (dict(w_up=UP.to("meta")), ValueError, r"w_up: expected device cpu .*got meta"),
    (dict(w_up=UP.long()), TypeError, r"w_up: expected dtype .*got torch.int64"),
    (dict(scale="1"), TypeError, r"scale: expected a number or a tensor of one element, got '1'"),
    (dict(scale=torch.ones(2)), ValueError, r"scale: expected a number or a tensor of one element"),
    (dict(base=H[0]), ValueError, r"base: expected shape \(\.\.\., N\) beside h \(2, 5, 16\), got"),
    (dict(base=H[:, :, :0]), ValueError, r"base: expected shape \(\.\.\., N\) .*got \(2, 5, 0\)"),
    (dict(base=H.half()), TypeError, r"base: expected dtype torch.float32 \(that of h\)"),
    (dict(base=H.to("meta")), ValueError, r"base: expected device cpu \(that of h\), got meta"),
    (dict(base=H[..., :9]), ValueError, r"w_up: expected shape \(9, 4\), \(N, R\) = \(base"),
    (dict(base=1.0), TypeError, r"base: expected a torch.Tensor"),
    (dict(activation="swish"), ValueError, r"activation: expected one of identity, .*got 'swish'"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto, .*got 'cuda'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.adapter(**({"h": H, "w_down": DOWN, "w_up": UP} | change))


def test_unavailable_backend(monkeypatch):
    module = sys.modules["a3fta_kernels.backends"]
    monkeypatch.setattr(module, "native_status", lambda: BackendStatus(False, (), "not built"))
    monkeypatch.setattr(module, "_resolved", {})
    with pytest.raises(BackendUnavailableError, match=r"backend 'native' on cpu.*not built"):
        ops.adapter(H, DOWN, UP, backend="native")
    assert module.resolve("auto", torch.device("cpu"), torch.float32) == "reference"
