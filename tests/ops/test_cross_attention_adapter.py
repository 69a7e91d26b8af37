"""`cross_attention_adapter` on every backend, against the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from a3fta_kernels import BackendUnavailableError, ops
from a3fta_kernels.backends import triton_interpreted
from a3fta_kernels.ops.cross_attention_adapter import api, limits
from a3fta_kernels.ops.cross_attention_adapter.attention import attention

from ..oracle import IN_ORDER, Case, check, run_id, runs

# the kernels compute fp32 in the interpreter alone: there it shows errors that bf16 would hide
TAKEN = (*limits.DTYPES, torch.float32) if triton_interpreted() else limits.DTYPES
ALL = [run for run in runs() if run[0] != "triton" or run[2] in TAKEN]
RUNS = pytest.mark.parametrize("run", ALL, ids=run_id)
KERNELS = pytest.mark.parametrize("run", [r for r in ALL if r[0] == "triton"], ids=run_id)


@pytest.fixture(autouse=True)
def fp32_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(limits, "DTYPES", TAKEN)


def case(lead=(2, 5), head_dim=16, heads=2, keys=7, r=4, n=20, **options) -> Case:
    return Case(lead, head_dim * heads, r, n, heads=heads, keys=keys, **options)


CASES = [
    case((1, 1), 8, 1, 1, 1, n=8),
    case((2, 67), 40, 2, 77, 8),
    case((1, 9), 64, 2, 77, 16, biases=False, scale=0.5, text=False),
    case((2, 5), 72, 1, 17, 20, residual=True, modulation="gamma beta", scale="tensor"),
    case((1, 7), 80, 1, 77, 64, activation="silu", mask="add b n", text=False),
    case((1, 6), 128, 1, 16, 3, activation="gelu_tanh", layout="sliced"),
    case((1, 5), 160, 1, 33, 17, activation="identity", mask="bool b n"),
    case((3, 4), 33, 3, 19, 5, mask="bool b m n", layout="transposed"),
    case((2, 6), 5, 3, 9, 2, mask="add b h m n", residual=True, layout="strided"),
    case((2, 3), 24, 2, 40, 8, mask="add h n", adapter_dtype=torch.float32, scale="tensor"),
    case((0, 6), modulation="gamma beta", scale="tensor"),
    case((2, 0), residual=True),
]
KEYS = [16, 120, 154, 333, 512]


@RUNS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    check(case, run)


@RUNS
@pytest.mark.parametrize("keys", KEYS)
def test_every_number_of_keys(keys, run, poisoned):
    check(case((1, 3), 16, 1, keys, 2, n=8, mask="add n"), run)


@RUNS
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_of_any_stride(kind, run, poisoned):
    check(case(residual=True), run, kind)


@RUNS
@pytest.mark.parametrize("rank", [1, 33, 64])
def test_every_rank(rank, run):
    check(case((1, 4), 8, 1, 5, rank, n=8), run)


def leaves(inputs: dict) -> list[torch.Tensor]:
    return [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]


@KERNELS
def test_no_kernel_for_the_text_unless_asked(run, monkeypatch):
    from a3fta_kernels.ops.cross_attention_adapter import backward_triton

    launched = []
    plain = backward_triton.launch_key_grad

    def launcher(head_dim: int):
        launched.append(head_dim)
        return plain(head_dim)

    monkeypatch.setattr(backward_triton, "launch_key_grad", launcher)
    for text in (False, True):
        inputs = case(text=text).inputs(run[2], run[1])
        y = ops.cross_attention_adapter(**inputs, backend="triton")
        torch.autograd.grad(y.sum(), leaves(inputs))
        assert launched == ([16] if text else [])


@KERNELS
def test_only_what_is_asked_for(run):
    inputs = case((1, 4), modulation="gamma", scale="tensor").inputs(run[2], run[1])
    tensors = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
    y = ops.cross_attention_adapter(**inputs, backend="triton")
    full = torch.autograd.grad(y.sum(), [inputs[k] for k in tensors])
    for name, expected in zip(tensors, full, strict=True):
        if name in ("w_up", "b_up", "b_down", "scale"):
            continue
        alone = {
            k: v.detach().requires_grad_(k == name) if k in tensors else v
            for k, v in inputs.items()
        }
        ops.cross_attention_adapter(**alone, backend="triton").sum().backward()
        torch.testing.assert_close(alone[name].grad, expected)
        assert all(alone[k].grad is None for k in tensors if k != name)


@IN_ORDER
@KERNELS
def test_twice_the_same_bits(run):
    """Sums over rows are added in a fixed order: no atomics."""

    def gradients() -> tuple[torch.Tensor, ...]:
        inputs = case((1, 300), 8, 1, 5, 2, n=4).inputs(run[2], run[1])
        y = ops.cross_attention_adapter(**inputs, backend="triton")
        return torch.autograd.grad(y.sum(), leaves(inputs))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@KERNELS
def test_what_is_saved(run):
    """Of size M x C q, which the caller has, and h."""
    inputs = case((2, 32), 24, 2, 7, 4, n=48).inputs(run[2], run[1])
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.cross_attention_adapter(**inputs, backend="triton")
    given = {v.untyped_storage().data_ptr() for v in inputs.values() if isinstance(v, torch.Tensor)}
    assert all(inputs[name].untyped_storage().data_ptr() in kept for name in "qkv")
    # h, a and V
    assert sum(n for p, n in kept.items() if p not in given) == 64 * 48 + 64 * 4 + 48 * 4


@KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_hides_a_value_that_is_no_number(value, run):
    """In q it reaches its row, in k and v its sample; some of PyTorch's kernels hide it."""
    for name, at in (("q", (1, 3, 2)), ("v", (0, 2, 5)), ("k", (0, 2, 5))):
        inputs = case().inputs(run[2], run[1])
        inputs[name].data[at] = value
        with sdpa_kernel(SDPBackend.MATH):
            y = ops.cross_attention_adapter(**inputs, backend="triton")
        finite = torch.ones(2, 5, dtype=torch.bool)
        if name == "q":
            finite[1, 3] = False
        elif name == "k" and value == float("inf"):
            finite[0] = inputs["q"][0, :, 5].cpu() < 0  # a score of -inf: no share
        else:
            finite[0] = False
        assert torch.equal(y.isfinite().all(-1).cpu(), finite), name


