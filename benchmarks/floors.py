"""What no implementation can go below: `python -m benchmarks.floors` prints it for one device.

Computed from the workloads, not measured. Each term is the least by itself: every input read once
and every output written once; every product done once (multiply-adds counted twice), element-wise
work not counted. The ceilings are arguments; their defaults are what a copy and a matrix product
reached on an H200.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import torch

from .workloads import BENCHES, ELEMENTWISE, Workload, possible, workloads

H200 = {"copy_bytes_per_s": 4.3e12, "bfloat16_flop_per_s": 790e12}


def flop(op: str, w: Workload, direction: str) -> int:
    forward, backward = (0, 0) if op in ELEMENTWISE else _FLOP[op](w)
    return _of(direction, forward, backward, 0)


def moved(op: str, w: Workload, direction: str, dtype: torch.dtype) -> int:
    """Bytes."""
    forward, backward, between = _ELEMENTS[op](w)
    narrow = _narrow_bytes(w) if op == "quantize" else 0
    return _of(direction, forward, backward, between) * dtype.itemsize + narrow


def _of(direction: str, forward: int, backward: int, between: int) -> int:
    return {
        "forward": forward,
        "backward": backward,
        "forward+backward": forward + between + backward,
    }[direction]


def _adapter_flop(w: Workload) -> tuple[int, int]:
    # z, z @ w_up.T; dz, P, da @ w_down, dw_down
    one = 2 * w.m * w.c * w.r
    return 2 * one, 4 * one


def _linear_flop(w: Workload) -> tuple[int, int]:
    m, c, r, n, k = w.m, w.c, w.r, w.n, w.width
    # the frozen product, z, z @ V.T, V
    forward = 2 * m * k * n + 2 * m * r * (c + n) + 2 * n * c * r
    # dy @ weight, dz, P, da @ w_down, dw_down, dw_up
    backward = 2 * m * k * n + 4 * m * n * r + 4 * m * c * r + 2 * n * c * r
    return forward, backward


def _cross_flop(w: Workload) -> tuple[int, int]:
    forward, backward = _linear_flop(w)
    # scores and values; dP and dq: keys and values come from frozen layers and constant text
    attention = 4 * w.m * w.keys * w.c
    return forward + attention, backward + attention


def _block_flop(w: Workload) -> tuple[int, int]:
    m, c = w.m, w.c
    # q, k, v, out; q, out; GEGLU to 8c and from 4c
    frozen = (8 + 4 + 24) * m * c * c
    text = 4 * w.batch * w.keys * w.text * c
    own, cross = 4 * m * w.tokens * c, 4 * m * w.keys * c
    extra = [2 * (x - 2 * m * c * c) for x in _linear_flop(w)]
    # the backward of self-attention has four products: dV, dP, dq, dk
    return frozen + text + own + cross + extra[0], frozen + 2 * own + cross + extra[1]


def _adapter_elements(w: Workload) -> tuple[int, int, int]:
    """Of a forward, of a backward, and what training adds between them."""
    m, c, r = w.m, w.c, w.r
    return 2 * m * c + 2 * c * r, 3 * m * c + m * r + 2 * c * r, m * r


def _bank_elements(w: Workload) -> tuple[int, int, int]:
    m, c, bank = w.m, w.c, 2 * w.adapters * w.c * w.r
    return 2 * m * c + bank, 3 * m * c + bank, 0


def _linear_elements(w: Workload) -> tuple[int, int, int]:
    m, c, r, n, k = w.m, w.c, w.r, w.n, w.width
    forward = m * k + m * n * (2 if w.residual else 1) + n * k + 2 * c * r
    backward = m * n + m * c + m * k + m * r + n * k + 2 * c * r
    return forward, backward, m * r


def _cross_elements(w: Workload) -> tuple[int, int, int]:
    m, c, r, n = w.m, w.c, w.r, w.n
    small = 2 * w.batch * w.keys * c + n * c + 2 * c * r
    # h stays on the chip, and is computed again for the backward
    return m * c + m * n + small, m * n + 2 * m * c + small, 0


def _block_elements(w: Workload) -> tuple[int, int, int]:
    m, c = w.m, w.c
    frozen, text = 18 * c * c, w.batch * w.keys * w.text + 2 * w.text * c
    return 2 * m * c + frozen + text + 4 * c * w.r, 3 * m * c + frozen + 4 * c * w.r, 0


def _geglu_elements(w: Workload) -> tuple[int, int, int]:
    # p has two columns for each of y
    return 3 * w.m * w.c, 5 * w.m * w.c, 0


def _quantize_elements(w: Workload) -> tuple[int, int, int]:
    return 2 * w.m * w.c, 0, 0


def _norm_elements(w: Workload) -> tuple[int, int, int]:
    # the statistics are of no account
    return 2 * w.m * w.c, 3 * w.m * w.c, 0


def _narrow_bytes(w: Workload) -> int:
    """Codes and ranges, written and read again."""
    return 2 * (w.m * w.c + 4 * -(-w.m * w.c // 128))


_FLOP = {
    "adapter": _adapter_flop,
    "adapter_bank": _adapter_flop,
    "adapter_linear": _linear_flop,
    "cross_attention_adapter": _cross_flop,
    "block": _block_flop,
}
_ELEMENTS = {
    "adapter": _adapter_elements,
    "adapter_bank": _bank_elements,
    "adapter_linear": _linear_elements,
    "cross_attention_adapter": _cross_elements,
    "block": _block_elements,
    "geglu": _geglu_elements,
    "quantize": _quantize_elements,
    "group_norm": _norm_elements,
    "layer_norm": _norm_elements,
}


def terms(
    op: str, w: Workload, dtype: torch.dtype, direction: str, ceilings: Mapping[str, float]
) -> dict[str, float]:
    """Microseconds that the bytes and the arithmetic take at the ceilings; the floor is the larger.

    A third term, the launches, depends on the variant: see `harness.report`.
    """
    name = str(dtype).removeprefix("torch.")
    return {
        "bytes": 1e6 * moved(op, w, direction, dtype) / ceilings["copy_bytes_per_s"],
        "arithmetic": 1e6 * flop(op, w, direction) / ceilings[f"{name}_flop_per_s"],
    }


def copied(op: str, w: Workload, direction: str, dtype: torch.dtype) -> dict[str, int]:
    """Yardsticks that only copy, and the bytes they read and write together.

    clone: what `adapter` and `adapter_bank` must move at least, 2MC elements forward and 3MC
    backward; `geglu` 3MF and 5MF; the normalisations 2MC and 3MC.
    read: dy and h once, the term that the backward of `adapter_linear` adds to the products.
    """
    if op in ("adapter", "adapter_bank"):
        return {"clone": _of(direction, 2, 3, 0) * w.m * w.c * dtype.itemsize}
    if op in ("geglu", "group_norm", "layer_norm"):
        return {"clone": moved(op, w, direction, dtype)}
    if op == "adapter_linear" and direction != "forward":
        return {"read": w.m * (w.n + w.c) * dtype.itemsize}
    return {}


def arithmetic_ratio(w: Workload) -> float:
    """Training's arithmetic with the adapter over that without it: 1 + 3R/C + R/M where K = C = N.

    That is what the adapter costs at least where the frozen product is bound by arithmetic.
    """
    return flop("adapter_linear", w, "forward+backward") / (4 * w.m * w.width * w.n)


def table(ceilings: Mapping[str, float], telling: bool = False) -> list[str]:
    """Markdown, one row per bench, workload and direction; or of the most telling workloads."""
    lines = [
        "| bench | workload | direction | MiB | GFLOP | bytes, µs | arithmetic, µs | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op in BENCHES:
        for w, dtype in workloads(op, "cuda", quick=telling):
            for direction in possible(op):
                t = terms(op, w, dtype, direction, ceilings)
                lines.append(
                    f"| {op} | {w.name(op)} | {direction} | "
                    f"{moved(op, w, direction, dtype) / 2**20:.1f} | "
                    f"{flop(op, w, direction) / 1e9:.1f} | {t['bytes']:.1f} | "
                    f"{t['arithmetic']:.1f} | {max(t, key=lambda k: t[k])} |"
                )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="floors of the GPU workloads, computed")
    parser.add_argument("--copy", type=float, default=H200["copy_bytes_per_s"], help="bytes/s")
    parser.add_argument("--flop", type=float, default=H200["bfloat16_flop_per_s"], help="FLOP/s")
    parser.add_argument("--telling", action="store_true", help="few workloads: NOTES.md's table")
    arguments = parser.parse_args()
    ceilings = {"copy_bytes_per_s": arguments.copy, "bfloat16_flop_per_s": arguments.flop}
    print(
        f"Computed, not measured: bf16, copies at {arguments.copy:.3g} bytes/s (read + written), "
        f"products at {arguments.flop:.3g} FLOP/s.\n"
    )
    print("\n".join(table(ceilings, arguments.telling)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
