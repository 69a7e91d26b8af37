"""The Triton kernels past the sizes that one program, one block of ranks or one sum takes."""

from __future__ import annotations

import pytest
import torch

from ..oracle import IN_ORDER, Case, check, run_id, triton_runs, with_paths

RUNS = triton_runs()

CASES = [
    # rows enough that the weight gradients are sums of several parts
    Case((2, 300), 40, 8, modulation="gamma beta", scale="tensor"),
    # ranks that the grid cuts into blocks, the last of them partly filled
    Case((3, 11), 40, 140, modulation="gamma beta", activation="silu"),
    Case((20,), 40, 300),
    # several tiles in every direction
    Case((150,), 200, 70),
    # tiles before, across, inside and behind the slice of columns
    Case((2, 70), 100, 20, n=150, columns=(70, 330), residual=True, modulation="beta"),
    Case((2, 9), 70, 130, n=140, columns=(33, 180), residual=True, modulation="gamma"),
    Case((9,), 20, 260, n=48, columns=(1, 40)),
]


@pytest.mark.parametrize("run", RUNS, ids=run_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, run, poisoned):
    for one in with_paths(case, run):
        check(one, run)


@IN_ORDER
@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_twice_the_same_bits(run):
    """Sums over rows are added in a fixed order: no atomics."""
    from a3fta_kernels import ops

    def gradients() -> tuple[torch.Tensor, ...]:
        inputs = Case((2, 300), 40, 8, modulation="gamma beta").inputs(run[2], run[1])
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        return torch.autograd.grad(ops.adapter(**inputs, backend="triton").sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
