"""Every operator once or a few times on small shapes: what compute-sanitizer watches.

Forward and backward by every path, in every dtype, with and without the optional tensors: on odd
shapes, and on aligned ones with R = 16 and 64, which take the fast kernels. Results go to the host,
where they are held to the float64 oracle, so that an element nobody wrote shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from a3fta_kernels import ops
from a3fta_kernels.backends import BackendUnavailableError, why_not
from benchmarks.variants import EAGER, cross_inputs
from benchmarks.workloads import Workload
from tests.ops.norm_protocol import NormCase, unit_of
from tests.oracle import (
    WEIGHT_GRADS,
    Case,
    check,
    compare,
    evaluate,
    gradient,
    jitter,
    upcast,
    with_paths,
)

Run = tuple[str, str, torch.dtype]
DTYPES = ("float32", "bfloat16", "float16")


def cases(dtype: torch.dtype, quick: bool) -> Iterator[Case]:
    for n in (None, 24):
        yield Case(lead=(3, 13), c=40, r=5, n=n, modulation="gammabeta", residual=n is not None)
        if not quick:
            yield Case(lead=(1, 67), c=72, r=16, n=n, biases=False, activation="silu")
    if not quick:
        yield Case(lead=(2, 33), c=24, r=8, n=40, columns=(8, 56), layout="sliced")
    if dtype == torch.float32:
        return
    # whole tiles and a last one that is cut, in rows, columns and reduction
    for n in (None, 320):
        yield Case(lead=(2, 96), c=320, r=64, n=n, modulation="gammabeta")
        if not quick:
            yield Case(lead=(1, 300), c=640, r=16, n=n and 384, residual=n is not None)
    if not quick:
        yield Case(lead=(2, 64), c=128, r=16, n=256, columns=(64, 320))


def crosses(dtype: torch.dtype, quick: bool) -> Iterator[Workload]:
    """Whole and split head widths, and a last row block that is cut."""
    yield Workload("", 2, 70, 80, r=16, heads=2)
    if not quick and dtype != torch.float32:
        yield Workload("", 1, 128, 320, heads=8)
        yield Workload("", 2, 33, 160, r=64, heads=2, keys=120)
        yield Workload("", 1, 65, 144, r=16, heads=2, keys=120)


def check_cross(w: Workload, run: Run) -> None:
    """As `tests.oracle.check`, with the truth from the CPU; keys and values have gradients too."""
    backend, device, dtype = run
    inputs = cross_inputs(w, dtype, torch.device("cpu"))
    for name in ("k", "v"):
        inputs[name].requires_grad_()
    dy = gradient(torch.Size((w.batch, w.tokens, w.n)), dtype, "cpu", "plain", 0)
    here = {k: _moved(v, device) for k, v in inputs.items()}

    def op(**arguments: Any) -> Tensor:
        return ops.cross_attention_adapter(**arguments, backend=backend)

    ours = evaluate(op, here, dy.to(device)).to("cpu")
    eager = EAGER["cross_attention_adapter"]
    wide = upcast(inputs)
    exact = evaluate(eager, wide, dy.double())
    bars = [evaluate(eager, inputs, dy)]
    for seed in range(4):
        moved = jitter(wide, dtype, seed), jitter(dy.double(), dtype, seed)
        bars.append(evaluate(eager, *moved))
    compare("y", ours.y, [b.y for b in bars], exact.y, dtype, 2.0)
    for name, grad in ours.grads.items():
        factor = 3.0 if name in WEIGHT_GRADS else 2.0
        others = [b.grads[name] for b in bars]
        compare(f"d{name}", grad, others, exact.grads[name], dtype, factor)


def check_elementwise(m: int, width: int, run: Run) -> None:
    """`geglu` as above; the 8-bit copy of its input, there and back, beside the CPU's."""
    backend, device, dtype = run
    g = torch.Generator().manual_seed(m)
    p = torch.randn(m, 2 * width, generator=g).to(dtype).requires_grad_()
    dy = gradient(torch.Size((m, width)), dtype, "cpu", "plain", 0)
    here = {"p": _moved(p, device)}
    ours = evaluate(partial(ops.geglu, backend=backend), here, dy.to(device)).to("cpu")
    wide, eager = upcast({"p": p}), EAGER["geglu"]
    exact = evaluate(eager, wide, dy.double())
    bars = [evaluate(eager, {"p": p}, dy)]
    for seed in range(4):
        moved = jitter(wide, dtype, seed), jitter(dy.double(), dtype, seed)
        bars.append(evaluate(eager, *moved))
    compare("y", ours.y, [b.y for b in bars], exact.y, dtype, 2.0)
    compare("dp", ours.grads["p"], [b.grads["p"] for b in bars], exact.grads["p"], dtype, 2.0)
    codes, ranges = ops.quantize(here["p"], backend=backend)
    back = ops.dequantize(codes, ranges, dtype, backend=backend)
    expected = ops.quantize(p, backend="reference")
    assert torch.equal(ranges.cpu(), expected[1])
    assert (codes.cpu().int() - expected[0].int()).abs().max() <= 1
    restored = ops.dequantize(codes.cpu(), expected[1], dtype, backend="reference")
    torch.testing.assert_close(back.cpu(), restored, rtol=torch.finfo(dtype).eps, atol=1e-5)


