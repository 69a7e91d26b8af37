"""What a launcher keeps of Triton's compiled kernels, with a kernel that compiles nothing."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from a3fta_kernels import triton_support  # noqa: E402
from a3fta_kernels.backends import triton_interpreted  # noqa: E402
from a3fta_kernels.ops.cross_attention_adapter import limits, tiles_triton  # noqa: E402
from a3fta_kernels.ops.cross_attention_adapter.backward_triton import attention_grads  # noqa: E402
from a3fta_kernels.ops.gemm_triton import concat_gemm  # noqa: E402

CHOICE = triton_support.config(4, 3, BLOCK_M=16)
X = torch.zeros(64, 64, dtype=torch.bfloat16)
ARGUMENTS = {"x_ptr": X, "x_desc": None, "M": 64, "FLAG": True}


class Compiled(CompiledKernel):
    def __init__(self, launches: list):
        self.module = None
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, values))


class Kernel:
    """Of each call it notes the arguments, or the launch of what it returned before."""

    arg_names = (*ARGUMENTS, "BLOCK_M")

    def __init__(self):
        self.compiled, self.launches = [], []

    def __getitem__(self, grid):
        def run(**arguments):
            self.compiled.append(arguments)
            return Compiled(self.launches)

        return run


def launch(launcher, choice=CHOICE, **changed):
    launcher.configs = lambda *_: [choice]
    launcher(lambda meta: ((2,), ARGUMENTS | changed), X, 16)


@pytest.fixture
def launcher():
    return triton_support.Launcher(Kernel(), None)


def test_the_same_again_is_launched_by_position(launcher):
    launch(launcher)
    launch(launcher, x_ptr=X.clone())
    kernel = launcher.kernel
    assert len(kernel.compiled) == len(kernel.launches) == 1
    grid, values = kernel.launches[0]
    assert grid == (2, 1, 1) and values[0] is not X and values[1:] == (None, 64, True, 16)


@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": None},
        {"x_ptr": X.half()},
        {"x_ptr": X.view(-1)[1:]},
        {"x_desc": triton_support.descriptor(X, 16, 16)},
        {"M": 1},
        {"M": 65},
        {"M": 64.0},
        {"FLAG": 1},
        {"choice": triton_support.config(8, 3, BLOCK_M=16)},
        {"choice": triton_support.config(4, 2, BLOCK_M=16)},
        {"choice": triton_support.config(4, 3, BLOCK_M=32)},
    ],
    ids=str,
)
def test_what_triton_tells_apart_is_compiled_anew(launcher, changed):
    launch(launcher)
    launch(launcher, **changed)
    assert len(launcher.kernel.compiled) == 2 and not launcher.kernel.launches


@pytest.mark.parametrize("block", [(16, 32), (32, 16)], ids=str)
def test_descriptors_are_told_apart_by_block_and_dtype(launcher, block):
    launch(launcher, x_desc=triton_support.descriptor(X, 16, 16))
    launch(launcher, x_desc=triton_support.descriptor(X, *block))
    launch(launcher, x_desc=triton_support.descriptor(X.half(), 16, 16))
    assert len(launcher.kernel.compiled) == 3


def test_it_keeps_few(launcher, monkeypatch):
    monkeypatch.setattr(triton_support, "_KEPT", 3)
    for m in range(2, 12):
        launch(launcher, M=m)
        assert len(launcher._compiled) <= 3


@pytest.fixture
def like(monkeypatch):
    """As much of a tensor on a GPU as a launcher asks for."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return SimpleNamespace(
        device=X.device, dtype=X.dtype, is_cuda=True, element_size=X.element_size
    )  # fmt: skip


@pytest.fixture
def clock(launcher, monkeypatch):
    """Three candidates, and what is asked of the clock, which prefers the last."""
    launcher.configs = lambda *_: [
        triton_support.config(4, stages, BLOCK_M=16) for stages in (1, 2, 3)
    ]
    monkeypatch.setattr(triton_support, "compile_together", lambda kernel, calls: None)
    asked = []

    def bench(run, **_):
        asked.append(run.keywords["num_stages"])
        return 1 / asked[-1]

    monkeypatch.setattr(triton.testing, "do_bench", bench)
    return asked


def stages_of(launcher, like, calls=1):
    """The candidate that each call takes."""
    taken = []
    launcher._start = lambda grid, arguments, options, device: taken.append(options["num_stages"])
    for _ in range(calls):
        launcher(lambda meta: ((2,), ARGUMENTS), like, 16)
    return taken


def test_a_clock_without_room_leaves_the_default(launcher, like, monkeypatch, clock):
    """Once: to try again would empty the allocator in every call."""

    def full(run, **_):
        clock.append(run.keywords["num_stages"])
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton.testing, "do_bench", full)
    assert stages_of(launcher, like, 3) == [1, 1, 1] and clock == [1, 2, 3]