@RUNS
def test_a_row_without_keys_attends_to_nothing(run):
    """As in PyTorch: h = 0, whichever way the mask says it."""
    inputs = case().inputs(run[2], run[1])
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool, device=run[1])
    mask[1, :, 3] = False
    inputs["mask"] = mask
    y = ops.cross_attention_adapter(**inputs, backend=run[0])
    adapter = {k: v for k, v in inputs.items() if k not in ("q", "k", "v", "heads", "mask")}
    nothing = ops.adapter_linear(torch.zeros_like(inputs["q"]), **adapter, backend=run[0])
    # beside each other y and the bias are rounded in another order
    close = dict(rtol=0.0, atol=8 * torch.finfo(run[2]).eps)
    torch.testing.assert_close(y[1, 3], nothing[1, 3], **close)
    inputs["mask"] = torch.zeros(mask.shape).to(run[2]).to(run[1]).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(ops.cross_attention_adapter(**inputs, backend=run[0]), y, **close)


@KERNELS
def test_a_large_mask_and_rows_that_fill_no_block(run):
    """The same for every key it changes nothing, in the sums over rows either."""
    backend, device, dtype = run
    inputs = case((2, 70)).inputs(dtype, device)
    large = torch.full((2, 1, 1, 7), 100.0, dtype=dtype, device=device)
    wanted = [inputs[name] for name in ("q", "k", "v")]
    results = []
    for mask in (None, large):
        y = ops.cross_attention_adapter(**inputs | {"mask": mask}, backend=backend)
        results.append(torch.autograd.grad(y.sum(), wanted))
    for expected, found in zip(*results, strict=True):
        atol = 0.02 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


@KERNELS
def test_the_least_finite_mask_is_no_minus_infinity(run):
    """All keys equally far away: the mean of the values, and its gradient.

    The logarithm of a sum is lost beside such a number: what rests on it (PyTorch's CPU kernel)
    has gradients that are too large by the number of keys.
    """
    backend, device, dtype = run
    if dtype == torch.float16:
        pytest.skip("its least number is not so low that scores vanish beside it")
    inputs = case(text=True).inputs(dtype, device)
    lowest = torch.finfo(dtype).min
    inputs["mask"] = torch.full((2, 1, 1, 7), lowest, dtype=dtype, device=device)
    y = ops.cross_attention_adapter(**inputs, backend=backend)
    (dv,) = torch.autograd.grad(y.sum(), inputs["v"])
    h = inputs["v"].detach().mean(1, keepdim=True).expand_as(inputs["q"]).contiguous()
    h.requires_grad_()
    rest = {k: v for k, v in inputs.items() if k not in ("q", "k", "v", "heads", "mask")}
    expected = ops.adapter_linear(h, **rest, backend=backend)
    (dh,) = torch.autograd.grad(expected.sum(), h)
    close = dict(rtol=0.05, atol=0.05) if dtype.itemsize == 2 else {}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(dv, (dh.sum(1, keepdim=True) / 7).expand_as(dv), **close)


