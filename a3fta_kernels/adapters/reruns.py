"""What a second run of a part of a forward finds again: dropped ranks and samples, a batch's names.

Whatever computes a part of a forward a second time from kept tensors (the lean levels) writes a
book in the first run and reads it in the second, which asks the same in the same order. Gradient
checkpointing needs none of this: it goes back to the generator's state.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Book = list[tuple[Any, Any]]  # who asked, and what it got


class _Thread(threading.local):
    written: Book | None = None
    read: Iterator[tuple[Any, Any]] | None = None


_thread = _Thread()


@contextlib.contextmanager
def written(book: Book) -> Iterator[None]:
    """Inside, what `found` gives is noted."""
    before, _thread.written = _thread.written, book
    try:
        yield
    finally:
        _thread.written = before


@contextlib.contextmanager
def read(book: Book) -> Iterator[None]:
    """Inside, `found` gives what was noted."""
    before, _thread.read = _thread.read, iter(book)
    try:
        yield
    finally:
        _thread.read = before


def is_first() -> bool:
    """Whether this is a first run, without gradients, of what will have some from the second."""
    return not torch.compiler.is_compiling() and _thread.written is not None


def found(whose: Any, make: Callable[[], T]) -> T:
    """make(), or what `whose` found in the first run."""
    # the compiler has its own way to run a part twice
    if torch.compiler.is_compiling():
        return make()
    if _thread.read is not None:
        noted: Any
        who, noted = next(_thread.read, (None, None))
        if who is not whose:
            raise RuntimeError(
                "lean: expected the adapters that acted in the forward, in their order, for what "
                "the backward computes again; got others"
            )
        return noted
    value = make()
    if _thread.written is not None:
        _thread.written.append((whose, value))
    return value
