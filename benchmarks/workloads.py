"""The shapes that are timed.

GPU shapes are the attention layers of real models (batch 4 for the U-Nets, SD3 and PixArt, batch 1
for Flux); CPU shapes are SD1.5's two largest widths at 4096 rows and less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# no adapter, so no rank, and no products: w.r is 0, w.c the columns of the result
ELEMENTWISE = ("geglu", "quantize", "group_norm", "layer_norm")
OPS = ("adapter", "adapter_bank", "adapter_linear", "cross_attention_adapter", *ELEMENTWISE)
# "block" is no op: a whole transformer block of diffusers, with the ops inside
BENCHES = (*OPS, "block")
DIRECTIONS = ("forward", "backward", "forward+backward")


def possible(op: str) -> tuple[str, ...]:
    """`quantize` is there and back in one, without a derivative; a bank is for inference."""
    return DIRECTIONS[:1] if op in ("quantize", "adapter_bank") else DIRECTIONS


@dataclass(frozen=True)
class Workload:
    """`batch` x `tokens` rows; the adapter on `c` of `k` input columns; `n` outputs; rank `r`.

    With attention: `heads` and `keys` of text; in a block the text has `text` channels. `last`: a
    group norm's channels lie last in memory, else its tokens do. `adapters`: of a bank, which the
    samples have in turns.
    """

    model: str
    batch: int
    tokens: int
    c: int
    r: int = 64
    k: int = 0  # 0: c
    residual: bool = False
    heads: int = 0
    keys: int = 77
    text: int = 0
    last: bool = False
    adapters: int = 0

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
        if op in ELEMENTWISE:
            return f"{self.m}x{self.c}{'-last' if self.last else ''}"
        if op == "adapter_bank":
            return f"{self.batch}x{self.tokens}x{self.c}-r{self.r}-of{self.adapters}"
        inputs = f"{self.width}to{self.n}" if self.k and op != "adapter" else f"{self.c}"
        heads = f"-h{self.heads}" if op in ("cross_attention_adapter", "block") else ""
        keys = f"-k{self.keys}" if heads and self.keys != 77 else ""
        return f"{self.m}x{inputs}{heads}{keys}-r{self.r}{'-residual' if self.residual else ''}"


def _cpu(c: int, r: int) -> Workload:
    return Workload("SD1.5", 1, 4096, c, r)


def _columns(*shapes: tuple[str, int, int, int]) -> tuple[Workload, ...]:
    return tuple(Workload(model, batch, tokens, c, r=0) for model, batch, tokens, c in shapes)


def _both_layouts(*shapes: tuple[str, int, int, int]) -> tuple[Workload, ...]:
    plain = _columns(*shapes)
    return (*plain, *(replace(w, last=True) for w in plain))


CPU = {
    "adapter": tuple(_cpu(c, r) for r in (64, 16) for c in (320, 640)),
    "adapter_bank": tuple(
        Workload("SD1.5", 4, 1024, c, r, adapters=4) for r in (64, 16) for c in (320, 640)
    ),
    "adapter_linear": tuple(_cpu(c, r) for r in (64, 16) for c in (320, 640)),
    "cross_attention_adapter": (Workload("SD1.5", 1, 1024, 320, heads=8),),
    "block": (Workload("SD1.5", 1, 256, 320, heads=8, text=768),),
    "geglu": _columns(("SD1.5", 1, 4096, 1280), ("SD1.5", 1, 1024, 2560)),
    "quantize": _columns(("SD1.5", 1, 4096, 2560), ("SD1.5", 1, 1024, 5120)),
    "group_norm": _both_layouts(("SD1.5", 1, 4096, 320), ("SD1.5", 1, 1024, 640)),
    "layer_norm": _columns(("SD1.5", 1, 4096, 320), ("SD1.5", 1, 1024, 640)),
}


def _ranks(*shapes: Workload) -> tuple[Workload, ...]:
    """All shapes with R = 64, then all with R = 16."""
    return (*shapes, *(replace(w, r=16) for w in shapes))


# the feed-forward's inner width is 4 C; p has twice as many columns
_GATED = (
    ("SDXL 1024", 4, 4096, 2560),
    ("SDXL 1024", 4, 1024, 5120),
    ("SD1.5 512", 4, 4096, 1280),
    ("SD1.5 512", 4, 1024, 2560),
    ("SD1.5 512", 4, 256, 5120),
)
_ROWS = (
    Workload("SDXL 1024", 4, 4096, 640),
    Workload("SDXL 1024", 4, 1024, 1280),
    Workload("SD1.5 512", 4, 4096, 320),
    Workload("SD3-medium 1024", 4, 4096, 1536),
    Workload("Flux-dev 1024, single", 1, 4608, 3072, k=15360),
    Workload("Flux-dev 1024", 1, 4096, 3072),
    Workload("PixArt-XL 1024", 4, 4096, 1152),
    Workload("SDXL 1024", 4, 4096, 640, residual=True),
    Workload("SD1.5 512", 4, 1024, 640),
    Workload("SD1.5 512", 4, 256, 1280),
    Workload("SD1.5 512", 4, 64, 1280),
    Workload("SD3-medium 1024, text", 4, 333, 1536),
    Workload("Flux-dev 1024, text", 1, 512, 3072),
)

GPU = {
    # a single block's attention input is one slice of its h: `adapter` knows no such slice
    "adapter": _ranks(*(w for w in _ROWS if not (w.k or w.residual))),
    # each sample of a batch with guidance: as many users as adapters, or few for many
    "adapter_bank": _ranks(
        Workload("SDXL 1024", 8, 4096, 640, adapters=4),
        Workload("SDXL 1024", 8, 1024, 1280, adapters=4),
        Workload("SD1.5 512", 32, 4096, 320, adapters=16),
        Workload("SD1.5 512", 32, 64, 1280, adapters=16),
        Workload("Flux-dev 1024", 4, 4096, 3072, adapters=4),
    ),
    "adapter_linear": _ranks(*_ROWS),
    "cross_attention_adapter": _ranks(
        Workload("SDXL 1024", 4, 4096, 640, heads=10),
        Workload("SDXL 1024", 4, 1024, 1280, heads=20),
        Workload("SD1.5 512", 4, 4096, 320, heads=8),
        Workload("PixArt-XL 1024", 4, 4096, 1152, heads=16, keys=120),
        Workload("SD1.5 512", 4, 1024, 640, heads=8),
        Workload("SD1.5 512", 4, 256, 1280, heads=8),
        Workload("SD1.5 512", 4, 64, 1280, heads=8),
    ),
    "block": _ranks(
        Workload("SDXL 1024", 4, 4096, 640, heads=10, text=2048),
        Workload("SDXL 1024", 4, 1024, 1280, heads=20, text=2048),
        Workload("SD1.5 512", 4, 4096, 320, heads=8, text=768),
        Workload("SD1.5 512", 4, 1024, 640, heads=8, text=768),
        Workload("SD1.5 512", 4, 256, 1280, heads=8, text=768),
    ),
    "geglu": _columns(*_GATED),
    "quantize": _columns(*((model, b, tokens, 2 * c) for model, b, tokens, c in _GATED)),
    "group_norm": _both_layouts(
        ("SDXL 1024", 4, 16384, 320),
        ("SDXL 1024", 4, 4096, 640),
        ("SDXL 1024", 4, 1024, 1280),
        ("SD1.5 512", 4, 4096, 320),
        ("SD1.5 512", 4, 1024, 640),
        ("SD1.5 512", 4, 256, 1280),
    ),
    "layer_norm": _columns(
        ("SDXL 1024", 4, 4096, 640),
        ("SDXL 1024", 4, 1024, 1280),
        ("SD1.5 512", 4, 4096, 320),
        ("SD3-medium 1024", 4, 4096, 1536),
        ("Flux-dev 1024", 1, 4096, 3072),
        ("SD1.5 512", 4, 256, 1280),
    ),
}


def workloads(
    op: str, device: str, quick: bool, rank: int | None = None
) -> list[tuple[Workload, torch.dtype]]:
    """What is timed for a bench, the most telling first; with `rank` only that."""
    if device == "cpu":
        dtypes = (torch.float32,) if quick or op == "block" else (torch.float32, torch.bfloat16)
        shapes = CPU[op][: 1 if quick else None]
    else:
        dtypes = (torch.bfloat16,)
        shapes = GPU[op][: 2 if quick else None]
    return [(w, d) for w in shapes for d in dtypes if rank in (None, w.r)]


def directions(op: str, w: Workload, device: str) -> tuple[str, ...]:
    """What is timed of a workload: all of it with R = 64, else what the targets ask for."""
    if w.r == 64 or op in ELEMENTWISE or len(possible(op)) == 1:
        return possible(op)
    if device == "cpu":
        return DIRECTIONS[::2]
    return DIRECTIONS[:2] if op == "adapter" else DIRECTIONS[2:]
