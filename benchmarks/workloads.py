"""The shapes that are timed, what each call must compute, and what it must move.

GPU shapes are the attention projections of real models (batch 4 for the U-Nets, SD3 and PixArt,
batch 1 for Flux); CPU shapes are SD1.5's two largest widths at 4096 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OPS = ("adapter", "adapter_linear")
DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Workload:
    """`batch` x `tokens` rows; the adapter on `c` of `k` input columns; `n` outputs; rank `r`."""

    model: str
    batch: int
    tokens: int
    c: int
    r: int = 64
    k: int = 0  # 0: c
    residual: bool = False

    @property
    def m(self) -> int:
        return self.batch * self.tokens

    @property
    def width(self) -> int:
        return self.k or self.c

    @property
    def n(self) -> int:
        return self.c

    def name(self, op: str) -> str:
        if op == "adapter":
            return f"{self.m}x{self.c}-r{self.r}"
        inputs = f"{self.width}to{self.n}" if self.k else f"{self.c}"
        return f"{self.m}x{inputs}-r{self.r}{'-residual' if self.residual else ''}"

    def flop(self, op: str, direction: str) -> int:
        """Multiply-adds counted twice; element-wise work not counted."""
        m, c, r, n, k = self.m, self.c, self.r, self.n, self.width
        if op == "adapter":
            forward = 4 * m * c * r
            # dz, P, da @ w_down, dw_down
            backward = 8 * m * c * r
        else:
            # the frozen product, z, z @ V.T, V
            forward = 2 * m * k * n + 2 * m * r * (c + n) + 2 * n * c * r
            # dy @ weight, dz, P, da @ w_down, dw_down, dw_up
            backward = 2 * m * k * n + 4 * m * n * r + 4 * m * c * r + 2 * n * c * r
        return forward + (backward if direction == "forward+backward" else 0)

    def bytes(self, op: str, direction: str, dtype: torch.dtype) -> int:
        """Each input read once and each output written once, in forward and in backward."""
        m, c, r, n, k = self.m, self.c, self.r, self.n, self.width
        if op == "adapter":
            forward = 2 * m * c + 2 * c * r
            backward = 3 * m * c + m * r + 2 * c * r
        else:
            forward = m * k + m * n * (2 if self.residual else 1) + n * k + 2 * c * r
            backward = m * n + m * c + m * k + m * r + n * k + 2 * c * r
        if direction == "forward":
            return forward * dtype.itemsize
        return (forward + m * r + backward) * dtype.itemsize


def _cpu(c: int, r: int, residual: bool = False) -> Workload:
    return Workload("SD1.5", 1, 4096, c, r, residual=residual)


CPU = tuple(_cpu(c, r) for r in (64, 16) for c in (320, 640))

GPU = (
    Workload("SD1.5 512", 4, 4096, 320),
    Workload("SDXL 1024", 4, 4096, 640),
    Workload("SDXL 1024", 4, 1024, 1280),
    Workload("SD1.5 512", 4, 1024, 640),
    Workload("SD3-medium 1024", 4, 4096, 1536),
    Workload("Flux-dev 1024, single", 1, 4608, 3072, k=15360),
    Workload("Flux-dev 1024", 1, 4096, 3072),
    Workload("PixArt-XL 1024", 4, 4096, 1152),
    Workload("SD1.5 512", 4, 256, 1280),
    Workload("SD1.5 512", 4, 64, 1280),
    Workload("SD3-medium 1024, text", 4, 333, 1536),
    Workload("Flux-dev 1024, text", 1, 512, 3072),
    Workload("SDXL 1024", 4, 4096, 640, r=16),
    Workload("SDXL 1024", 4, 1024, 1280, r=16),
    Workload("SDXL 1024", 4, 4096, 640, r=128),
    Workload("SDXL 1024", 4, 4096, 640, residual=True),
    Workload("SDXL 1024", 4, 1024, 1280, residual=True),
)


def workloads(op: str, device: str, quick: bool) -> list[tuple[Workload, torch.dtype]]:
    """What is timed for `op`, the most telling first."""
    if device == "cpu":
        shapes = CPU[:1] if quick else CPU
        return [(w, d) for w in shapes for d in (torch.float32, torch.bfloat16)]
    shapes = GPU[:3] if quick else GPU
    pairs = [(w, torch.bfloat16) for w in shapes if op == "adapter_linear" or not w.residual]
    # a single block's attention input is one slice of its h: `adapter` knows no such slice
    pairs = [(w, d) for w, d in pairs if op == "adapter_linear" or not w.k]
    if not quick:
        pairs += [(w, d) for w in GPU[:2] for d in (torch.float16, torch.float32)]
    return pairs
