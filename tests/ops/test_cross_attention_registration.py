"""The rule of `cross_attention_adapter`: gradcheck, opcheck, compile, autocast.

On kernels written in plain PyTorch, so that it runs everywhere, and on Triton's.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from a3fta_kernels import ops
from a3fta_kernels.ops.cross_attention_adapter import api, contract

from ..oracle import Case, runs
from . import attention_protocol

CASE = Case(
    (2, 3), 6, 3, n=4, heads=2, keys=5, mask="add b n", modulation="gamma beta", scale="tensor",
    residual=True,
)  # fmt: skip
BOOL = Case((1, 4), 6, 2, n=5, heads=3, keys=3, mask="bool m n", activation="silu", text=False)
CASES = pytest.mark.parametrize("case", [CASE, BOOL], ids=["all", "few"])

TRITON = next((r for r in runs() if r[0] == "triton" and r[2] == torch.float16), None)


@pytest.fixture(params=["plain", pytest.param("triton", marks=pytest.mark.skipif(
    TRITON is None, reason="Triton does not run here"
))])  # fmt: skip
def kernels(request, monkeypatch):
    """(dtype, device) of kernels in plain PyTorch on the CPU, or of Triton's."""
    if request.param == "triton":
        return TRITON[2], TRITON[1]
    monkeypatch.setattr(contract, "kernels", lambda: attention_protocol)
    monkeypatch.setattr(api, "unfused_reason", lambda *_: None)
    return torch.float64, "cpu"


def leaves(inputs: dict) -> list[torch.Tensor]:
    return [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]


@pytest.mark.parametrize("rule", ["reference", "plain"])
@CASES
def test_gradcheck(case, rule, monkeypatch):
    if rule == "plain":
        monkeypatch.setattr(contract, "kernels", lambda: attention_protocol)
        monkeypatch.setattr(api, "unfused_reason", lambda *_: None)
    inputs = case.inputs(torch.float64, "cpu")
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    rest = {k: v for k, v in inputs.items() if k not in names}
    backend = "reference" if rule == "reference" else "auto"

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.cross_attention_adapter(
            **dict(zip(names, tensors, strict=True)), **rest, backend=backend
        )

    assert torch.autograd.gradcheck(call, [inputs[k] for k in names])


def op_arguments(case: Case, dtype: torch.dtype, device: str) -> tuple:
    i = case.inputs(dtype, device)
    mask = i["mask"].expand(*case.lead[:1], case.heads, case.lead[1], case.keys)
    scale = i["scale"] if isinstance(i["scale"], torch.Tensor) else None
    return (
        i["q"], i["k"], i["v"], mask, i["weight"], i["w_down"], i["w_up"], i["b_down"], i["b_up"],
        i.get("gamma"), i.get("beta"), scale, i.get("residual"), i["bias"], None, None, 0.5, 0.6,
        case.heads, case.activation,
    )  # fmt: skip


@CASES
def test_opcheck(case, kernels):
    dtype, device = kernels
    if dtype == torch.float16 and device == "cpu":
        pytest.skip("the interpreter knows only real tensors it can read: no tracing through it")
    arguments = op_arguments(case, dtype, device)
    torch.library.opcheck(torch.ops.a3fta.cross_attention_adapter, arguments)
    arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    y, h, a, v_up = torch.ops.a3fta.cross_attention_adapter(*arguments)
    saved = arguments[:12]  # up to the scale
    needs = [x is not None for i, x in enumerate(saved) if i not in (3, 4)]
    torch.library.opcheck(
        torch.ops.a3fta.cross_attention_adapter_backward,
        (torch.randn_like(y), h, a, v_up, *saved, *arguments[-4:], needs),
    )


@CASES
def test_compiles_whole(case, kernels):
    """fullgraph, forward and backward, equal to eager to the bit."""
    inputs = case.inputs(*kernels)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda kw: ops.cross_attention_adapter(**kw) * 2, fullgraph=True, backend="aot_eager"
    )
    backend = "triton" if kernels[0] == torch.float16 else "auto"
    eager = ops.cross_attention_adapter(**inputs, backend=backend) * 2
    y = compiled(inputs | {"backend": backend})
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves(inputs), dy)
    expected = torch.autograd.grad(eager, leaves(inputs), dy)
    assert torch.equal(y, eager)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@CASES
def test_fake_tensors(case, kernels):
    backend = "triton" if kernels[0] == torch.float16 else "auto"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in case.inputs(*kernels).items()
        }
        y = ops.cross_attention_adapter(**inputs, backend=backend)
        assert y.shape == (*case.lead, case.n) and y.dtype == kernels[0]
        grads = torch.autograd.grad(y.sum(), leaves(inputs))
        assert [g.shape for g in grads] == [t.shape for t in leaves(inputs)]


@CASES
def test_autocast(case, monkeypatch):
    """The op computes in autocast's dtype, eager, compiled and as registered; gradients come in
    the parameters' own."""
    monkeypatch.setattr(contract, "kernels", lambda: attention_protocol)
    monkeypatch.setattr(api, "unfused_reason", lambda *_: None)
    inputs = case.inputs(torch.float32, "cpu")
    # autocast keeps more of the bias than a bf16 trunk has: start from what both hold
    inputs["bias"] = inputs["bias"].bfloat16().float()
    narrow = {
        k: v.detach().bfloat16() if k in ("q", "k", "v", "weight", "bias") else v
        for k, v in inputs.items()
        if k != "residual"
    }
    if case.mask.startswith("add"):
        narrow["mask"] = inputs["mask"].bfloat16()
    expected = ops.cross_attention_adapter(**narrow)
    if "residual" in inputs:
        expected = expected + inputs["residual"]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda kw: ops.cross_attention_adapter(**kw), fullgraph=True, backend="aot_eager"
    )
    for run in (lambda: ops.cross_attention_adapter(**inputs), lambda: compiled(inputs)):
        with torch.autocast("cpu", torch.bfloat16):
            y = run()
        assert y.dtype == (torch.float32 if "residual" in inputs else torch.bfloat16)
        assert torch.equal(y, expected)
        grads = torch.autograd.grad(y.float().sum(), leaves(inputs))
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.a3fta.cross_attention_adapter(*op_arguments(case, torch.float32, "cpu"))[0]
    assert y.dtype == torch.bfloat16


def test_no_second_derivative(kernels):
    backend = "triton" if kernels[0] == torch.float16 else "auto"
    inputs = CASE.inputs(*kernels)
    y = ops.cross_attention_adapter(**inputs, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), inputs["q"], create_graph=True)


def test_a_residual_alone(kernels, monkeypatch):
    """Where only the residual trains, nothing else is computed."""
    backend = "triton" if kernels[0] == torch.float16 else "auto"
    inputs = CASE.inputs(*kernels)
    inputs = {
        k: v.detach() if isinstance(v, torch.Tensor) and k != "residual" else v
        for k, v in inputs.items()
    }
    y = ops.cross_attention_adapter(**inputs, backend=backend)
    monkeypatch.setattr(contract, "kernels", None)
    (grad,) = torch.autograd.grad(y.sum(), inputs["residual"])
    assert torch.equal(grad, torch.ones_like(grad))


@CASES
def test_all_that_is_saved_is_written(case, kernels, poisoned):
    arguments = op_arguments(case, *kernels)
    found = torch.ops.a3fta.cross_attention_adapter(*arguments)
    assert all(x.isfinite().all() for x in found)
