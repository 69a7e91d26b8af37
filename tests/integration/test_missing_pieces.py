"""The import works, and the reference runs, with Triton, diffusers and the library missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys

MISSING = {"triton", "diffusers", "peft", "accelerate", "xformers"}

class Without:
    #A finder that does not find what is to be missing

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import torch
import a3fta_kernels as a3fta
from pathlib import Path

module = sys.modules["a3fta_kernels.backends"]
module.Path = lambda *_: Path("/nowhere/a3fta_kernels/backends.py")

status = a3fta.backends()
assert status["reference"].available
for name in ("triton", "native", "xformers"):
    reason = status[name].reason
    assert not status[name].available, name
    assert ("not built" if name == "native" else "not installed") in reason, reason

torch.manual_seed(0)
h = torch.randn(2, 5, 8, requires_grad=True)
w_down = torch.randn(3, 8, requires_grad=True)
w_up = torch.randn(8, 3, requires_grad=True)
weight, bias = torch.randn(6, 8), torch.randn(6)
expected_h = h + 0.5 * torch.nn.functional.gelu(h @ w_down.T) @ w_up.T
expected = expected_h @ weight.T + bias
for backend in ("auto", "reference"):
    adapted = a3fta.ops.adapter(h, w_down, w_up, scale=0.5, backend=backend)
    y = a3fta.ops.adapter_linear(h, w_down, w_up, weight, bias, scale=0.5, backend=backend)
    torch.testing.assert_close(adapted, expected_h)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (h, w_down, w_up))
for backend in ("triton", "native"):
    try:
        a3fta.ops.adapter(h, w_down, w_up, backend=backend)
    except a3fta.BackendUnavailableError as error:
        assert "not installed" in str(error) or "not built" in str(error)
    else:
        raise AssertionError(f"{backend} ran")
assert a3fta.AdapterConfig(rank=4).rank == 4
blocked = [name for name in sys.modules if name.partition(".")[0] in {"triton", "diffusers"}]
assert not blocked, blocked
try:
    a3fta.inject(torch.nn.Linear(4, 4), a3fta.AdapterConfig(rank=2))
except (ImportError, ValueError) as error:
    assert "diffusers" in str(error), error
else:
    raise AssertionError("inject ran on a model without attention")
print("all of it ran")
"""


def test_import_and_reference_without_the_optional_pieces():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all of it ran"


def test_import_loads_none_of_them():
    """Not even where they are installed."""
    code = (
        "import sys, a3fta_kernels;"
        "print(sorted({n.partition('.')[0] for n in sys.modules}"
        " & {'triton', 'diffusers', 'peft', 'accelerate', 'xformers', 'transformers'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