def test_where_bits_must_repeat_no_clock_chooses(launcher, like, clock):
    torch.use_deterministic_algorithms(True)
    try:
        assert stages_of(launcher, like) == [1] and not clock
    finally:
        torch.use_deterministic_algorithms(False)
    assert stages_of(launcher, like) == [3]
    torch.use_deterministic_algorithms(True)
    try:  # nor what one has chosen before
        assert stages_of(launcher, like) == [1]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("count", [1, 3])
def test_on_a_gpu_candidates_compile_before_they_are_timed(launcher, like, monkeypatch, count):
    candidates = [triton_support.config(4, s, BLOCK_M=16) for s in range(1, 1 + count)]
    launcher.configs = lambda *_: candidates
    did = []

    def compiles(kernel, calls):
        assert kernel is launcher.kernel
        did.append([(grid, arguments["num_stages"], arguments["M"]) for grid, arguments in calls])

    def fastest(prepared, found):
        did.append("timed")
        return found[-1]

    monkeypatch.setattr(triton_support, "compile_together", compiles)
    monkeypatch.setattr(triton_support, "fastest", fastest)
    for _ in range(2):  # the second call has the choice of the first
        launcher(lambda meta: ((2,), ARGUMENTS), like, 16)
    together = [[((2,), s, 64) for s in range(1, 1 + count)]] if count > 1 else []
    assert did == [*together, "timed"]
    assert [run["num_stages"] for run in launcher.kernel.compiled] == [count]


@pytest.fixture
def launched(monkeypatch):
    """Of each launch the kernel's name, the key of its choice, its candidates and its arguments."""
    found = []

    def note(self, plan, like, fixed_block, *key):
        candidates = self.candidates(like, fixed_block)
        _, arguments = plan(candidates[0].meta)
        full_key = (self, fixed_block, *key)
        found.append((self.kernel.__name__, full_key, tuple(candidates), arguments))

    monkeypatch.setattr(triton_support.Launcher, "__call__", note)
    return found


@pytest.mark.parametrize("head_dim, most", limits.KEY_LIMITS)
@pytest.mark.parametrize("mask", ["", "key", "query"])
def test_texts_share_a_choice_where_their_blocks_are_the_same(head_dim, most, mask, launched):
    q, da = torch.zeros(1, 3, head_dim), torch.zeros(3, 4)
    lists = {}
    for keys in range(1, most + 1):
        k = torch.zeros(1, keys, head_dim)
        shape = dict(key=(1, 1, 1, keys), query=(1, 1, 3, keys)).get(mask)
        given = None if shape is None else torch.zeros(shape)
        launched.clear()
        attention_grads(q[0], da, torch.zeros(4, head_dim), q, k, k, given, 1, 1.0, True)
        for name, key, candidates, arguments in launched:
            # each kernel's own constants: what a choice is compiled with
            blocks = tuple(v for a, v in arguments.items() if a in ("COUNT_N", "TAIL_N", "BLOCK_N"))
            assert lists.setdefault((name, key), (candidates, blocks)) == (candidates, blocks)
            if name == "query_grad_kernel":
                n = tiles_triton.key_meta(keys)
                assert blocks == tuple(n.values())
                assert keys <= n["BLOCK_N"] * n["COUNT_N"] + n["TAIL_N"]
    assert len(lists) < 2 * 20


def test_a_weight_and_its_transpose_are_timed_apart(launched):
    x, s, w = torch.zeros(8, 32), torch.zeros(8, 16), torch.zeros(32, 32)
    for weight in (w, w.t()):
        concat_gemm(x, weight, s, torch.zeros(16, 32))
    assert launched[0][1] != launched[1][1]


class Chip:
    """As much of a driver as a compiler asks for."""

    def get_current_device(self):
        return 77

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)


@triton.jit
def doubled_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(x_ptr + offs, 2 * x, mask=offs < N)


@pytest.fixture
def compiles(monkeypatch, tmp_path):
    """A function that has blocks of these sizes compiled; what is done by each compile."""
    if triton_interpreted():
        pytest.skip("under TRITON_INTERPRET kernels are not compiled")
    real = triton.compiler.compile
    does = []

    def compile(*args, **options):
        for act in does:
            act()
        return real(*args, **options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.compiler, "compile", compile)
    monkeypatch.setattr(triton.runtime.driver, "_active", Chip())

    def run(*blocks):
        calls = [dict(x_ptr=X, N=64, BLOCK=block, **CHOICE.options) for block in blocks]
        triton_support.compile_together(doubled_kernel, [((1,), call) for call in calls])

    yield run, does
    doubled_kernel.device_caches.pop(77, None)


def test_candidates_are_compiled_side_by_side_and_once(compiles):
    run, does = compiles
    # each waits for the other two, which one after the other would never come
    does += [threading.Barrier(3, timeout=60).wait]
    run(16, 32, 64)
    does[:] = [lambda: pytest.fail("compiled again")]
    run(16, 32, 64)
    run(64)


def test_what_a_compiler_says_of_one_is_heard(compiles):
    run, does = compiles

    def refuse():
        raise RuntimeError("no such instruction")

    does.append(refuse)
    with pytest.raises(RuntimeError, match="no such instruction"):
        run(128, 256)
    does.clear()
    run(128, 256)
