"""The package from outside: its names, what an import of it costs and what it can do without."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import a3fta_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "a3fta_kernels"


def fresh(code: str, cwd: Path, *options: str) -> str:
    """What `code` prints in an interpreter of its own that sees the package in `cwd` first."""
    done = subprocess.run(
        [sys.executable, *options, "-c", f"import sys; sys.path.insert(0, {str(cwd)!r})\n{code}"],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_cheap():
    code = """
import torch
before = set(sys.modules)
import a3fta_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(new & {"triton", "diffusers", "peft", "transformers", "xformers", "safetensors",
                     "rich", "matplotlib", "sklearn", "numpy"}))
"""
    assert fresh(code, ROOT) == ""


BARE = """
import importlib.util
from importlib.machinery import PathFinder

HIDDEN = {"triton", "diffusers", "peft", "safetensors", "xformers", "flash_attn_interface"}

class Missing(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

sys.meta_path = [Missing if finder is PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("triton") is None
import torch
import a3fta_kernels as a3fta

assert a3fta.__file__.startswith(sys.path[0]), a3fta.__file__
found = a3fta.backends()
assert [name for name, status in found.items() if status.available] == [
    "reference", "sdpa", "flash"
], found
h, w_down, w_up, weight = (
    torch.randn(*shape, requires_grad=i < 3)
    for i, shape in enumerate([(2, 5, 16), (4, 16), (16, 4), (12, 16)])
)
y = a3fta.ops.adapter_linear(h, w_down, w_up, weight)
y.square().sum().backward()
assert y.shape == (2, 5, 12) and all(t.grad.isfinite().all() for t in (h, w_down, w_up))
try:
    a3fta.ops.adapter(h, w_down, w_up, backend="native")
except a3fta.BackendUnavailableError as error:
    assert "not built" in str(error), error
else:
    raise SystemExit("native ran without its library")
a3fta.AdapterConfig(rank=4)
print("reference ran")
"""


def test_reference_runs_with_everything_optional_missing(tmp_path):
    copy = tmp_path / "a3fta_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
    assert fresh(BARE, tmp_path) == "reference ran"


# the contract with users, whole: a name leaves it with a major version
PUBLIC = {
    "AdaptedProjection",
    "AdapterConfig",
    "AdapterFileError",
    "BackendStatus",
    "BackendUnavailableError",
    "Captured",
    "InjectionReport",
    "LeanReport",
    "adapters_per_sample",
    "attn_processors",
    "backends",
    "disable_adapters",
    "disabled",
    "eject",
    "enable_adapters",
    "export_lora",
    "freeze_for_inference",
    "fuse_qkv",
    "inject",
    "lean",
    "load_adapter",
    "memory",
    "merge",
    "ops",
    "processors",
    "projections",
    "save_adapter",
    "set_adapters",
    "set_attention",
    "set_trainable",
    "trainable_parameters",
    "unfreeze",
    "unfuse_qkv",
    "unmerge",
}


def test_the_public_names_stand():
    assert set(a3fta_kernels.__all__) == PUBLIC
    for name in a3fta_kernels.__all__:
        assert getattr(a3fta_kernels, name) is not None
    assert set(a3fta_kernels.__all__) <= set(dir(a3fta_kernels))
    assert callable(a3fta_kernels.ops.adapter) and callable(a3fta_kernels.ops.adapter_linear)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = a3fta_kernels.nothing


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(x for x in tree.body if isinstance(x, ast.If))
    seen = {a.name for x in block.body if isinstance(x, ast.ImportFrom) for a in x.names}
    assert seen == set(a3fta_kernels.__all__)


def test_a_submodule_does_not_hide_the_function_of_its_name():
    first = "import a3fta_kernels.backends as _, a3fta_kernels as a3fta\n"
    assert fresh(first + "print(type(a3fta.backends).__name__)", ROOT) == "function"
    # what an import does at its end: a process that imports this one imports diffusers
    module = import_module("a3fta_kernels.inject")
    a3fta_kernels.inject = module
    assert a3fta_kernels.inject is module.inject
