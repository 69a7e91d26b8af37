"""`adapter_bank` on every backend, against the float64 oracle and against samples one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a3fta_kernels import ops
from a3fta_kernels.ops.activations import ACTIVATIONS, activate
from a3fta_kernels.ops.adapter_bank import contract

from ..oracle import Case, check, run_id, runs

RUNS = pytest.mark.parametrize("run", runs(), ids=run_id)
FP64 = [("reference", "cpu", torch.float64), *(r for r in runs() if r[2] == torch.float64)]
# what is the same in every dtype: tracing
SINGLE = pytest.mark.parametrize("run", [r for r in runs() if r[2] == torch.float32], ids=run_id)
SMALL = Case((4, 5), 6, 3, bank=2, scale="tensor", activation="silu")

# sample 0 has no adapter, then they take turns: oracle.py
CASES = [
    Case((3, 1), 8, 1, bank=2),
    Case((4, 17), 40, 8, bank=2, scale="tensor"),
    Case((3, 21), 33, 16, bank=1, biases=False, activation="silu"),
    Case((5, 2, 9), 96, 64, bank=3, scale="tensor"),
    Case((2, 70), 320, 16, bank=1, scale="tensor"),
    Case((3, 9), 32, 8, bank=2, layout="sliced"),
    Case((3, 9), 32, 8, bank=2, layout="strided"),
    Case((3, 9), 32, 8, bank=2, layout="transposed"),
    Case((3, 9), 24, 300, bank=2, scale="tensor"),
    Case((3, 33), 40, 5, bank=4, scale="tensor", adapter_dtype=torch.float32),
    Case((3,), 24, 4, bank=2),
    Case((1, 9), 24, 4, bank=2),
    Case((2, 0), 16, 4, bank=2),
    Case((0, 6), 16, 4, bank=2),
    Case((4, 17), 40, 8, bank=2, base=40, scale="tensor"),
    Case((3, 9), 24, 5, bank=2, base=40, adapter_dtype=torch.float32),
    Case((3, 11), 33, 300, bank=2, base=17, biases=False, layout="transposed"),
    Case((0, 6), 16, 4, bank=2, base=24),
]


@RUNS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    check(case, run)


@RUNS
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_of_any_stride(kind, run, poisoned):
    check(Case((3, 11), 24, 8, bank=2), run, kind)
    check(Case((3, 11), 24, 8, bank=2, base=20), run, kind)


# a tenth of the suite's: nearly all of what there is to draw is in CASES
@RUNS
@settings(max_examples=max(3, settings.default.max_examples // 10))
@given(data=st.data())
def test_property(data, run):
    lead = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
    layouts = ["plain", "sliced", "strided"] + (["transposed"] if len(lead) > 1 else [])
    case = Case(
        lead=lead,
        c=data.draw(st.integers(1, 70)),
        r=data.draw(st.sampled_from([1, 2, 8, 17, 33])),
        bank=data.draw(st.integers(1, 4)),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        biases=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, "tensor"])),
        base=data.draw(st.sampled_from([0, 0, 8, 70])),
        layout=data.draw(st.sampled_from(layouts)),
        adapter_dtype=data.draw(st.sampled_from([None, torch.float32])),
        seed=data.draw(st.integers(0, 2**31)),
    )
    check(case, run, data.draw(st.sampled_from(["plain", "expanded", "transposed"])))


def one_by_one(inputs, backend):
    """Each sample through `adapter` with its own tensors."""
    bank = {k: inputs.get(k) for k in ("w_down", "w_up", "b_down", "b_up")}
    found = []
    for b, k in enumerate(inputs["index"].tolist()):
        h = inputs["h"][b : b + 1]
        one = {name: None if t is None else t[k] for name, t in bank.items()}
        scale = 1.0 if inputs["scale"] is None else float(inputs["scale"][k])
        base = inputs["base"][b : b + 1] if "base" in inputs else None
        option = dict(base=base, scale=scale, activation=inputs["activation"], backend=backend)
        alone = h if base is None else base
        found.append(alone if k < 0 else ops.adapter(h, **one, **option))
    return torch.cat(found)


@RUNS
@pytest.mark.parametrize(
    ("activation", "base"), [*((name, 0) for name in ACTIVATIONS), ("gelu", 48), ("silu", 24)]
)
def test_equals_adapter_sample_by_sample(activation, base, run, poisoned):
    backend, device, dtype = run
    case = Case((6, 19), 48, 8, bank=3, activation=activation, scale="tensor", base=base)
    inputs = case.inputs(dtype, device)
    inputs["index"] = torch.tensor([2, 0, -1, 0, 2, 1], device=device)
    with torch.no_grad():
        y = ops.adapter_bank(**inputs, backend=backend)
        expected = one_by_one(inputs, backend)
    alone = inputs["base" if base else "h"]
    assert torch.equal(y[2], alone[2]), "no adapter: the sample itself, to the bit"
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_smaller_rank_is_padded_with_zeros(activation):
    """Every activation is 0 at 0, so ranks of zeros add nothing; nor do their gradients."""
    assert activate(torch.zeros(1, dtype=torch.float64), activation).item() == 0
    case = Case((4, 5), 12, 3, bank=2, activation=activation, scale="tensor")
    inputs = case.inputs(torch.float64, "cpu")
    pad = torch.nn.functional.pad
    padded = inputs | {
        "w_down": pad(inputs["w_down"], (0, 0, 0, 4)),
        "w_up": pad(inputs["w_up"], (0, 4)),
        "b_down": pad(inputs["b_down"], (0, 4)),
    }
    y, wider = (ops.adapter_bank(**i, backend="reference") for i in (inputs, padded))
    torch.testing.assert_close(wider, y, rtol=1e-13, atol=1e-13)
    names = ("h", "w_down", "w_up", "b_down", "b_up", "scale")
    grads = [torch.autograd.grad(r.square().sum(), [inputs[n] for n in names]) for r in (y, wider)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@RUNS
@pytest.mark.parametrize("base", [0, 9])
def test_only_what_is_asked_for(base, run):
    backend, device, dtype = run
    inputs = replace(SMALL, base=base).inputs(dtype, device)
    tensors = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and k != "index"]
    full = torch.autograd.grad(
        ops.adapter_bank(**inputs, backend=backend).sum(), [inputs[k] for k in tensors]
    )
    for name, expected in zip(tensors, full, strict=True):
        alone = inputs | {k: inputs[k].detach().requires_grad_(k == name) for k in tensors}
        ops.adapter_bank(**alone, backend=backend).sum().backward()
        torch.testing.assert_close(alone[name].grad, expected)
        assert all(alone[k].grad is None for k in tensors if k != name)


@RUNS
def test_nan_stays_with_its_sample(run):
    """Of one adapter, and of one row."""
    backend, device, dtype = run
    inputs = Case((4, 3), 16, 4, bank=2).inputs(dtype, device)
    inputs["w_up"].data[0, 3, 1] = float("nan")
    inputs["h"].data[2, 2, 0] = float("nan")
    with torch.no_grad():
        y = ops.adapter_bank(**inputs, backend=backend)
    expected = torch.zeros(4, 3, 16, dtype=torch.bool, device=y.device)
    expected[1, :, 3] = expected[2, 2] = True  # sample 1 has adapter 0, sample 2 another
    assert torch.equal(y.isnan(), expected)


@RUNS
@pytest.mark.parametrize("place", [-2, 2, 2**31 - 1])
def test_a_kernel_never_reads_beside_the_bank(place, run):
    """What no check has seen, as on a GPU: NaN in that sample, or an error, and no other read."""
    backend, device, dtype = run
    i = SMALL.inputs(dtype, device)
    h = i["h"].detach().view(-1, 6)
    index = torch.tensor([0, place, 1, -1], device=device)
    rest = (i["b_down"], i["b_up"], i["scale"], None, "silu", backend)
    with torch.no_grad():
        if backend == "native" and device == "cpu":
            with pytest.raises(RuntimeError, match=f"index: expected -1 or 0 to 1, got {place}"):
                contract.forward(h, i["w_down"], i["w_up"], index, *rest)
            return
        y = contract.forward(h, i["w_down"], i["w_up"], index, *rest).view(4, 5, 6)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("run", FP64, ids=run_id)
@pytest.mark.parametrize("base", [0, 4])
def test_gradcheck(base, run):
    inputs = replace(SMALL, base=base).inputs(torch.float64, run[1])
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    apart = {"base"} if base else set()
    assert set(names) == {"h", "w_down", "w_up", "b_down", "b_up", "scale"} | apart

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        found = inputs | dict(zip(names, tensors, strict=True))
        return ops.adapter_bank(**found, backend=run[0])

    assert torch.autograd.gradcheck(call, [inputs[k] for k in names])


def arguments(run, base):
    i = replace(SMALL, base=base).inputs(run[2], run[1])
    h = i["h"].detach().view(-1, 6).requires_grad_()
    bank = (i["w_down"], i["w_up"], i["index"], i["b_down"], i["b_up"], i["scale"])
    apart = i["base"].detach().view(-1, base).requires_grad_() if base else None
    return (h, *bank, apart, "silu", run[0])


@SINGLE
@pytest.mark.parametrize("base", [0, 8])
def test_opcheck(base, run):
    if run[0] == "triton" and run[1] == "cpu":
        pytest.skip("the interpreter knows only real tensors it can read: no tracing through it")
    found = arguments(run, base)
    torch.library.opcheck(torch.ops.a3fta.adapter_bank, found)
    still = [x.detach() if isinstance(x, torch.Tensor) else x for x in found]
    needs = [True, True, True, False, True, True, True]
    dy = torch.randn_like(still[7] if base else still[0])
    options = (bool(base), *still[8:], needs)
    torch.library.opcheck(torch.ops.a3fta.adapter_bank_backward, (dy, *still[:7], *options))


@SINGLE
@pytest.mark.parametrize("base", [0, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(autocast, base, run):
    """fullgraph, forward and backward, equal to eager to the bit; also under autocast."""
    backend, device, dtype = run
    inputs = replace(SMALL, base=base).inputs(dtype, device)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    call = partial(ops.adapter_bank, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: call(**kw), fullgraph=True, backend="aot_eager")
    found = []
    for function in (lambda kw: call(**kw), compiled):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = function(inputs)
        assert y.dtype == (torch.bfloat16 if autocast else dtype)
        grads = torch.autograd.grad(y.float().square().sum(), leaves)
        assert all(g.dtype == x.dtype for g, x in zip(grads, leaves, strict=True))
        found.append([y, *grads])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@RUNS
def test_no_second_derivative(run):
    inputs = SMALL.inputs(run[2], run[1])
    y = ops.adapter_bank(**inputs, backend=run[0])
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), inputs["h"], create_graph=True)


def test_shapes_on_the_meta_device():
    inputs = replace(SMALL, lead=(4, 2, 5)).inputs(torch.float32, "meta")
    assert ops.adapter_bank(**inputs).shape == (4, 2, 5, 6)
    inputs = replace(SMALL, lead=(4, 2, 5), base=7).inputs(torch.float32, "meta")
    assert ops.adapter_bank(**inputs).shape == (4, 2, 5, 7)


GOOD = dict(
    h=torch.zeros(2, 5, 16), w_down=torch.zeros(3, 4, 16), w_up=torch.zeros(3, 16, 4),
    index=torch.tensor([0, -1]),
)  # fmt: skip
BAD = [
    (dict(h=torch.zeros(16)), ValueError, r"h: expected shape \(B, \.\.\., C\), got \(16,\)"),
    (
        dict(w_down=torch.zeros(4, 16)),
        ValueError,
        r"w_down: expected .*\(K, R, C\).* got \(4, 16\)",
    ),
    (dict(w_down=torch.zeros(0, 4, 16)), ValueError, r"w_down: expected .*of at least 1"),
    (dict(w_down=torch.zeros(3, 4, 9)), ValueError, r"w_down: expected shape \(3, 4, 16\)"),
    (dict(w_up=torch.zeros(3, 4, 16)), ValueError, r"w_up: expected shape \(3, 16, 4\)"),
    (dict(w_up=torch.zeros(3, 16, 4).long()), TypeError, "w_up: expected dtype"),
    (dict(b_down=torch.zeros(4)), ValueError, r"b_down: expected shape \(3, 4\)"),
    (dict(b_up=torch.zeros(3, 4)), ValueError, r"b_up: expected shape \(3, 16\)"),
    (dict(base=torch.zeros(2, 4, 16)), ValueError, r"base: expected shape \(\.\.\., N\) beside h"),
    (dict(base=torch.zeros(2, 5, 16).half()), TypeError, "base: expected dtype torch.float32"),
    (dict(base=torch.zeros(2, 5, 9)), ValueError, r"w_up: expected shape \(3, 9, 4\), \(K, N, R\)"),
    (dict(scale=1.0), TypeError, r"scale: expected a torch.Tensor, got 1.0"),
    (dict(scale=torch.ones(2)), ValueError, r"scale: expected shape \(3,\)"),
    (dict(index=[0, 1]), TypeError, r"index: expected a torch.Tensor"),
    (dict(index=torch.zeros(3).int()), ValueError, r"index: expected shape \(2,\)"),
    (dict(index=torch.zeros(2)), TypeError, "index: expected dtype torch.int32, torch.int64"),
    (dict(index=torch.tensor([0, 3])), ValueError, "index: expected -1 or 0 to 2, .*got 3"),
    (dict(index=torch.tensor([-2, 0])), ValueError, "index: expected -1 or 0 to 2, .*got -2"),
    (dict(index=torch.zeros(2, device="meta").int()), ValueError, "index: expected device cpu"),
    (dict(activation="swish"), ValueError, "activation: expected one of identity"),
    (dict(backend="cuda"), ValueError, "backend: expected one of auto"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.adapter_bank(**(GOOD | change))
