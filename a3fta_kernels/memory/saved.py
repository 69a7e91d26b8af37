"""ledger: what a training forward keeps for its backward, without running it.

PyTorch's saved-tensor hooks see every tensor that autograd keeps, in torch's own nodes and in
autograd Functions alike, so that the bytes are exact. Who keeps a tensor is read off the graph of
the outputs afterwards: each node holds what the hook returned for it. A checkpoint keeps its inputs
beside that graph; these are told by who calls the hook.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from ..tree import denoiser
from .account import Entry, Ledger
from .fakes import on_fakes
from .operators import CHECKPOINT, UNKNOWN, operator_of, saved_by
from .places import ROOT, Places


def ledger(model: Any, *args: Any, **kwargs: Any) -> Ledger:
    """Bytes that model(*args, **kwargs) saves for backward, by module, operator and tensor.

    Runs on fake tensors: no memory, no compute, no kernel, and seconds for the largest models.

    Args:
        model: any module on any device, meta included, adapted or not, with PEFT, with gradient
            checkpointing; of a pipeline its denoiser, of a compiled or DDP model the model
            inside, as eager PyTorch runs it. It is unchanged afterwards.
        *args, **kwargs: of its forward; tensors of any device, of which only shape and dtype
            matter. Parameters that require a gradient and the training mode are taken as they are.

    Returns:
        A Ledger. A storage counts once, with all its bytes, for whoever saved it first; weights
        and buffers do not count. A checkpointed region counts what it starts from; what the
        backward computes again is in `step_peak`.

    What a GPU keeps is what the CPU keeps, with these differences. Attention: PyTorch's kernel for
    the CPU saves q, k, v, the output and a (B, H, L) logsumexp in fp32, as flash attention on CUDA
    does; that adds two numbers of random state, "efficient" rounds the rows of logsumexp up to 32,
    and a mask, which flash on CUDA does not take, sends it to "efficient" or to "math", which
    saves the L x L scores. Triton's `cross_attention_adapter`, which takes the place of attention
    to few keys in an adapted model, saves no logsumexp. LayerNorm's statistics are in the dtype of
    a 16-bit input on the CPU, in fp32 on CUDA: four bytes more per row.

    Raises:
        TypeError: no module; tensors that are not plain (quantized, sparse).
        Whatever the forward raises, and PyTorch's DataDependentOutputException where the forward
        reads a value of a tensor (`.item()`, `if x.max() > 0`), which a fake does not have.
    """
    root = denoiser(model)
    with on_fakes(root, args, kwargs) as faked:
        return record(faked.model, faked.args, faked.kwargs, faked.notes)


class _Packed:
    """What stands in the graph for a saved tensor. It dies with the node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Saved:
    """What is known of a saved tensor when it is saved; the rest is read off the graph."""

    def __init__(self, x: Tensor, packed: _Packed, places: Places) -> None:
        self.packed = weakref.ref(packed)
        self.storage = x.untyped_storage()  # held, so that its id stays its own
        self.shape, self.dtype = tuple(x.shape), str(x.dtype).removeprefix("torch.")
        self.module, self.call = places.current or ROOT, len(places.entered)
        self.operator, self.tensor = UNKNOWN, ""
        if _by_checkpoint(sys._getframe(2)):
            self.operator, self.tensor = CHECKPOINT, "input"

    def place(self, places: Places) -> None:
        """A checkpoint saves before it calls the module that it is about."""
        if self.operator == CHECKPOINT and self.call < len(places.entered):
            self.module = places.entered[self.call]


def _by_checkpoint(frame: FrameType | None) -> bool:
    """Whether torch.utils.checkpoint itself saves, a few calls above the pack hook."""
    for _ in range(4):
        if frame is None or frame.f_code.co_filename == checkpoint.__file__:
            return frame is not None
        frame = frame.f_back
    return False


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: tuple[str, ...] = ()
) -> Ledger:
    """`ledger` of a call on the tensors as they are, real or fake: runs it."""
    found: list[_Saved] = []

    def pack(x: Tensor) -> _Packed:
        # detached: an output that holds its own node would never be freed
        packed = _Packed(x.detach())
        found.append(_Saved(x, packed, places))
        return packed

    with Places(model) as places, saved_tensors_hooks(pack, lambda packed: packed.tensor):
        output = model(*args, **kwargs)
    alive = {id(packed): s for s in found if (packed := s.packed()) is not None}
    for node in nodes(tensors_of(output)):
        for role, packed in saved_by(node):
            if isinstance(packed, _Packed):
                alive[id(packed)].operator, alive[id(packed)].tensor = operator_of(node), role
    for saved in alive.values():
        saved.place(places)
    constants = storages((*model.parameters(), *model.buffers()))
    seen = {s.storage._cdata: s.storage.nbytes() for s in found}
    kept = constants.keys() | {s.storage._cdata for s in alive.values()}
    return Ledger(
        tuple(_entries(alive.values(), constants)),
        parameters=sum(constants.values()),
        trainable=sum(storages(p for p in model.parameters() if p.requires_grad).values()),
        released=sum(size for storage, size in seen.items() if storage not in kept),
        notes=notes,
    )


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage."""
    found = (x.untyped_storage() for x in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


def _entries(saved: Iterable[_Saved], constants: dict[int, int]) -> Iterator[Entry]:
    groups: dict[int, list[_Saved]] = {}
    for s in saved:
        if s.storage._cdata not in constants:
            groups.setdefault(s.storage._cdata, []).append(s)
    for first, *others in groups.values():
        also = dict.fromkeys(f"{s.module}: {s.operator}.{s.tensor}" for s in others)
        yield Entry(
            first.module, first.operator, first.tensor, first.shape, first.dtype,
            first.storage.nbytes(), tuple(also),
        )  # fmt: skip


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a model returned: in containers, and in objects such as dataclasses."""
    found = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += [x for x in tree_leaves(dict(vars(leaf))) if isinstance(x, Tensor)]
    return found


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The autograd nodes that these tensors depend on, each once."""
    todo = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


__all__ = ["ledger", "nodes", "record", "storages", "tensors_of"]
