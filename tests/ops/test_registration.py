"""torch.library registration and autograd of every op: gradcheck, opcheck, compile, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from a3fta_kernels import ops
from a3fta_kernels.ops.adapter import contract as adapter_contract
from a3fta_kernels.ops.adapter_linear import contract as linear_contract

from ..oracle import Case, run_id, runs

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)
FP64 = [("reference", "cpu", torch.float64), *(r for r in runs() if r[2] == torch.float64)]

ADAPTER = Case((2, 5), 6, 3, modulation="gamma beta", scale="tensor")
BESIDE = Case((2, 5), 6, 3, modulation="gamma beta", scale="tensor", base=4)
LINEAR = Case((2, 5), 6, 3, n=4, modulation="gamma beta", scale="tensor", residual=True)
SLICED = Case((2, 5), 6, 3, n=4, columns=(2, 9), activation="silu", scale="tensor")
OPS = pytest.mark.parametrize(
    "case", [ADAPTER, BESIDE, LINEAR, SLICED], ids=["adapter", "beside", "linear", "slice"]
)


def function(case: Case):
    return ops.adapter if case.n is None else ops.adapter_linear


def leaves(inputs: dict) -> list[torch.Tensor]:
    return [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]


@pytest.mark.parametrize("run", FP64, ids=run_id)
@OPS
def test_gradcheck(case, run):
    inputs = case.inputs(torch.float64, run[1])
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    rest = {k: v for k, v in inputs.items() if k not in names}

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return function(case)(**dict(zip(names, tensors, strict=True)), **rest, backend=run[0])

    assert torch.autograd.gradcheck(call, [inputs[k] for k in names])


def op_arguments(case: Case, run: tuple[str, str, torch.dtype]) -> tuple:
    """The positional arguments of torch.ops.a3fta.<op> for a case."""
    i = case.inputs(run[2], run[1])
    h = i["h"].detach().reshape(-1, i["h"].shape[-1]).requires_grad_()
    modulation = (i.get("gamma"), i.get("beta"), i["scale"])
    if case.n is None:
        base = i.get("base")
        if base is not None:
            base = base.detach().reshape(-1, case.base).requires_grad_()
        return (
            h, i["w_down"], i["w_up"], i["b_down"], i["b_up"], *modulation, base, 0.5,
            case.activation, run[0],
        )  # fmt: skip
    residual = i.get("residual")
    if residual is not None:
        residual = residual.detach().reshape(-1, case.n).requires_grad_()
    path = linear_contract.backend_module(run[0]).paths(run[1])[0]
    start = 0 if case.columns is None else case.columns[0]
    return (
        h, i["weight"], i["w_down"], i["w_up"], i["b_down"], i["b_up"], *modulation, residual,
        i["bias"], None, None, 0.5, start, case.activation, path, run[0],
    )  # fmt: skip


@RUNS
@OPS
def test_opcheck(case, run):
    if run[0] == "triton" and run[1] == "cpu":
        pytest.skip("the interpreter knows only real tensors it can read: no tracing through it")
    op = torch.ops.a3fta.adapter if case.n is None else torch.ops.a3fta.adapter_linear
    torch.library.opcheck(op, op_arguments(case, run))


@RUNS
@OPS
def test_opcheck_backward(case, run):
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(case, run)]
    h = arguments[0]
    if case.n is None:
        y, a = torch.ops.a3fta.adapter(*arguments)
        needs = [t is not None for t in arguments[:8]]
        apart = arguments[8] is not None
        torch.library.opcheck(
            torch.ops.a3fta.adapter_backward,
            (torch.randn_like(y), h, a, *arguments[1:8], apart, *arguments[9:], needs),
        )
        return
    y, a, v = torch.ops.a3fta.adapter_linear(*arguments)
    needs = [t is not None for t in (h, *arguments[2:9])]
    start, length = arguments[14], arguments[2].shape[1]
    hs = h[:, start : start + length].contiguous()
    torch.library.opcheck(
        torch.ops.a3fta.adapter_linear_backward,
        (torch.randn_like(y), a, v, hs, *arguments[1:9], *arguments[13:], needs),
    )


@RUNS
@OPS
@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_compiles_whole(case, run, compiler):
    """fullgraph, forward and backward, equal to eager to the bit."""
    inputs = case.inputs(run[2], run[1])
    call = partial(function(case), backend=run[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: call(**kw) * 2, fullgraph=True, backend=compiler)
    eager = call(**inputs) * 2
    y = compiled(inputs)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves(inputs), dy)
    expected = torch.autograd.grad(eager, leaves(inputs), dy)
    assert torch.equal(y, eager)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("run", [r for r in runs() if r[2] == torch.float32], ids=run_id)
@OPS
def test_autocast(case, run):
    """Under autocast the op computes in autocast's dtype, eager and compiled; gradients come in
    the parameters' own."""
    backend, device, _ = run
    inputs = case.inputs(torch.float32, device)
    if case.n is not None:
        # autocast keeps more of the bias than a bf16 trunk has: start from what both hold
        inputs["bias"] = inputs["bias"].bfloat16().float()
    call = partial(function(case), backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: call(**kw), fullgraph=True, backend="aot_eager")
    narrow = {
        k: v.detach().to(torch.bfloat16).requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and k in ("h", "base", "weight", "bias")
        else v
        for k, v in inputs.items()
        if k != "residual"
    }
    expected = call(**narrow)
    if "residual" in inputs:
        expected = expected + inputs["residual"]
    for run_it in (lambda: call(**inputs), lambda: compiled(inputs)):
        with torch.autocast(device, torch.bfloat16):
            y = run_it()
        assert y.dtype == (torch.float32 if "residual" in inputs else torch.bfloat16)
        assert torch.equal(y, expected)
        grads = torch.autograd.grad(y.float().sum(), leaves(inputs))
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@RUNS
def test_autocast_of_the_registered_op(run):
    _, device, dtype = run
    if dtype != torch.float32:
        pytest.skip("autocast starts from fp32")
    for case in (ADAPTER, BESIDE, LINEAR):
        op = torch.ops.a3fta.adapter if case.n is None else torch.ops.a3fta.adapter_linear
        with torch.autocast(device, torch.bfloat16):
            y = op(*op_arguments(case, run))[0]
        assert y.dtype == torch.bfloat16


@RUNS
@OPS
def test_fake_tensors(case, run):
    """Shapes without computing: what a planner asks for."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in case.inputs(run[2], run[1]).items()
        }
        y = function(case)(**inputs, backend=run[0])
        assert y.shape == (*case.lead, case.n or case.base or case.c) and y.dtype == run[2]
        grads = torch.autograd.grad(y.sum(), leaves(inputs))
        assert [g.shape for g in grads] == [t.shape for t in leaves(inputs)]


@RUNS
@OPS
def test_no_second_derivative(case, run):
    inputs = case.inputs(run[2], run[1])
    y = function(case)(**inputs, backend=run[0])
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), inputs["h"], create_graph=True)


def test_every_backend_of_the_table_has_the_protocol():
    for name in ("triton", "native"):
        if any(r[0] == name for r in runs()):
            for contract in (adapter_contract, linear_contract):
                module = contract.backend_module(name)
                assert callable(module.forward) and callable(module.backward)
            assert linear_contract.backend_module(name).paths("cpu")