def _moved(x: Any, device: str) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().to(device).requires_grad_(x.requires_grad)


def check_norms(case: NormCase, run: Run) -> None:
    """`group_norm` or `layer_norm`, beside the CPU's truth."""
    backend, device, dtype = run
    inputs = case.inputs(dtype, "cpu")
    dy = gradient(torch.Size(case.shape), dtype, "cpu", "plain", 0)
    here = {k: _moved(v, device) for k, v in inputs.items()}
    ours = evaluate(partial(case.op, backend=backend), here, dy.to(device)).to("cpu")
    wide = upcast(inputs)
    exact = evaluate(case.reference, wide, dy.double())
    bars = [evaluate(case.reference, inputs, dy)]
    for seed in range(4):
        moved = jitter(wide, dtype, seed), jitter(dy.double(), dtype, seed)
        bars.append(evaluate(case.reference, *moved))
    compare("y", ours.y, [b.y for b in bars], exact.y, dtype, 2.0)
    unit = unit_of(case, inputs, dy)
    compare("dx", ours.grads["x"], [b.grads["x"] for b in bars], exact.grads["x"], dtype, 2.0, unit)


# one launch and several, rows of whole vectors and not
NORMS = tuple(
    NormCase(shape, groups, "silu" if groups else "identity", layout=layout)
    for shape, groups in (((2, 24, 35), 3), ((1, 320, 128), 32), ((1, 10, 6600), 2), ((9, 320), 0))
    for layout in ("plain", "last")
    if groups or layout == "plain"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="native", choices=("native", "triton"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    arguments = parser.parse_args()
    ran = 0
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        run = (arguments.backend, arguments.device, dtype)
        reason = why_not(arguments.backend, torch.device(arguments.device), dtype)
        if reason is not None:
            print(f"sanitize_case: {arguments.backend} cannot run: {reason}", file=sys.stderr)
            return 2
        for base in cases(dtype, arguments.quick):
            for case in with_paths(base, run):
                # PyTorch's own kernels on the device would only take the tool's time
                check(case, run, truth_device="cpu")
                print(f"{arguments.backend} {dtype} {case.path} {case}", flush=True)
                ran += 1
        if hasattr(ops, "cross_attention_adapter"):
            for workload in crosses(dtype, arguments.quick):
                try:
                    check_cross(workload, run)
                except BackendUnavailableError as why:
                    print(f"{arguments.backend} {dtype} {workload}: {why}", flush=True)
                    continue
                print(f"{arguments.backend} {dtype} {workload}", flush=True)
                ran += 1
        # rows of whole vectors and not, blocks of 128 that end short
        for m, width in ((33, 320), (7, 35)):
            check_elementwise(m, width, run)
            print(f"{arguments.backend} {dtype} geglu and quantize, {m} x {width}", flush=True)
            ran += 1
        for case in NORMS:
            check_norms(case, run)
            print(f"{arguments.backend} {dtype} {case}", flush=True)
            ran += 1
    print(f"sanitize_case: done, {ran} cases agree with the oracle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
