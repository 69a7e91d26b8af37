# mypy: allow-untyped-defs
"""What the Triton kernels share: device functions, tile configurations, and the launch.

Imported by `triton.py` modules only. A kernel's configurations are a function of dtype, compute
capability and the block size that the problem fixes (BLOCK_R for the rank, a norm's row), so that
one list serves three uses: the launch picks the fastest of it on a GPU, the interpreter takes its
first, and `benchmarks/aot.py` compiles all of it.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .backends import triton_interpreted

INTERPRETED: tl.constexpr = tl.constexpr(triton_interpreted())

# the order of ops/activations.ACTIVATIONS
IDENTITY: tl.constexpr = tl.constexpr(0)
RELU: tl.constexpr = tl.constexpr(1)
GELU: tl.constexpr = tl.constexpr(2)
GELU_TANH: tl.constexpr = tl.constexpr(3)

GROUP_M: tl.constexpr = tl.constexpr(8)
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
RSQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)
# (1 + tanh(u)) / 2 = sigmoid(2u), so tanh GELU is a * sigmoid(a * (LINEAR + CUBIC * a * a))
TANH_LINEAR: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_CUBIC: tl.constexpr = tl.constexpr(0.07135481627260025)  # 0.044715 of that


@triton.jit
def dot(x, y, acc):
    """acc + x @ y in fp32. The interpreter computes bf16 products wrongly, hence the upcast."""
    if INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest even; the interpreter cuts bf16 off, and has none of fp64."""
    if x.dtype != dtype and dtype != tl.float64:
        x = x.to(tl.float32)
        if INTERPRETED and dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN stays
    return x.to(dtype)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(a, ACT: tl.constexpr):
    """act(a) for a in fp32."""
    if ACT == IDENTITY:
        return a
    elif ACT == RELU:
        return tl.where(a < 0, 0.0, a)  # keeps NaN, as PyTorch does
    elif ACT == GELU:
        return 0.5 * a * (1.0 + tl.math.erf(a * SQRT_HALF))
    elif ACT == GELU_TANH:
        return a * sigmoid(a * (a * a * TANH_CUBIC + TANH_LINEAR))
    else:
        return a * sigmoid(a)


@triton.jit
def activate_slope(a, ACT: tl.constexpr):
    """act'(a) for a in fp32."""
    if ACT == IDENTITY:
        return tl.full(a.shape, 1.0, tl.float32)
    elif ACT == RELU:
        return tl.where(a > 0, 1.0, 0.0)
    elif ACT == GELU:
        cdf = 0.5 * (1.0 + tl.math.erf(a * SQRT_HALF))
        return cdf + a * RSQRT_2PI * tl.exp(-0.5 * a * a)
    elif ACT == GELU_TANH:
        s = sigmoid(a * (a * a * TANH_CUBIC + TANH_LINEAR))
        return s + a * s * (1.0 - s) * (a * a * (3.0 * TANH_CUBIC) + TANH_LINEAR)
    else:
        s = sigmoid(a)
        return s * (1.0 + a * (1.0 - s))