@KERNELS
@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(keys=513), "513 keys of head_dim 16 are more than the 512 that fit on chip"),
        (dict(head_dim=65, heads=1, keys=257), "257 keys of head_dim 65 are more than the 256"),
        (dict(head_dim=129, heads=1, keys=193), "193 keys of head_dim 129 are more than the 192"),
        (dict(head_dim=161, heads=1), "head_dim 161 is more than 160"),
        (dict(r=65), "rank 65 is more than 64"),
    ],
)
def test_what_the_kernels_refuse(change, reason, run):
    one = case((1, 2), **change)
    inputs = one.inputs(run[2], run[1])
    found = api.unfused_reason(inputs["q"], inputs["k"], one.heads, one.r, None, "triton")
    assert found is not None and reason in found
    with pytest.raises(BackendUnavailableError, match=f"cross_attention_adapter: {reason}"):
        ops.cross_attention_adapter(**inputs, backend="triton")


def test_where_cudnn_is_suspect_another_kernel_is_taken(monkeypatch):
    """What was chosen before holds after it, also where attention fails."""
    cuda, asked = torch.backends.cuda, []

    def sdpa(*_, **__):
        asked.append(cuda.cudnn_sdp_enabled())
        raise RuntimeError("no attention")

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    q = torch.zeros(1, 3, 8)
    slices, dense = torch.zeros(1, 77, 16)[..., 8:], torch.zeros(1, 77, 8)
    whole = torch.zeros(1, 128, 16)[..., 8:]
    before = cuda.cudnn_sdp_enabled()
    for chosen in (True, False):
        cuda.enable_cudnn_sdp(chosen)
        try:
            for keys in (slices, dense, whole):
                with pytest.raises(RuntimeError, match="no attention"):
                    attention(q, keys, keys, heads=1)
                assert cuda.cudnn_sdp_enabled() is chosen
        finally:
            cuda.enable_cudnn_sdp(before)
    assert asked == [False, True, True, False, False, False]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="no attention"):
        attention(q, slices, slices, heads=1)
    assert asked[-1]


def test_a_mask_is_no_larger_than_it_was(monkeypatch):
    """It is seen by all heads and rows; PyTorch turns one of bool into numbers."""
    seen = []
    plain = F.scaled_dot_product_attention

    def sdpa(*args, attn_mask, **options):
        seen.append(attn_mask.shape)
        return plain(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    q, keys = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = torch.rand(2, 1, 1, 7) > 0.5
    mask[..., 0] = True
    y = attention(q, keys, keys, heads=2, mask=mask.expand(2, 2, 5, 7))
    assert seen == [(2, 1, 1, 7)]
    by_head = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, keys, keys)]
    expected = plain(*by_head, attn_mask=mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, expected)


def test_single_precision_is_left_to_the_library(monkeypatch):
    monkeypatch.setattr(limits, "DTYPES", (torch.float16, torch.bfloat16))
    assert "float32" in str(limits.refusal(torch.float32, 64, 77, 16))
    assert limits.refusal(torch.bfloat16, 64, 77, 16) is None


