"""The compiled library as a file: how it loads, what it needs, and its instruction sets."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.backends import native_status
from a3fta_kernels.ops.activations import ACTIVATIONS, activate, activation_code, activation_grad

pytestmark = pytest.mark.skipif(
    not native_status().available, reason=f"native backend: {native_status().reason}"
)

LIBRARY = Path(a3fta.__file__).with_name("_C.abi3.so")
NATIVE = torch.ops.a3fta_native
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

OPERATORS = {
    "has_cuda": "() -> bool",
    "adapter_forward": "(Tensor h, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, "
    "Tensor? gamma, Tensor? beta, int activation) -> (Tensor y, Tensor a)",
    "adapter_backward": "(Tensor dy, Tensor h, Tensor a, Tensor w_down, Tensor w_up, "
    "Tensor? gamma, Tensor? beta, int activation, bool need_dh, bool need_dw) -> (Tensor dh, "
    "Tensor dw_down, Tensor g_up, Tensor da_sum, Tensor dy_sum, Tensor dgamma, Tensor dbeta)",
    "adapter_bank_forward": "(Tensor h, Tensor residual, Tensor w_down, Tensor w_up, "
    "Tensor? b_down, Tensor? b_up, Tensor scale, Tensor index, int activation) -> Tensor y",
    "adapter_down": "(Tensor h, Tensor w_down, Tensor? b_down, Tensor? gamma, Tensor? beta, "
    "int activation) -> (Tensor a, Tensor z)",
    "adapter_up": "(Tensor z, Tensor v, Tensor? bias, Tensor? residual) -> Tensor",
    "adapter_dz": "(Tensor dy, Tensor a, Tensor v, Tensor? gamma, Tensor? beta, int activation, "
    "bool need_dw) -> (Tensor da, Tensor p, Tensor dy_sum, Tensor dgamma, Tensor dbeta)",
    "adapter_dh_": "(Tensor(a!) dh, Tensor da, Tensor w_down) -> ()",
    "adapter_dw_down": "(Tensor da, Tensor h) -> (Tensor dw_down, Tensor da_sum)",
    "adapter_linear_forward": "(Tensor h, Tensor weight, Tensor? bias, Tensor w_down, Tensor v, "
    "Tensor? b_down, Tensor? gamma, Tensor? beta, Tensor? residual, int start, int activation) "
    "-> (Tensor y, Tensor a)",
    "adapter_linear_backward_dh": "(Tensor dy, Tensor da, Tensor weight, Tensor w_down, "
    "int start) -> Tensor dh",
    "geglu_forward": "(Tensor p, int activation) -> Tensor y",
    "geglu_backward": "(Tensor dy, Tensor p, int activation) -> Tensor dp",
    "group_norm_forward": "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, "
    "int activation) -> (Tensor y, Tensor mean, Tensor rstd)",
    "group_norm_backward": "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, int activation) -> Tensor dx",
    "layer_norm_forward": "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, "
    "Tensor mean, Tensor rstd)",
    "layer_norm_backward": "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) "
    "-> Tensor dx",
    "quantize": "(Tensor x) -> (Tensor codes, Tensor ranges)",
    "dequantize": "(Tensor codes, Tensor ranges, ScalarType dtype) -> Tensor x",
}


@pytest.fixture
def restore() -> Iterator[None]:
    used = NATIVE.cpu_capability()
    yield
    NATIVE.set_cpu_capability(used)


def capabilities() -> list[str]:
    return NATIVE.cpu_capabilities().split(",")


@pytest.mark.parametrize("name", OPERATORS)
def test_schema(name: str) -> None:
    schema = str(getattr(NATIVE, name).default._schema)
    assert schema == f"a3fta_native::{name}{OPERATORS[name]}"


def test_it_is_no_python_module() -> None:
    # one file for every Python: it may not name a symbol of the interpreter
    if sys.platform != "linux":
        pytest.skip("reads ELF symbols")
    listing = run("nm", "-D", "--undefined-only", str(LIBRARY))
    assert not [line for line in listing.splitlines() if line.split()[-1].startswith("Py")]


def test_it_needs_no_gpu_library() -> None:
    if sys.platform != "linux":
        pytest.skip("reads ELF headers")
    needed = [line for line in run("readelf", "-d", str(LIBRARY)).splitlines() if "NEEDED" in line]
    assert any("libtorch_cpu" in line for line in needed)
    for library in ("cudart", "libcuda.", "nvrtc", "torch_cuda", "libpython"):
        assert not [line for line in needed if library in line]


def test_undefined_gpu_symbols_are_weak() -> None:
    if sys.platform != "linux":
        pytest.skip("reads ELF symbols")
    undefined = [
        line.split()[-2:] for line in run("nm", "-D", "--undefined-only", str(LIBRARY)).splitlines()
    ]
    # every build of torch has the number of its CUDA device type
    everywhere = "aoti_torch_device_type_cuda"
    gpu = [(kind, name) for kind, name in undefined if "cuda" in name and name != everywhere]
    assert all(kind == "w" for kind, _ in gpu), gpu
    if NATIVE.has_cuda():
        assert gpu, "the CUDA kernels run on a stream that torch names"


def test_uses_the_stable_abi_alone() -> None:
    if sys.platform != "linux":
        pytest.skip("reads ELF symbols")
    undefined = run("nm", "-D", "--undefined-only", str(LIBRARY))
    # C++ symbols of torch change from release to release
    assert not [n for n in undefined.split() if n.startswith("_ZN2at") or n.startswith("_ZN3c10")]


def test_loads_in_a_process_without_triton_or_diffusers() -> None:
    code = (
        "import sys, torch; from a3fta_kernels.backends import native_status; "
        "assert native_status().available; "
        "assert 'triton' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_has_cuda_is_what_was_built() -> None:
    # the toolkit's static runtime puts a fat binary section in
    if sys.platform != "linux":
        pytest.skip("reads ELF headers")
    sections = run("readelf", "-SW", str(LIBRARY))
    assert NATIVE.has_cuda() == (".nv_fatbin" in sections)
    kernels = {
        n
        for n in OPERATORS
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"a3fta_native::{n}", "CUDA")
    }
    if NATIVE.has_cuda():
        assert kernels == set(OPERATORS) - {"has_cuda"}
    else:
        assert not kernels


def test_capabilities_suit_the_processor(restore: None) -> None:
    names = capabilities()
    assert names[0] == "baseline"
    assert NATIVE.cpu_capability() == names[-1]
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx512_bf16" in names:
        assert "avx512_bf16" in flags.read_text()
    with pytest.raises(RuntimeError, match=r"name: expected one of baseline.*got mmx"):
        NATIVE.set_cpu_capability("mmx")
    assert NATIVE.cpu_capability() == names[-1]
    for name in names:
        NATIVE.set_cpu_capability(name)
        assert NATIVE.cpu_capability() == name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", (5, 64))
def test_instruction_sets_agree(dtype: torch.dtype, rank: int, restore: None) -> None:
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows, channels = 101, 83
    h, dy, w_down, w_up = draw(rows, channels), draw(rows, channels), draw(rank, channels) / 9, None
    w_up = draw(channels, rank) / 9
    b_down, b_up = draw(rank), draw(channels)
    code = activation_code("gelu")
    results = {}
    for name in capabilities():
        NATIVE.set_cpu_capability(name)
        y, a = NATIVE.adapter_forward(h, w_down, w_up, b_down, b_up, None, None, code)
        grads = NATIVE.adapter_backward(dy, h, a, w_down, w_up, None, None, code, True, True)
        results[name] = [x.double() for x in (y, a, *grads)]
    # the same sums in another order; half-precision results may round the other way
    bound = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 3 * torch.finfo(dtype).eps)
    for name, values in results.items():
        for mine, base in zip(values, results["baseline"], strict=True):
            scale = base.abs().max().item() if base.numel() else 1.0
            torch.testing.assert_close(mine, base, rtol=0, atol=bound * scale, msg=name)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_over_the_whole_range(name: str, dtype: torch.dtype, restore: None) -> None:
    """h is one channel wide and the weights are one, so that a = h and z, da are the functions."""
    values = torch.linspace(-30, 30, 4001, dtype=torch.float64).to(dtype)
    values = torch.cat([values, torch.tensor([-1e4, 1e4, 0.0, -0.0], dtype=dtype)])
    one = torch.ones(1, 1, dtype=dtype)
    exact, slope = values.double(), torch.ones(len(values), dtype=torch.float64)
    z_exact, da_exact = activate(exact, name), activation_grad(slope, exact, name)
    for capability in capabilities():
        NATIVE.set_cpu_capability(capability)
        a, z = NATIVE.adapter_down(values[:, None], one, None, None, None, activation_code(name))
        da, *_ = NATIVE.adapter_dz(
            torch.ones_like(values)[:, None], a, one, None, None, activation_code(name), False
        )
        assert torch.equal(a[:, 0], values)
        eps = max(torch.finfo(dtype).eps, 3e-16)
        assert ((z[:, 0].double() - z_exact).abs() <= 2 * eps * (1 + exact.abs())).all()
        near = exact.abs() < 1e3
        error = (da[:, 0].double() - da_exact).abs()[near]
        assert (error <= (64 if dtype == torch.float64 else 32) * eps).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_reach_the_result(dtype: torch.dtype, restore: None) -> None:
    for capability in capabilities():
        NATIVE.set_cpu_capability(capability)
        for value in (math.nan, math.inf):
            h = torch.ones(9, 7, dtype=dtype)
            h[4, 3] = value
            w = torch.ones(3, 7, dtype=dtype) / 8
            y, a = NATIVE.adapter_forward(h, w, w.t().contiguous(), None, None, None, None, 1)
            assert not a[4].isfinite().any() and not y[4].isfinite().any()
            clean = torch.arange(9) != 4
            assert y[clean].isfinite().all() and a[clean].isfinite().all()
            dh, dw_down, *_ = NATIVE.adapter_backward(
                h, torch.ones_like(h), torch.ones_like(a), w, w.t().contiguous(), None, None, 1,
                True, True,
            )  # fmt: skip
            assert not dh[4].isfinite().any() and dh[clean].isfinite().all()
            assert not dw_down.isfinite().any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_conversions_round_like_torch(dtype: torch.dtype, restore: None) -> None:
    """Every finite half through widen, and fp32 sums through narrow."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    # whole panels and a remainder take different ways
    for columns in (1, 64):
        every = bits.view(dtype).view(-1, columns)
        zero, one = torch.zeros(len(every), 1, dtype=dtype), torch.ones(columns, 1, dtype=dtype)
        third = torch.full((columns,), 1 / 3)
        expected = (every.float() + third).to(dtype)
        for capability in capabilities():
            NATIVE.set_cpu_capability(capability)
            kept = NATIVE.adapter_up(zero, one, torch.zeros(columns), every)
            same = kept.view(torch.int16) == every.view(torch.int16)
            # this instruction set's conversion makes subnormals zero
            flushed = (every.abs() < torch.finfo(dtype).tiny) & (kept == 0)
            same |= flushed & (capability == "avx512_bf16" and dtype == torch.bfloat16)
            assert (same | every.isnan() | (every == 0)).all()
            assert kept.isnan().eq(every.isnan()).all()
            rounded = NATIVE.adapter_up(zero, one, third, every)
            assert torch.equal(rounded.nan_to_num(), expected.nan_to_num())


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    rows, channels, rank = 700, 70, 9
    generator = torch.Generator().manual_seed(0)
    h, dy = (torch.randn(rows, channels, generator=generator) for _ in range(2))
    a, gamma = torch.randn(rows, rank, generator=generator), torch.randn(7, rank)
    w_down, w_up = torch.randn(rank, channels), torch.randn(channels, rank)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                NATIVE.adapter_backward(dy, h, a, w_down, w_up, gamma, None, 4, True, True)
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("samples", (1, 3, 7, 60, 420))
def test_sums_per_sample(samples: int) -> None:
    """Samples shorter and longer than the rows that one task owns."""
    rows, channels, rank = 420, 20, 6
    dy, h = (torch.randn(rows, channels, dtype=torch.float64) for _ in range(2))
    a = torch.randn(rows, rank, dtype=torch.float64)
    w_down, w_up = torch.randn(rank, channels).double(), torch.randn(channels, rank).double()
    gamma, beta = torch.randn(samples, rank).double(), torch.randn(samples, rank).double()
    code = activation_code("silu")
    out = NATIVE.adapter_backward(dy, h, a, w_down, w_up, gamma, beta, code, True, True)
    dz = (dy @ w_up).view(samples, -1, rank)
    act = activate(a, "silu").view_as(dz)
    torch.testing.assert_close(out[5], (dz * act).sum(1))
    torch.testing.assert_close(out[6], dz.sum(1))


