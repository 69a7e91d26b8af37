"""What the kernels of `cross_attention_adapter` can take, and the layout of [h, z]."""

from __future__ import annotations

KEY_LIMIT = 512  # all scores of a block of rows stand on chip at once
HEAD_DIM_LIMIT = 160
RANK_LIMIT = 64  # the pre-activation of a block of rows stays in registers

_STEP = 16


def hz_widths(channels: int, rank: int) -> tuple[int, int]:
    """(columns, row stride) of [h, z].

    z is padded with zeros to a multiple of 16 columns, so that the GEMM over K = columns meets
    whole blocks, and so are rows, which then start at multiples of 16 bytes in every dtype.
    """
    columns = channels + _up(rank)
    return columns, _up(columns)


def _up(x: int) -> int:
    return -(-x // _STEP) * _STEP
