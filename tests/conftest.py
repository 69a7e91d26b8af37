from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# before torch starts its pools: the suite runs beside others on few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS wants this for deterministic mode, which the poisoned-memory fixture uses
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import HealthCheck, settings

from a3fta_kernels.backends import triton_interpreted

torch.set_num_threads(1)
# on a GPU: the same numbers for every size of a batch, in every run
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True

# the interpreter takes most of a second for a case, and draws a sixteenth of them per dtype; on a
# GPU Triton compiles for most cases
_share = 16 if triton_interpreted() else 5 if torch.cuda.is_available() else 1
_cases = int(os.environ.get("A3FTA_FUZZ_CASES", "100")) // _share
settings.register_profile(
    "a3fta",
    max_examples=_cases,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="A3FTA_FUZZ_CASES" not in os.environ,
)
settings.load_profile("a3fta")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device here."""
    return torch.device(request.param)


@pytest.fixture
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """accelerate's state is the process's: one test's precision would decide for all later ones.
    It is cleared before and after the test, and whenever the test calls this."""
    state = pytest.importorskip("accelerate.state")

    def clear() -> None:
        for kept in (state.AcceleratorState, state.GradientState, state.PartialState):
            kept._reset_state()

    clear()
    yield clear
    clear()


@pytest.fixture
def poisoned():
    """Fresh memory comes filled with NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
