"""Every configuration that a launch may pick is right, not the fastest alone."""

from __future__ import annotations

import pytest
import torch

from a3fta_kernels.backends import triton_interpreted, why_not

from ..oracle import Case, check, with_paths

if why_not("triton", torch.device("cuda"), torch.float32) or triton_interpreted():
    pytest.skip("configurations are told apart on a GPU alone", allow_module_level=True)

from a3fta_kernels import triton_support

CASES = [
    Case((2, 150), 320, 64),
    Case((1, 130), 200, 16, activation="silu", modulation="gamma beta"),
    Case((2, 90), 136, 100),
    Case((2, 150), 320, 64, 200, residual=True),
    Case((2, 90), 320, 64, 200, adapter_dtype=torch.float32),
    Case((1, 130), 192, 16, 320, scale=0.5, columns=(64, 320)),
    Case((2, 140), 128, 33, bank=2),
    Case((2, 70), 80, 64, 80, heads=1, keys=77),
    Case((1, 70), 80, 64, 80, heads=1, keys=64, mask="add b n", text=False),
    Case((1, 70), 64, 64, 64, heads=1, keys=77, mask="bool b m n"),
    Case((1, 70), 160, 16, 96, heads=4, keys=50),
    Case((1, 40), 256, 64, 96, heads=2, keys=200),
    Case((1, 40), 160, 8, 96, heads=1, keys=150),
]
MOST = 8  # configurations of one launch


@pytest.fixture(params=range(MOST))
def turn(request, monkeypatch):
    """Each launch takes its configuration of this number, counted round."""
    longest = []

    def pick(prepared, candidates):
        longest.append(len(candidates))
        return candidates[request.param % len(candidates)]

    monkeypatch.setattr(triton_support, "fastest", pick)
    # nothing chosen before or here stays
    never = property(lambda self: {}, lambda self, value: vars(self).update(_chosen=value))
    monkeypatch.setattr(triton_support.Launcher, "_chosen", never, raising=False)
    yield
    assert not longest or max(longest) <= MOST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_configuration_is_right(case, dtype, turn, poisoned):
    if case.heads and dtype == torch.float32:
        pytest.skip("computed by other kernels")
    run = ("triton", "cuda", dtype)
    for variant in with_paths(case, run):
        check(variant, run)
