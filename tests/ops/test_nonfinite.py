"""An infinity or a NaN reaches what depends on it, and nothing that merely shares its tile.

What depends is what eager PyTorch makes non-finite on the same inputs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from a3fta_kernels import ops

from ..oracle import (
    Case,
    gradient,
    reference_adapter,
    reference_adapter_linear,
    run_id,
    triton_runs,
    with_paths,
)

RUNS = pytest.mark.parametrize("run", triton_runs(), ids=run_id)
# a sign would change nothing: the activation is the identity
VALUES = pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)

# identity: an infinite z has a finite slope, so that gradients stay apart by row and column
ADAPTER = Case((2, 37), 70, 5, activation="identity", modulation="gamma", biases=False)
LINEAR = Case((2, 37), 72, 8, n=88, activation="identity", biases=False, residual=True)
SLICED = Case((2, 37), 40, 5, n=88, columns=(72, 160), activation="identity", biases=False)
RAGGED = Case((2, 37), 41, 5, n=88, columns=(70, 150), activation="identity", biases=False)
CASES = pytest.mark.parametrize("case", [ADAPTER, LINEAR, SLICED, RAGGED], ids=str)


def non_finite(op, inputs, dy) -> dict[str, torch.Tensor]:
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    y = op(**inputs)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"y": y, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}
    return {name: ~tensor.isfinite() for name, tensor in found.items()}


def check(case: Case, run, inputs, dy) -> dict[str, torch.Tensor]:
    """Every path against eager; returns eager's masks."""
    linear = case.n is not None
    expected = non_finite(reference_adapter_linear if linear else reference_adapter, inputs, dy)
    for one in with_paths(case, run):
        options = {"backend": run[0]} | ({"path": one.path} if linear else {})
        op = ops.adapter_linear if linear else ops.adapter
        found = non_finite(lambda **kw: op(**kw, **options), inputs, dy)  # noqa: B023
        for name, mask in expected.items():
            wrong = (found[name] != mask).nonzero().tolist()
            assert not wrong, f"path {one.path}: {name} differs at {wrong[:5]}, of {len(wrong)}"
    return expected


def drawn(case: Case, run):
    inputs = case.inputs(run[2], run[1])
    dy = gradient(torch.Size((*case.lead, case.n or case.c)), run[2], run[1], "plain", 0)
    return inputs, dy


@RUNS
@VALUES
@CASES
def test_in_h(case, value, run):
    """In the adapter's columns: y's row, dw_up, and one column of dw_down."""
    inputs, dy = drawn(case, run)
    start = case.columns[0] if case.columns else 0
    inputs["h"].data[1, 3, start + 2] = value
    found = check(case, run, inputs, dy)
    assert found["y"].flatten(0, 1).any(1).nonzero().flatten().tolist() == [40]
    assert found["dw_down"].any(0).nonzero().flatten().tolist() == [2]
    assert not found["dh"].any()


@RUNS
@VALUES
@pytest.mark.parametrize("case", [SLICED, RAGGED], ids=str)
@pytest.mark.parametrize("side", [-1, 1])
def test_in_h_beside_the_slice(case, side, value, run):
    """y's row by the frozen product; the adapter and every gradient are free of it."""
    inputs, dy = drawn(case, run)
    start, length = case.columns[0], case.c
    inputs["h"].data[0, 5, start - 1 if side < 0 else start + length] = value
    found = check(case, run, inputs, dy)
    assert found.pop("y").flatten(0, 1).any(1).nonzero().flatten().tolist() == [5]
    assert not any(mask.any() for mask in found.values())


@RUNS
@VALUES
@CASES
def test_in_dy(case, value, run):
    """dh's row, and every weight gradient; of the modulation that of one sample."""
    inputs, dy = drawn(case, run)
    dy[1, 36, 4] = value
    found = check(case, run, inputs, dy)
    assert found["dh"].flatten(0, 1).any(1).nonzero().flatten().tolist() == [73]
    if "dgamma" in found:
        assert found["dgamma"].any(1).nonzero().flatten().tolist() == [1]


@RUNS
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_through_every_activation(activation, run):
    """A NaN is lost in none, and what its row alone depends on stays its row."""
    for case in (replace(ADAPTER, activation=activation), replace(RAGGED, activation=activation)):
        inputs, dy = drawn(case, run)
        inputs["h"].data[0, 7, 5 + (case.columns[0] if case.columns else 0)] = torch.nan
        found = check(case, run, inputs, dy)
        assert found["y"].flatten(0, 1).any(1).nonzero().flatten().tolist() == [7]
