"""torch.library registration and autograd of the normalisations, and what they keep in 8 bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..oracle import gradient, run_id, runs
from .norm_protocol import NormCase, layout, saved_tensors

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)
# the interpreter knows only real tensors it can read: no tracing through it
TRACED = pytest.mark.parametrize(
    "run", [r for r in runs() if r[:2] != ("triton", "cpu")], ids=run_id
)
FP64 = [("reference", "cpu", torch.float64), *(r for r in runs() if r[2] == torch.float64)]
CASES = pytest.mark.parametrize(
    "case",
    [
        NormCase((2, 6, 3, 4), 3, "silu"),
        NormCase((2, 6, 3, 4), 3, "silu", layout="last"),
        NormCase((2, 6, 3, 4), 2, weight="no"),
        NormCase((2, 5, 6)),
        NormCase((5, 6), weight="weight"),
    ],
    ids=str,
)


@pytest.mark.parametrize("run", FP64, ids=run_id)
@CASES
def test_gradcheck(case, run):
    inputs = case.inputs(torch.float64, run[1])
    x = inputs.pop("x")
    assert torch.autograd.gradcheck(lambda x: case.op(x, **inputs, backend=run[0]), [x])


def op_arguments(case: NormCase, run, keep: str = "input") -> tuple:
    """The positional arguments of torch.ops.a3fta.<op> for a case."""
    i = case.inputs(run[2], run[1])
    parameters = (i["x"], i.get("weight"), i.get("bias"))
    options = (case.groups, case.eps, case.activation) if case.groups else (case.eps,)
    return (*parameters, *options, keep, run[2], run[0])


def registered(case: NormCase):
    return torch.ops.a3fta.group_norm if case.groups else torch.ops.a3fta.layer_norm


@TRACED
@CASES
@pytest.mark.parametrize("keep", ["input", "int8"])
def test_opcheck(keep, case, run):
    torch.library.opcheck(registered(case), op_arguments(case, run, keep))


@TRACED
@CASES
def test_opcheck_backward(case, run):
    arguments = [x.detach() if torch.is_tensor(x) else x for x in op_arguments(case, run)]
    y, mean, rstd = registered(case)(*arguments)
    x, weight, bias = arguments[:3]
    if case.groups:
        rest = (weight, bias, case.activation, run[0])
        op = torch.ops.a3fta.group_norm_backward
    else:
        rest, op = (weight, run[0]), torch.ops.a3fta.layer_norm_backward
    torch.library.opcheck(op, (torch.randn_like(y), x, mean, rstd, *rest))


@RUNS
@CASES
@pytest.mark.parametrize("keep", ["input", "int8"])
def test_compiles_whole(keep, case, run):
    """fullgraph, forward and backward, equal to eager to the bit."""
    inputs = case.inputs(run[2], run[1])
    call = partial(case.op, keep=keep, backend=run[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: call(**kw) * 2, fullgraph=True, backend="aot_eager")
    eager = call(**inputs) * 2
    y = compiled(inputs)
    dy = gradient(y.shape, run[2], run[1], "plain", 0)
    (ours,) = torch.autograd.grad(y, inputs["x"], dy)
    (expected,) = torch.autograd.grad(eager, inputs["x"], dy)
    assert torch.equal(y, eager) and torch.equal(ours, expected)
    assert layout(y) == layout(eager)


@RUNS
@CASES
def test_fake_tensors(case, run):
    """Shapes and strides without computing: what a planner asks for."""
    real = case.op(**case.inputs(run[2], run[1]), backend=run[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {
            k: mode.from_tensor(v) if torch.is_tensor(v) else v
            for k, v in case.inputs(run[2], run[1]).items()
        }
        y = case.op(**inputs, backend=run[0])
        assert y.shape == case.shape and y.dtype == run[2] and layout(y) == layout(real)
        (dx,) = torch.autograd.grad(y.sum(), inputs["x"])
        assert dx.shape == case.shape and dx.dtype == run[2]


@RUNS
@CASES
def test_no_second_derivative(case, run):
    inputs = case.inputs(run[2], run[1])
    y = case.op(**inputs, backend=run[0])
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)


@TRACED
@CASES
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_the_registered_op_has_no_silent_none(trained, case, run):
    if case.weight in ("no", "weight") and trained not in case.weight:
        pytest.skip("the case has no such parameter")
    arguments = list(op_arguments(case, run))
    arguments[1 if trained == "weight" else 2].requires_grad_()
    with pytest.raises(ValueError, match=f"{trained}: expected a frozen tensor"):
        registered(case)(*arguments)


@pytest.mark.parametrize("backend", ["reference", *sorted({r[0] for r in runs()})])
@CASES
def test_autocast(case, backend, device):
    """As PyTorch: float32 on a GPU, where x is kept in its own dtype; on a CPU as without."""
    if not any(r[:2] == (backend, device.type) for r in runs()) and backend != "reference":
        pytest.skip(f"{backend} does not run on {device} here")
    inputs = case.inputs(torch.bfloat16, device.type)
    wanted = torch.float32 if device.type == "cuda" else torch.bfloat16
    torch._dynamo.reset()
    call = partial(case.op, backend=backend)
    compiled = torch.compile(lambda kw: call(**kw), fullgraph=True, backend="aot_eager")
    expected = call(**{k: v.to(wanted) if torch.is_tensor(v) else v for k, v in inputs.items()})
    with torch.autocast(device.type, torch.bfloat16):
        like = torch.nn.functional.layer_norm(inputs["x"], inputs["x"].shape[-1:])
        kept = saved_tensors(lambda: call(**inputs))
        results = [call(**inputs), compiled(inputs)]
    assert like.dtype == wanted
    for y in results:
        assert y.dtype == wanted and torch.equal(y, expected)
        (dx,) = torch.autograd.grad(y.float().sum(), inputs["x"])
        assert dx.dtype == torch.bfloat16 and dx.isfinite().all()
    if backend != "reference":
        x = inputs["x"].untyped_storage().data_ptr()
        assert x in [t.untyped_storage().data_ptr() for t in kept]


@pytest.mark.parametrize("run", [r for r in runs() if r[2] == torch.float32], ids=run_id)
@CASES
def test_autocast_of_the_registered_op(case, run):
    _, device, _ = run
    arguments = list(op_arguments(case, (run[0], device, torch.bfloat16)))
    with torch.autocast(device, torch.bfloat16):
        y = registered(case)(*arguments)[0]
    assert y.dtype == (torch.float32 if device == "cuda" else torch.bfloat16)


@RUNS
@CASES
def test_the_bytes_of_int8(case, run):
    """Codes, a range for each 128 of them, mean and rstd; nothing where no gradient is wanted."""
    inputs = case.inputs(run[2], run[1])
    x = inputs["x"]
    own = [v.untyped_storage().data_ptr() for v in inputs.values() if torch.is_tensor(v)]
    kept = saved_tensors(lambda: case.op(**inputs, keep="int8", backend=run[0]))
    fresh = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert x.untyped_storage().data_ptr() not in [t.untyped_storage().data_ptr() for t in kept]
    rows = x.shape[0] * case.groups if case.groups else x.numel() // x.shape[-1]
    statistics = 2 * rows * (8 if run[2] == torch.float64 else 4)
    assert sum(t.nbytes for t in fresh) == x.numel() + 4 * -(-x.numel() // 128) + statistics


@RUNS
@CASES
def test_int8_is_the_backward_of_what_the_codes_stand_for(case, run, poisoned):
    backend, device, dtype = run
    inputs = case.inputs(dtype, device)
    x, dy = inputs["x"], gradient(torch.Size(case.shape), dtype, device, "plain", 1)
    y = case.op(**inputs, keep="int8", backend=backend)
    plain = case.op(**inputs, backend=backend)
    assert torch.equal(y, plain)
    (ours,) = torch.autograd.grad(y, x, dy)
    (exact,) = torch.autograd.grad(plain, x, dy)
    # half a range is 7 deviations at most here, a code 1/254 of that
    assert (ours - exact).double().norm() <= 0.05 * exact.double().norm()
    assert dtype == torch.float16 or not torch.equal(ours, exact)
