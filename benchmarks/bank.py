"""The rivals of `adapter_bank`: what one does for a batch of many users without the op.

| rival | computes |
|---|---|
| loop | `ops.adapter`, sample by sample: a launch each, and the parts put together |
| stacked | `ops.adapter` of all adapters along the rank, those of others switched off by gamma |
| bank+frozen | the bank, then the frozen layer |
| peft | the frozen layer with LoRA by peft, `adapter_names` per sample |
| frozen | the frozen layer alone |

`loop` and `stacked` compute what the op does; the others are to be held against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a3fta_kernels import ops
from tests.oracle import Case

from .workloads import Workload

if TYPE_CHECKING:
    from .variants import Subject, Variant

RIVALS = ("loop", "stacked", "bank+frozen", "peft", "frozen")


def inputs(w: Workload, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A bank in the trunk's dtype, as a block of `adapters_per_sample` holds it; the samples have
    its adapters in turns."""
    case = Case(lead=(w.batch, w.tokens), c=w.c, r=w.r, bank=w.adapters, scale="tensor")
    found = case.inputs(dtype, str(device))
    turns = torch.arange(w.batch, dtype=torch.int32, device=device)
    return found | {"index": turns % w.adapters}


def variant(name: str, subject: Subject) -> Variant:
    """Raises CannotRun."""
    from .variants import Variant, lora, wrap

    w = subject.workload
    users = [b % w.adapters for b in range(w.batch)]
    if name == "loop":
        return Variant(lambda **given: loop(users, **given))
    if name == "stacked":
        own = F.one_hot(torch.tensor(users, device=subject.device), w.adapters)
        return Variant(lambda **given: stacked(own, **given))
    g = torch.Generator().manual_seed(7)
    layer = nn.Linear(w.c, w.c).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(w.c, w.c, generator=g) * w.c**-0.5)
    holder = nn.Module()
    holder.linear = layer.to(subject.device, subject.dtype)
    if name == "frozen":
        return Variant(lambda h, **_: layer(h), ("h",), checked=False)
    if name == "bank+frozen":
        return Variant(lambda **given: layer(ops.adapter_bank(**given)), checked=False)
    for k in range(w.adapters):
        wrap(lora(w.r, ["linear"]), holder, str(k))
    wrapped: Any = holder.linear.to(subject.dtype)
    names = list(map(str, users))
    return Variant(
        lambda h, **_: wrapped(h, adapter_names=names), ("h",), checked=False
    )  # fmt: skip


def loop(
    users: list[int], h: Tensor, w_down: Tensor, w_up: Tensor, b_down: Tensor, b_up: Tensor,
    scale: Tensor, activation: str, **_: Any,
) -> Tensor:  # fmt: skip
    parts = [
        ops.adapter(
            h[b : b + 1], w_down[k], w_up[k], b_down[k], b_up[k], scale=scale[k],
            activation=activation,
        )
        for b, k in enumerate(users)
    ]  # fmt: skip
    return torch.cat(parts)


def stacked(
    own: Tensor, h: Tensor, w_down: Tensor, w_up: Tensor, b_down: Tensor, b_up: Tensor,
    scale: Tensor, activation: str, **_: Any,
) -> Tensor:  # fmt: skip
    """One rank more for each adapter: of w_up it holds b_up, and beta is 1 for its own samples.

    own (B, adapters): 1 where the sample has the adapter.
    """
    adapters, rank, channels = w_down.shape
    own = own.to(h.dtype)
    up = torch.cat((w_up, b_up[..., None]), dim=2) * scale[:, None, None]
    down = torch.cat((w_down, w_down.new_zeros(adapters, 1, channels)), dim=1)
    bias = torch.cat((b_down, b_down.new_zeros(adapters, 1)), dim=1)
    gamma = (own - 1)[..., None].expand(-1, -1, rank + 1)
    beta = torch.cat((own.new_zeros(len(own), adapters, rank), own[..., None]), dim=2)
    return ops.adapter(
        h, down.flatten(0, 1), up.transpose(0, 1).flatten(1), bias.flatten(),
        gamma=gamma.flatten(1), beta=beta.flatten(1), activation=activation,
    )  # fmt: skip
