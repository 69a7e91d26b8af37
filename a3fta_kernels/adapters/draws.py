"""Dropped ranks and samples that a second run of a forward drops again.

Whatever computes a part of a forward a second time from kept tensors (the lean levels) keeps a
book, a dict, and opens it around both runs: what an adapter drew in the first it finds in the
second. Gradient checkpointing needs none of this: it goes back to the generator's state.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Book = dict[Any, Tensor | None]  # what adapters drew


class _Thread(threading.local):
    book: Book | None = None


_thread = _Thread()


@contextlib.contextmanager
def noted(book: Book) -> Iterator[None]:
    """Inside, adapters draw once, and then what they drew before."""
    before, _thread.book = _thread.book, book
    try:
        yield
    finally:
        _thread.book = before


def drawn(whose: Any, draw: Callable[[], Tensor | None]) -> Tensor | None:
    """draw(), or what `whose` drew before in the book that is open."""
    # the compiler has its own way to run a part twice
    if torch.compiler.is_compiling() or _thread.book is None:
        return draw()
    if whose not in _thread.book:
        _thread.book[whose] = draw()
    return _thread.book[whose]
