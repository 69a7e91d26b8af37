"""Every native operator once or a few times on odd, small shapes: what compute-sanitizer watches.

Forward and backward by every path, in every dtype, with and without the optional tensors; results
go to the host, where they are held to the float64 oracle, so that an element nobody wrote shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from a3fta_kernels.backends import why_not
from tests.oracle import Case, check, with_paths


def cases() -> Iterator[Case]:
    for n in (None, 24):
        yield Case(lead=(3, 13), c=40, r=5, n=n, modulation="gammabeta", residual=n is not None)
        yield Case(lead=(1, 67), c=72, r=16, n=n, biases=False, activation="silu")
    yield Case(lead=(2, 33), c=24, r=8, n=40, columns=(8, 56), layout="sliced")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="native", choices=("native", "triton"))
    arguments = parser.parse_args()
    ran = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run = (arguments.backend, arguments.device, dtype)
        reason = why_not(arguments.backend, torch.device(arguments.device), dtype)
        if reason is not None:
            print(f"sanitize_case: {arguments.backend} cannot run: {reason}", file=sys.stderr)
            return 2
        for base in cases():
            for case in with_paths(base, run):
                check(case, run)
                print(f"{arguments.backend} {dtype} {case.path} {case}", flush=True)
                ran += 1
    print(f"sanitize_case: done, {ran} cases agree with the oracle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
