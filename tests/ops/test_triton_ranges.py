"""Sizes at the edges: offsets past 2^31 elements, tiles partly filled, rows around each choice."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from a3fta_kernels.ops.adapter import contract as adapter_contract
from a3fta_kernels.ops.adapter_linear import choice, contract

from ..oracle import Case, check, run_id, triton_runs, with_paths

RUNS = triton_runs()
EACH = pytest.mark.parametrize("run", RUNS, ids=run_id)
HALF = [r for r in RUNS if r[2] == torch.bfloat16]
ON_CPU = [r for r in HALF if r[1] == "cpu"]

M, STRIDE = 5, 2**29 + 16  # the last row begins past 2^31 elements


def far(x: Tensor) -> Tensor:
    """The same rows, STRIDE elements apart, in a sparse file of which only they exist."""
    size = ((x.shape[0] - 1) * STRIDE + x.shape[1]) * x.element_size()
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        flat = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=x.dtype)
    rows = flat.as_strided(x.shape, (STRIDE, 1))
    rows.copy_(x)
    assert rows.stride(0) * (len(rows) - 1) > 2**31
    return rows


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def same(ours: tuple, expected: tuple) -> None:
    for a, b in zip(ours, expected, strict=True):
        if b is not None:
            assert torch.equal(a, b) and b.isfinite().all()


@pytest.fixture(params=[80, 90], ids=["pointers", "descriptors"])
def capability(request, monkeypatch):
    support = pytest.importorskip("a3fta_kernels.triton_support")
    chip = support.chip(torch.device("cpu"))._replace(capability=request.param)
    monkeypatch.setattr(support, "chip", lambda device: chip)


@pytest.mark.parametrize("run", ON_CPU, ids=run_id)
class TestFarRows:
    def test_adapter(self, run):
        h, dy, w_down, w_up = draw(M, 24), draw(M, 24), draw(8, 24), draw(24, 8)
        module = adapter_contract.backend_module("triton")

        def both(place):
            y, a = module.forward(place(h), w_down, w_up, None, None, None, None, None, "gelu")
            grads = module.backward(
                place(dy), place(h), a, w_down, w_up, None, None, "gelu", False, True, True
            )
            return y, a, *grads

        same(both(far), both(lambda x: x))

    @pytest.mark.parametrize("path", contract.PATHS)
    def test_adapter_linear(self, path, run, capability):
        h, dy, residual = draw(M, 24), draw(M, 16), draw(M, 16)
        weight, w_down, v = draw(16, 24), draw(8, 24), draw(16, 8)
        # the weight's rows are the outputs: few, so they may lie apart as well
        weight = weight[:M]
        dy, residual, v = dy[:, :M], residual[:, :M], v[:M]
        module = contract.backend_module("triton")

        def both(place):
            y, a = module.forward(
                place(h), place(weight), None, w_down, v, None, None, None, place(residual), 0,
                "gelu", path,
            )  # fmt: skip
            grads = module.backward(
                place(dy), place(h), a, place(weight), w_down, v, None, None, 0, "gelu", path,
                True, True,
            )  # fmt: skip
            return y, a, *grads

        same(both(far), both(lambda x: x.contiguous()))

    def test_by_descriptors(self, run, capability):
        """Sizes that descriptors take, so that both kinds of address meet far rows."""
        h, weight, w_down, v = draw(M, 24), draw(16, 24), draw(8, 24), draw(16, 8)
        residual = draw(M, 16)
        module = contract.backend_module("triton")
        for path in ("fused", "concat"):
            for start, w in ((0, w_down), (8, w_down[:, :8].contiguous())):
                arguments = (weight, None, w, v, None, None, None)
                near = module.forward(h, *arguments, residual, start, "gelu", path)
                same(module.forward(far(h), *arguments, far(residual), start, "gelu", path), near)


EDGES = [(m, c, n) for m, c, n in ((63, 65, 64), (64, 64, 65), (65, 63, 127), (127, 128, 129),
                                   (128, 129, 128), (129, 127, 63))]  # fmt: skip


@EACH
@pytest.mark.parametrize("m, c, n", EDGES)
def test_around_the_edges_of_tiles(m, c, n, run, poisoned):
    for one in with_paths(Case((m,), c, 17, n=n), run):
        check(one, run)
    check(Case((m,), c, 17), run)


@EACH
def test_on_both_sides_of_every_choice(run, monkeypatch):
    """Path auto where the rule changes its mind, on a machine so slow that it does among few
    rows."""
    slow = choice.Machine(2e10, 2e10, 1e9)
    monkeypatch.setattr(choice, "MACHINES", {})
    monkeypatch.setattr(choice, "UNKNOWN", slow)
    choice._choose.cache_clear()
    case = Case((1,), 64, 64, n=64)
    shape = choice.Shape(1, 64, 64, 64, run[2])
    device = torch.device(run[1])
    found = choice.spans(run[0], device, contract.PATHS, shape)
    assert len(found) > 1 and found[-1].rows < 200
    for span in found[1:]:
        for rows in (span.rows - 1, span.rows):
            check(replace(case, lead=(rows,)), run)
    choice._choose.cache_clear()
