"""Clocks and counters: interleaved samples, rotated buffers, ceilings, the environment."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[int], Any]  # runs one variant on buffer set i
Clock = Callable[[], float]  # runs it on the next set, or on all, and says the seconds per call

# dispatcher events that move no data, or only by the events below them
_VIEWS = re.compile(
    r"(aten::)?(detach|as_strided|(_unsafe_)?view|reshape|alias|resolve_(conj|neg)|lift_fresh|t"
    r"|transpose|permute|slice|narrow|select|expand(_as)?|unsqueeze|squeeze|(un)?flatten|chunk"
    r"|split|to|contiguous|dropout)"
)
_ALLOCATES = ("aten::empty", "aten::new_empty")


def environment(device: torch.device) -> dict[str, Any]:
    """What a number needs beside it: device, driver, versions, commit."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        nvcc = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
        found |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "driver": query.splitlines()[0] if query else "unknown",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvcc": nvcc[1] if nvcc else "none",
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "cpu"
    match = re.search(r"model name\s*: (.*)", text)
    name = match[1] if match else platform.processor()
    extensions = [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {x}" in text]
    return f"{name} ({', '.join(extensions)})" if extensions else name


def file_stem(device: torch.device) -> str:
    """Results go to results/<stem>.json: "cpu", or the GPU's name in lower case."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def commit() -> str:
    """The commit of the code that runs; "+" where tracked files differ from it."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head[:12] + ("+" if changed else "")


def _version(package: str) -> str:
    try:
        return __import__(package).__version__
    except ImportError:
        return "none"


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: buffers rotate over more than three times this."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        return int(path.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def rotations(set_bytes: int, device: torch.device) -> int:
    """How many buffer sets of `set_bytes` (what one call touches) the calls rotate over."""
    return max(2, min(64, math.ceil(3 * cache_bytes(device) / max(set_bytes, 1)) + 1))


def clock_of(call: Call, sets: int, device: torch.device) -> Clock:
    """A warmed-up function that runs `call` and returns its seconds.

    On the GPU it replays a CUDA graph that holds one call per buffer set.
    """
    return (_graph_clock if device.type == "cuda" else _host_clock)(call, sets)


def interleave(clocks: Mapping[str, Clock], seconds: float) -> dict[str, list[float]]:
    """Samples of every variant: all in one loop, in a fresh random order each round.

    At least 7 rounds, then until `seconds` are over, at most 200. Where so few take ten times as
    long (bf16 on a CPU without it), 3 are enough.
    """
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    order = list(clocks)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for round_ in range(200):
        spent = time.perf_counter() - start
        if (round_ >= 7 and spent > seconds) or (round_ >= 3 and spent > 10 * seconds > 0):
            break
        shuffle(order)
        for name in order:
            samples[name].append(clocks[name]())
    return samples


def _host_clock(call: Call, sets: int) -> Clock:
    for i in range(2):
        call(i % sets)
    turn = iter(range(1 << 62))

    def sample() -> float:
        i = next(turn) % sets
        start = time.perf_counter()
        call(i)
        return time.perf_counter() - start

    return sample


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream() if device.type == "cuda" else None


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Makes `stream` the current one, behind what the device has to do; None changes nothing."""
    if stream is None:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def _graph_clock(call: Call, sets: int) -> Clock:
    for _ in range(3):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        # results stay until the last call, so that each is written to a place of its own
        results = [call(i) for i in range(sets)]
    del results
    graph.replay()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / sets

    # the graph reads what the call holds, such as kept activations, and does not keep it alive
    sample.call = call  # type: ignore[attr-defined]
    return sample


def host_seconds(call: Call, sets: int, device: torch.device) -> float:
    """Seconds per call as a Python loop sees it: on a GPU with every launch's overhead."""
    counts = []
    for _ in range(3):
        start = time.perf_counter()
        for i in range(20):
            call(i % sets)
        if device.type == "cuda":
            torch.cuda.synchronize()
        counts.append((time.perf_counter() - start) / 20)
    return statistics.median(counts)


def enqueue_seconds(call: Call, sets: int) -> float:
    """Seconds that the CPU needs to start one call on an idle GPU: Python, dispatch, launches."""
    counts = []
    for i in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(i % sets)
        counts.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(counts)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches now: a large copy (read + written bytes), square products, and the
    time of a launch."""
    found = {}
    side = 8192 if device.type == "cuda" else 1024
    # few CPUs multiply in fp16, and PyTorch's loop for it takes minutes
    dtypes = (torch.float32, torch.bfloat16, torch.float16)[: 3 if device.type == "cuda" else 2]
    repeats = 10 if device.type == "cuda" else 3
    size = (2 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device, repeats)
    found["copy_bytes_per_s"] = 2 * size / seconds
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        seconds = _best(lambda a=a, b=b: a @ b, device, repeats)
        found[f"{str(dtype).removeprefix('torch.')}_flop_per_s"] = 2 * side**3 / seconds
    found["launch_s"] = launch_seconds(device)
    return found


def launch_seconds(device: torch.device) -> float:
    """What the smallest kernel costs in a CUDA graph; on the CPU, the smallest operator."""
    x = torch.zeros(1, device=device)
    with on_stream(new_stream(device)):
        clock = clock_of(lambda i: x.add_(1), 500, device)
        return statistics.median(clock() for _ in range(200))


def _best(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of `repeats` after two calls of warm-up."""
    counts = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            counts.append(time.perf_counter() - start)
    return statistics.median(counts)


def count(call: Call, device: torch.device, warm: bool = False) -> dict[str, int]:
    """What one call starts: GPU kernels (copies and fills too), or CPU operators that move data.

    It is called once before, unless it is warm.
    """
    # of a GPU its own events alone: those of the CPU take ten seconds to read for a step of SDXL
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CUDA if device.type == "cuda" else kind.CPU]
    if not warm:
        call(0)
    with torch.profiler.profile(activities=activities) as profile:
        call(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profile.events()
    if device.type == "cuda":
        kinds = [e.device_type for e in events]
        return {"kernels": kinds.count(torch.autograd.DeviceType.CUDA)}
    names = [name for e in events if e.cpu_parent is None for name in _working(e)]
    return {"operators": sum(not name.startswith(_ALLOCATES) for name in names)}


def _working(event: Any) -> list[str]:
    """The operators below an event that move data or allocate."""
    below = [name for child in event.cpu_children for name in _working(child)]
    if (
        _VIEWS.fullmatch(event.name)
        or "::" not in event.name
        or event.name.startswith("autograd::")
    ):
        return below
    if all(name.startswith(_ALLOCATES) for name in below):
        return [*below, event.name]
    return below


def saved_bytes(forward: Callable[[], Any], exclude: list[torch.Tensor]) -> int:
    """Bytes that `forward` keeps for its backward, without the tensors of `exclude`."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # an output of its node that comes back as it is would keep that node

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(kept.values())


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that one call takes at its peak beyond what was there; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
