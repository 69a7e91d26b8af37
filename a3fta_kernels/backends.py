"""What can run here, and why not: the three op backends and the attention engines.

`reference` is eager PyTorch, `triton` the Triton kernels, `native` the compiled C++/CUDA
library. `resolve` turns "auto" into one of them, once per device and dtype; an explicit name
that cannot run raises `BackendUnavailableError` with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

BACKENDS = ("reference", "triton", "native")
_HALF = (torch.float16, torch.bfloat16)


class BackendUnavailableError(RuntimeError):
    """The named backend cannot run here; the message says why."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend runs here, on which device types, and the reason where it does not."""

    available: bool
    devices: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{', '.join(self.devices) or 'unavailable'}: {self.reason}"


def backends() -> dict[str, BackendStatus]:
    """What is available on this machine, and the reason for what is not.

    Keys: the op backends `reference`, `triton`, `native`, and the attention engines `sdpa`
    (PyTorch's own choice), its kernels `flash`, `cudnn` and `efficient`, `flash3` (the package
    FlashAttention 3) and `xformers`. Whether an engine can run a call depends on that, too.
    """
    cuda = ("cuda",) if torch.cuda.is_available() else ()
    everywhere = BackendStatus(True, ("cpu", *cuda), "part of PyTorch")
    return {
        "reference": everywhere,
        "triton": triton_status(),
        "native": native_status(),
        "sdpa": everywhere,
        **{name: sdpa_kernel_status(name) for name in ("flash", "cudnn", "efficient")},
        "flash3": flash3_status(),
        "xformers": xformers_status(),
    }


@functools.cache
def native_status() -> BackendStatus:
    """Loads the compiled library on the first call."""
    path = Path(__file__).with_name("_C.abi3.so")
    if not path.exists():
        return BackendStatus(
            False, (), f"the compiled library is not built ({path.name}); reinstall with a compiler"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        return BackendStatus(False, (), f"the compiled library does not load: {first}")
    if not torch.ops.a3fta_native.has_cuda():
        return BackendStatus(True, ("cpu",), "compiled library, without CUDA kernels")
    if not torch.cuda.is_available():
        return BackendStatus(True, ("cpu",), "compiled library with CUDA kernels; no GPU here")
    if torch.cuda.get_device_capability() < (8, 0):
        return BackendStatus(True, ("cpu",), f"CUDA kernels need sm_80 or newer; {_capability()}")
    return BackendStatus(True, ("cpu", "cuda"), "compiled library with CUDA kernels")


def load_native() -> None:
    """Makes the compiled library's operators exist, or raises the reason why there are none."""
    status = native_status()
    if not status.available:
        raise BackendUnavailableError(f"backend 'native': {status.reason}")


@functools.cache
def triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, (), "triton is not installed")
    if triton_interpreted():
        return BackendStatus(True, ("cpu",), "interpreter (TRITON_INTERPRET=1), for tests only")
    if not torch.cuda.is_available():
        return BackendStatus(False, (), "triton is installed but no GPU is here")
    if torch.cuda.get_device_capability() < (8, 0):
        return BackendStatus(False, (), f"the Triton kernels need sm_80 or newer; {_capability()}")
    return BackendStatus(True, ("cuda",), "compiled at first use")


def sdpa_kernel_status(name: str) -> BackendStatus:
    """Of one kernel of PyTorch's scaled_dot_product_attention: flash, cudnn or efficient."""
    host = ("cpu",) if name == "flash" else ()
    built = {
        "flash": torch.backends.cuda.is_flash_attention_available,
        "cudnn": torch.backends.cudnn.is_available,
        "efficient": lambda: True,
    }
    if not torch.cuda.is_available():
        reason = "part of PyTorch; no GPU here" if host else "no GPU is here"
    elif not built[name]():
        reason = "this PyTorch is built without it for GPUs"
    elif name != "efficient" and torch.cuda.get_device_capability() < (8, 0):
        reason = f"on GPUs from sm_80; {_capability()}"
    else:
        return BackendStatus(True, (*host, "cuda"), "part of PyTorch")
    return BackendStatus(bool(host), host, reason)


@functools.cache
def flash3_status() -> BackendStatus:
    if importlib.util.find_spec("flash_attn_interface") is None:
        return BackendStatus(False, (), "flash_attn_interface (FlashAttention 3) is not installed")
    try:
        import flash_attn_interface  # noqa: F401
    except Exception as error:  # a broken build raises whatever its extension raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return BackendStatus(False, (), f"installed but unusable: {first}")
    if not torch.cuda.is_available():
        return BackendStatus(False, (), "installed but unusable: no GPU is here")
    return BackendStatus(True, ("cuda",), "FlashAttention 3, without masks, in fp16 and bf16")


@functools.cache
def xformers_status() -> BackendStatus:
    if importlib.util.find_spec("xformers") is None:
        return BackendStatus(False, (), "xformers is not installed")
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a broken build raises whatever its extension raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return BackendStatus(False, (), f"installed but unusable: {first}")
    if not torch.cuda.is_available():
        return BackendStatus(False, (), "installed but unusable: it has no CPU operator")
    return BackendStatus(True, ("cuda",), "memory_efficient_attention")


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_resolved: dict[tuple[str, torch.device, torch.dtype], str] = {}


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs on `device` in `dtype`; "auto" picks the fastest that can.

    Raises ValueError for an unknown name, BackendUnavailableError for one that cannot run here.
    """
    key = (backend, device, dtype)
    if key not in _resolved:
        _resolved[key] = _resolve(backend, device, dtype)
    return _resolved[key]


# torch.compiler.assume_constant_result, less the import of dynamo, which takes two seconds
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "auto":
        order = ("triton", "native") if device.type == "cuda" else ("native",)
        return next((b for b in order if why_not(b, device, dtype) is None), "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend, device, dtype)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} on {device.type}, {dtype}: {reason}")
    return backend


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why `backend` cannot run, or None where it can."""
    if backend == "reference":
        return None
    status = triton_status() if backend == "triton" else native_status()
    if device.type not in status.devices:
        return status.reason
    dtypes = [torch.float32, *_HALF]
    if backend == "native" and device.type == "cpu":
        dtypes.append(torch.float64)
    if dtype not in dtypes:
        return f"it computes in {', '.join(str(d) for d in dtypes)}"
    return None


@functools.cache
def device_class(device: torch.device) -> str:
    """What measurements are kept under: of a GPU "sm_90" and the like, else the device's type."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"this GPU is sm_{major}{minor}"