@triton.jit
def load_modulation(ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R):
    """gamma or beta (B, R), seen by the rows offs_m: (BLOCK_M, BLOCK_R) in fp32."""
    offsets = (offs_m // rows_per_sample).to(tl.int64)[:, None] * R + offs_r[None, :]
    return tl.load(ptr + offsets, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)


@triton.jit
def modulated(
    a, gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R, ACT: tl.constexpr
):
    """z = act(a) * (1 + gamma) + beta in fp32; either of gamma and beta may be None."""
    z = activate(a, ACT)
    if gamma_ptr is not None:
        gamma = load_modulation(gamma_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R)
        z = z * (1.0 + gamma)
    if beta_ptr is not None:
        z += load_modulation(beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R)
    return z


@triton.jit
def grouped_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile (pid_m, pid_n): neighbours share rows, so that L2 serves both inputs."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = (pid // (GROUP_M * tiles_n)) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height


class Config(NamedTuple):
    """The tile sizes of one build of a kernel."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @property
    def meta(self) -> dict[str, int]:
        return dict(self.blocks)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler takes beside the tile sizes; fused multiply-adds are said outright,
        as Triton's default for them changes between versions."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)

    def __str__(self) -> str:
        tiles = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in self.blocks)
        return f"{tiles} w{self.num_warps} s{self.num_stages}"


def config(num_warps: int, num_stages: int, **blocks: int) -> Config:
    return Config(tuple(blocks.items()), num_warps, num_stages)


class Chip(NamedTuple):
    """What the choice of tiles depends on."""

    capability: int  # 90 for sm_90
    processors: int


# bytes of shared memory one block may take; other chips get the smallest
_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
TARGETS = (80, 89, 90, 100, 120)


def shared_limit(capability: int) -> int:
    return _SHARED.get(capability, 99) * 1024


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return Chip(80, 2)  # interpreted: few processors, so that sums still have several parts
    major, minor = torch.cuda.get_device_capability(device)
    return Chip(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


# triton.cdiv and triton.next_power_of_2 take 2 us each on the host, sixty times what these do
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The first one from n >= 1 on."""
    return 1 << (n - 1).bit_length()


MAX_BLOCK_R = 128  # a larger rank is cut into blocks by the grid


def rank_block(rank: int, largest: int = MAX_BLOCK_R) -> int:
    """BLOCK_R: the rank padded to a power of two that tensor cores take."""
    return min(largest, max(16, power_of_2(rank)))


def descriptors_fit(device: torch.device, *matrices: Tensor | None) -> bool:
    """Whether tensor descriptors (TMA) can serve these matrices; None always fits.

    They need sm_90, and rows without gaps that begin at multiples of 16 bytes. Elements are of 16
    bits: the kernels that use descriptors are for tensor cores.
    """
    if chip(device).capability < 90:
        return False
    for x in matrices:
        if x is None:
            continue
        rows, columns = x.shape
        stride, unit = x.stride()
        fits = x.element_size() == 2 and rows > 0 and columns > 0 and unit == 1
        fits = fits and columns <= stride < 2**38 and stride % 8 == 0
        if not fits or x.data_ptr() % 16 != 0:
            return False
    return True


def descriptor(x: Tensor | None, *block: int) -> TensorDescriptor | None:
    """Of a matrix for which `descriptors_fit`, read or written in blocks of this shape."""
    return None if x is None else TensorDescriptor(x, x.shape, x.stride(), block)


Call = tuple[tuple[int, ...], dict[str, Any]]  # a grid, and a kernel's arguments
Plan = Callable[[dict[str, int]], Call]  # tile sizes -> the call


@dataclass(frozen=True)
class AotKernel:
    """How to build a kernel where no GPU is.

    `pointers` names the Triton type of each pointer argument that is not of the op's own dtype, and
    of each number that is no integer.
    `variants` are the sets of pointers that are None and of constants beside the tile sizes; an
    argument named `_desc` is given the names of its block's sizes. `targets` and `dtypes` are
    those that it is launched on, `fixed_blocks` some of the sizes that problems fix; `suits` says
    which configurations a variant may take, and `launchers` are those of variants whose
    configurations are not `launcher`'s. `products`: whether it multiplies matrices, for which it is
    held to tensor cores in half precision.
    """

    launcher: Launcher
    pointers: dict[str, str]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"all": {}})
    fixed_blocks: tuple[int, ...] = (16, 64, 128)
    targets: tuple[int, ...] = TARGETS
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    suits: Callable[[str, Config], bool] = lambda variant, choice: True
    launchers: dict[str, Launcher] = field(default_factory=dict)
    products: bool = True

    @property
    def by_descriptors(self) -> bool:
        return any(name.endswith("_desc") for name in self.launcher.kernel.arg_names)

    def launcher_of(self, variant: str) -> Launcher:
        return self.launchers.get(variant, self.launcher)


_KEPT = 1024  # compiled kernels of a launcher, by the traits of their arguments


