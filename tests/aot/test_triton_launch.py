"""What a launcher keeps of Triton's compiled kernels, with a kernel that compiles nothing."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.compiler import CompiledKernel  # noqa: E402

from a3fta_kernels import triton_support  # noqa: E402

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
