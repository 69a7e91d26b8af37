"""What the kernels of `cross_attention_adapter` can take."""

from __future__ import annotations

import torch

DTYPES = (torch.float16, torch.bfloat16)  # fp32 products have no tensor cores
HEAD_DIM_LIMIT = 160
# head_dim up to: keys. A block of rows has its scores against all keys in registers at once
KEY_LIMITS = ((64, 512), (128, 256), (HEAD_DIM_LIMIT, 192))
RANK_LIMIT = 64  # da of a block of rows stays on chip


def refusal(dtype: torch.dtype, head_dim: int, keys: int, rank: int) -> str | None:
    """Why the kernels cannot take such sizes; None where they can."""
    if dtype not in DTYPES:
        return f"{dtype} has no tensor cores that keep its precision"
    if head_dim > HEAD_DIM_LIMIT:
        return f"head_dim {head_dim} is more than {HEAD_DIM_LIMIT}"
    limit = next(keys for largest, keys in KEY_LIMITS if head_dim <= largest)
    if keys > limit:
        return f"{keys} keys of head_dim {head_dim} are more than the {limit} that fit on chip"
    if rank > RANK_LIMIT:
        return f"rank {rank} is more than {RANK_LIMIT}"
    return None