def test_wrong_calls_are_refused() -> None:
    h, w = torch.randn(4, 8), torch.randn(2, 8)
    up = w.t().contiguous()
    for arguments, message in (
        ((h, w, up[:7], None, None, None, None, 0), "w_up: expected shape"),
        ((h, w, w.t(), None, None, None, None, 0), "w_up: expected a contiguous"),
        ((h.t(), w, up, None, None, None, None, 0), "h: expected unit column stride"),
        ((h, w.double(), up, None, None, None, None, 0), "w_down: expected the dtype"),
        ((h, w, up, torch.zeros(3), None, None, None, 0), "b_down: expected shape"),
        ((h, w, up, None, None, torch.zeros(3, 2), None, 0), "gamma: expected a number"),
        ((h, w, up, None, None, None, None, 9), "activation: expected 0 to 4"),
        ((h.to(torch.int32), w.to(torch.int32), up.to(torch.int32), *[None] * 4, 0), "float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            NATIVE.adapter_forward(*arguments)


def test_wrong_calls_of_normalisations_are_refused() -> None:
    x, w, rows = torch.randn(2, 8, 5), torch.ones(8), torch.randn(4, 8)
    y, mean, rstd = NATIVE.group_norm_forward(x, 4, w, w, 1e-5, 0)
    _, m, r = NATIVE.layer_norm_forward(rows, w, w, 1e-5)
    last = x.mT.contiguous().mT
    for call, message in (
        (lambda: NATIVE.group_norm_forward(rows, 4, w, w, 1e-5, 0), r"x: expected shape \(B, C, S"),
        (lambda: NATIVE.group_norm_forward(x, 3, w, w, 1e-5, 0), "groups: expected a divisor"),
        (lambda: NATIVE.group_norm_forward(x, 0, w, w, 1e-5, 0), "groups: expected a divisor"),
        (lambda: NATIVE.group_norm_forward(x[:, :, ::2], 4, w, w, 1e-5, 0), "x: expected a contig"),
        (lambda: NATIVE.group_norm_forward(x, 4, w[:4], w, 1e-5, 0), "weight: expected shape"),
        (lambda: NATIVE.group_norm_forward(x, 4, w.half(), w, 1e-5, 0), "weight: expected the dty"),
        (lambda: NATIVE.group_norm_forward(x, 4, w, w, 1e-5, 2), "activation: expected identity"),
        (lambda: NATIVE.group_norm_backward(last, x, mean, rstd, w, w, 0), "dy: expected the str"),
        (lambda: NATIVE.group_norm_backward(x[:1], x, mean, rstd, w, w, 0), "dy: expected shape"),
        (lambda: NATIVE.group_norm_backward(y, x, mean, rstd[:1], w, w, 0), "rstd: expected shape"),
        (lambda: NATIVE.group_norm_backward(y, x, mean.double(), rstd, w, w, 0), "mean: expected"),
        (lambda: NATIVE.layer_norm_forward(rows.t(), w, w, 1e-5), "x: expected unit column stride"),
        (lambda: NATIVE.layer_norm_forward(rows[:, :0], w[:0], w, 1e-5), "x: expected at least on"),
        (lambda: NATIVE.layer_norm_forward(rows, w, w[:7], 1e-5), "bias: expected shape"),
        (lambda: NATIVE.layer_norm_backward(rows[:2], rows, m, r, w), "dy: expected shape"),
        (lambda: NATIVE.layer_norm_backward(rows, rows, m[:2], r, w), "mean: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_wrong_calls_of_element_wise_operators_are_refused() -> None:
    p, codes = torch.randn(4, 8), torch.zeros(130, dtype=torch.int8)
    ranges = torch.zeros(2, 2, dtype=torch.bfloat16)
    for call, message in (
        (lambda: NATIVE.geglu_forward(p[:, :7], 2), "p: expected an even number of columns"),
        (lambda: NATIVE.geglu_forward(p.t(), 2), "p: expected unit column stride"),
        (lambda: NATIVE.geglu_forward(p, 9), "activation: expected 0 to 4"),
        (lambda: NATIVE.geglu_backward(p, p, 2), r"dy: expected shape \(4, 4\)"),
        (lambda: NATIVE.geglu_backward(p[:, :4].double(), p, 2), "dy: expected the dtype"),
        (lambda: NATIVE.quantize(p), r"x: expected shape \(32\)"),
        (lambda: NATIVE.quantize(p.view(-1)[::2]), "x: expected a contiguous"),
        (lambda: NATIVE.dequantize(p.view(-1), ranges, torch.float32), "codes: expected int8"),
        (lambda: NATIVE.dequantize(codes, ranges[:1], torch.float32), "ranges: expected shape"),
        (lambda: NATIVE.dequantize(codes, ranges.half(), torch.float32), "ranges: expected bfl"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_obeys_the_number_of_threads() -> None:
    """With one thread the work stays on the caller's."""
    threads = torch.get_num_threads()
    code = """
import os, torch
from a3fta_kernels.backends import native_status
assert native_status().available
torch.set_num_threads(1)
h, w = torch.randn(4096, 64), torch.randn(16, 64)
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    torch.ops.a3fta_native.adapter_forward(h, w, w.t().contiguous(), *[None] * 4, 2)
assert len(os.listdir("/proc/self/task")) == before
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.get_num_threads() == threads


def run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