@KERNELS
def test_the_composition_where_the_kernels_refuse(run, monkeypatch):
    """`auto` computes attention, and then adapter_linear on the backend it chose."""
    _, device, dtype = run
    monkeypatch.setattr(api, "resolve", lambda *_: "triton")
    inputs = case((1, 3), r=65).inputs(dtype, device)
    y = ops.cross_attention_adapter(**inputs)
    h = api.attention(*(inputs[k] for k in "qkv"), heads=2)
    rest = {k: v for k, v in inputs.items() if k not in ("q", "k", "v", "heads", "mask")}
    assert torch.equal(y, ops.adapter_linear(h, **rest, backend="triton"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_mask_and_a_weight_that_train(backend):
    """The composition gives them their gradients."""
    inputs = case(mask="add b n").inputs(torch.float64, "cpu")
    inputs["mask"] = torch.randn(2, 1, 1, 7, dtype=torch.float64, requires_grad=True)
    inputs["weight"].requires_grad_()
    y = ops.cross_attention_adapter(**inputs, backend=backend)
    q, k, v = (inputs[x].unflatten(-1, (2, 16)).transpose(1, 2) for x in "qkv")
    p = (q @ k.transpose(-1, -2) / 4 + inputs["mask"]).softmax(-1)
    h = (p @ v).transpose(1, 2).flatten(2)
    rest = {k: v for k, v in inputs.items() if k not in ("q", "k", "v", "heads", "mask", "weight")}
    bias = rest.pop("bias")
    expected = F.linear(ops.adapter(h, **rest), inputs["weight"], bias)
    torch.testing.assert_close(y, expected)
    wanted = leaves(inputs)
    for one, other in zip(
        torch.autograd.grad(y.sum(), wanted),
        torch.autograd.grad(expected.sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@KERNELS
@pytest.mark.parametrize(
    "name, reason",
    [("mask", "its mask requires a gradient"), ("weight", "the projection itself trains")],
)
def test_the_kernels_have_no_gradient_for(name, reason, run):
    inputs = case(mask="add b n").inputs(run[2], run[1])
    inputs[name] = inputs[name].detach().requires_grad_()
    with pytest.raises(BackendUnavailableError, match=reason):
        ops.cross_attention_adapter(**inputs, backend="triton")


Q, K = torch.zeros(2, 5, 16), torch.zeros(2, 7, 16)
DOWN, UP, W = torch.zeros(4, 16), torch.zeros(16, 4), torch.zeros(12, 16)
GOOD = dict(q=Q, k=K, v=K, w_down=DOWN, w_up=UP, weight=W, heads=2)
BAD = [
    (dict(q=Q[0]), ValueError, r"q: expected shape \(B, Lq, C\), got \(5, 16\)"),
    (dict(q=Q.int()), TypeError, r"q: expected dtype .*got torch.int32"),
    (dict(heads=3), ValueError, r"heads: expected an int that divides q's 16 channels, got 3"),
    (dict(heads=2.0), ValueError, r"heads: expected an int .*got 2.0"),
    (dict(k=K[:, :0]), ValueError, r"k: expected shape \(B, Lk, C\) with a key, got \(2, 0, 16\)"),
    (dict(k=K[:1]), ValueError, r"k: expected shape \(2, 7, 16\), .*got \(1, 7, 16\)"),
    (dict(v=K[:, :6]), ValueError, r"v: expected shape \(2, 7, 16\), that of k, got \(2, 6, 16\)"),
    (dict(k=K.half()), TypeError, r"k: expected dtype torch.float32 \(that of q\)"),
    (dict(v=None), TypeError, r"v: expected a torch.Tensor, got None"),
    (dict(v=K.to("meta")), ValueError, r"v: expected device cpu \(that of q\), got meta"),
    (dict(mask=torch.zeros(3, 7)), ValueError, r"mask: expected .*\(2, 2, 5, 7\), got \(3, 7\)"),
    (dict(mask=torch.zeros(1, 1, 1, 1, 7)), ValueError, r"mask: .*got \(1, 1, 1, 1, 7\)"),
    (dict(mask=torch.zeros(7).int()), TypeError, r"mask: expected dtype torch.bool, torch.float32"),
    (dict(mask=[1]), TypeError, r"mask: expected a torch.Tensor"),
    (dict(attention_scale="1"), TypeError, r"attention_scale: expected a number, got '1'"),
    (dict(weight=W.half()), TypeError, r"weight: expected dtype torch.float32 \(that of q\)"),
    (dict(residual=Q), ValueError, r"residual: expected shape \(2, 5, 12\), .*beside q"),
    (dict(w_down=DOWN[:, :9]), ValueError, r"w_down: expected shape \(4, 16\)"),
    (dict(gamma=torch.zeros(5, 4)), ValueError, r"gamma: .*\(q.shape\[0\], rank\), got \(5, 4\)"),
    (dict(activation="swish"), ValueError, r"activation: expected one of identity"),
    (dict(backend="cuda"), ValueError, r"backend: expected one of auto"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=lambda x: str(x)[:40])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.cross_attention_adapter(**(GOOD | change))


def test_the_reference_has_every_derivative_and_keeps_nan():
    draw = functools.partial(torch.randn, dtype=torch.float64)
    q, k, v = draw(1, 3, 8), draw(1, 4, 8), draw(1, 4, 8)
    rest = draw(2, 8), draw(8, 2), draw(3, 8)

    def run(q):
        return ops.cross_attention_adapter(q, k, v, *rest, heads=2, backend="reference")

    assert torch.autograd.gradgradcheck(run, q.clone().requires_grad_())
    q[0, 1, 3] = torch.nan
    assert run(q).isnan().any(-1).nonzero().tolist() == [[0, 1]]