class Launcher:
    """A kernel with its configurations: picks one and launches.

    `configs(bytes per element, fixed block, capability)` lists them, the default first. The first
    call for a key compiles all of them on a GPU, side by side, and times them; a capturing stream,
    the interpreter and `torch.use_deterministic_algorithms` take the default.
    """

    def __init__(self, kernel: Any, configs: Callable[[int, int, int], list[Config]]) -> None:
        self.kernel = kernel
        self.configs = configs
        self._chosen: dict[tuple, Config] = {}
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __call__(self, plan: Plan, like: Tensor, fixed_block: int, *key: Any) -> None:
        """Launches on `like`'s device what `plan(tile sizes)` returns: a grid and the arguments.

        `fixed_block` is the block size that the problem fixes, 0 where it fixes none; `key` what
        else the best tiles depend on. The last plan asked for is the one whose results stand; a
        kernel overwrites its outputs, as it may run often.
        """
        device = like.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(plan, like, fixed_block, key)
        else:
            self._launch(plan, like, fixed_block, key)

    def candidates(self, like: Tensor, fixed_block: int) -> list[Config]:
        return self.configs(like.element_size(), fixed_block, chip(like.device).capability)

    def _launch(self, plan: Plan, like: Tensor, fixed_block: int, key: tuple) -> None:
        def call(choice: Config) -> Call:
            grid, arguments = plan(choice.meta)
            return grid, arguments | choice.meta | choice.options

        def prepared(choice: Config) -> Callable[[], Any]:
            grid, arguments = call(choice)
            return functools.partial(self.kernel[grid], **arguments)

        full_key = (like.device, like.dtype, fixed_block, *key)
        # tiles set the order of sums, and a clock does not always choose the same
        by_clock = not torch.are_deterministic_algorithms_enabled()
        choice = self._chosen.get(full_key) if by_clock else None
        if choice is None:
            candidates = self.candidates(like, fixed_block)
            choice = candidates[0]
            if by_clock and like.is_cuda and not torch.cuda.is_current_stream_capturing():
                if len(candidates) > 1:
                    compile_together(self.kernel, [call(candidate) for candidate in candidates])
                choice = self._chosen[full_key] = fastest(prepared, candidates)
        grid, arguments = plan(choice.meta)
        self._start(grid, arguments | choice.meta, choice.options, like.device)

    def _start(
        self, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any],
        device: torch.device,
    ) -> None:  # fmt: skip
        """`kernel[grid](...)`. What that returned for arguments of the same traits is kept: to find
        it again Triton takes as long as all else in a launch."""
        values = [arguments[name] for name in self.kernel.arg_names]
        traits = (device, *options.values(), *map(_trait, values))
        compiled = self._compiled.get(traits)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*values)
            return
        compiled = self.kernel[grid](**arguments, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter has none
            if len(self._compiled) == _KEPT:
                self._compiled.clear()
            self._compiled[traits] = compiled


def _trait(value: Any) -> Any:
    """What Triton compiles a kernel for, and more: of a number all, where it takes 1 and multiples
    of 16 apart; of a tensor the dtype and the alignment; of a descriptor the block."""
    kind = type(value)
    if kind is int:  # most are
        return value
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    return kind, value


def compile_together(kernel: Any, calls: Sequence[Call]) -> None:
    """Compiles what `kernel[grid](**arguments)` of these calls needs, each in a thread of its own.

    The compiler holds no lock of Python's: all take as long as the slowest, given processors.
    """

    def run() -> None:
        with ThreadPoolExecutor(len(calls)) as pool, triton.AsyncCompileMode(pool):
            for grid, arguments in calls:
                kernel.warmup(grid=grid, **arguments)

    # in a context of its own: up to Triton 3.7 a compile that fails leaves the mode on
    contextvars.copy_context().run(run)


def fastest(prepared: Callable[[Config], Callable[[], Any]], candidates: list[Config]) -> Config:
    """Times each candidate. One that the chip has no room for is passed over, and one whose clock
    finds no memory for its own buffer, as may be at the peak of a step.

    A call is prepared outside the clock, which may tick while the GPU waits for Python.
    """
    if len(candidates) == 1:
        return candidates[0]
    milliseconds = {}
    for candidate in candidates:
        try:
            run = prepared(candidate)
            milliseconds[candidate] = triton.testing.do_bench(run, warmup=5, rep=20)
        except (OutOfResources, torch.OutOfMemoryError):
            continue
    return min(milliseconds, key=milliseconds.__getitem__, default=candidates[0])


def rows_bucket(m: int) -> int:
    """Row counts that share their tiles: retuning for every M would cost more than it gains."""
    return power_of_2(m)


def rows_per_sample(m: int, gamma: Tensor | None, beta: Tensor | None) -> int:
    return next((m // x.shape[0] for x in (gamma, beta) if x is not None), m)
