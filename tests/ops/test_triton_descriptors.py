"""The GEMM kernels by tensor descriptors (TMA), and where pointers take their place.

The interpreter knows descriptors; here it is told that it is a chip that has them.
"""

from __future__ import annotations

import pytest
import torch

from a3fta_kernels import ops

from ..oracle import Case, check, run_id, triton_runs

HALVES = (torch.bfloat16, torch.float16)
RUNS = pytest.mark.parametrize("run", [r for r in triton_runs() if r[2] in HALVES], ids=run_id)
ANY_RUN = pytest.mark.parametrize("run", triton_runs(), ids=run_id)
PATH_NAMES = ("fused", "concat")
PATHS = pytest.mark.parametrize("path", PATH_NAMES)
BY_POINTERS = {"linear_forward_kernel", "concat_gemm_kernel"}
BY_DESCRIPTORS = {"linear_forward_tma_kernel", "concat_gemm_tma_kernel"}


@pytest.fixture
def gemms(monkeypatch) -> set[str]:
    """The GEMM kernels that a test has launched, on a chip that has descriptors."""
    support = pytest.importorskip("a3fta_kernels.triton_support")
    real, launch = support.chip, support.Launcher._launch
    ran = set()

    def chip(device: torch.device):
        found = real(device)
        if device.type == "cuda" and found.capability < 90:
            pytest.skip(f"sm_{found.capability} has no tensor descriptors")
        return found if device.type == "cuda" else found._replace(capability=90)

    def recorded(self, *arguments):
        name = self.kernel.__name__
        if name in BY_POINTERS | BY_DESCRIPTORS:
            ran.add(name)
        launch(self, *arguments)

    monkeypatch.setattr(support, "chip", chip)
    monkeypatch.setattr(support.Launcher, "_launch", recorded)
    return ran


CASES = [
    Case((1, 1), 8, 8, n=8),
    Case((2, 9), 32, 8, n=16, residual=True, modulation="gamma beta", scale="tensor"),
    # several tiles in every direction, their last ones partly filled
    Case((2, 77), 200, 24, n=264, activation="silu", biases=False),
    # tiles on both sides of the slice, across its edges and inside
    Case((2, 9), 72, 16, n=144, columns=(40, 200), residual=True),
    Case((131,), 136, 64, n=136, columns=(8, 152), modulation="beta"),
    Case((128,), 128, 64, n=128),
    Case((2, 9), 32, 8, n=16, layout="transposed"),
]


@RUNS
@PATHS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case, path, run, gemms, poisoned):
    check(Case(**(case.__dict__ | {"path": path})), run)
    wanted = {"concat_gemm_tma_kernel"} | ({"linear_forward_tma_kernel"} & {NAMES[path]})
    assert gemms == wanted


NAMES = {"fused": "linear_forward_tma_kernel", "concat": "concat_gemm_tma_kernel"}


@RUNS
@pytest.mark.parametrize("kind", ["expanded", "transposed"])
@PATHS
def test_gradients_of_any_stride(kind, path, run, gemms, poisoned):
    check(Case((2, 11), 24, 8, n=24, residual=True, path=path), run, kind)
    assert not gemms & BY_POINTERS


UNFIT = [
    # a row of y, of z, of h and of w_down that is no multiple of 16 bytes; a slice that begins
    # between two
    Case((2, 9), 32, 8, n=20),
    Case((2, 9), 32, 4, n=16),
    Case((2, 9), 36, 8, n=16),
    Case((2, 9), 36, 8, n=16, columns=(8, 48)),
    Case((2, 9), 32, 8, n=16, columns=(12, 48)),
    Case((2, 9), 32, 8, n=16, layout="sliced"),
    Case((2, 0), 32, 8, n=16),
]


@RUNS
@PATHS
@pytest.mark.parametrize("case", UNFIT, ids=str)
def test_what_descriptors_cannot_reach_goes_by_pointers(case, path, run, gemms, poisoned):
    check(Case(**(case.__dict__ | {"path": path})), run)
    assert gemms & BY_POINTERS or 0 in case.lead


@ANY_RUN
@PATHS
def test_fp32_and_older_chips_keep_pointers(path, run, monkeypatch, request):
    if run[2] in HALVES and run[1] == "cuda":
        pytest.skip("on this GPU 16-bit products go by descriptors where it has them")
    if run[2] == torch.float32:
        gemms = request.getfixturevalue("gemms")
        check(Case((2, 9), 32, 8, n=16, path=path), run)
        assert gemms <= BY_POINTERS and gemms
    else:
        support = pytest.importorskip("a3fta_kernels.triton_support")
        inputs = Case((2, 9), 32, 8, n=16).inputs(run[2], run[1])
        h = inputs["h"].detach()[0]
        assert not support.descriptors_fit(h.device, h)
        assert ops.adapter_linear(**inputs, backend="triton", path=path).isfinite().all()


@RUNS
@pytest.mark.parametrize("columns", [(64, 192), (72, 160)], ids=["whole steps", "ragged"])
def test_nan_stays_beside_the_slice(columns, run, gemms):
    """w_down beyond its columns reads as zero, and a NaN must not meet it: 0 * NaN is NaN."""
    inputs = Case((40,), 64, 8, n=32, columns=columns, biases=False).inputs(run[2], run[1])
    start, end = columns[0], columns[0] + 64
    inputs["h"].data[3, start - 1] = inputs["h"].data[5, end] = torch.nan
    leaves = [inputs[k] for k in ("w_down", "w_up", "h")]
    for path in PATH_NAMES:
        y = ops.adapter_linear(**inputs, backend="triton", path=path)
        assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 5]
        dy = torch.ones_like(y)
        assert all(g.isfinite().all() for g in torch.autograd.grad(y, leaves, dy))
    assert gemms == BY_DESCRIPTORS
