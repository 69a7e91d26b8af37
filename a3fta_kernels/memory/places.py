"""Which module runs: the stack of module calls, and the module that made an autograd node."""

from __future__ import annotations

import bisect
import threading
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

ROOT = "(model)"  # the name of the whole model


def sequence_number() -> int:
    """The number that the next autograd node gets."""
    return torch._C._autograd._get_sequence_nr()


class Places:
    """Inside the context, `current` names the module whose forward runs.

    Hooks for all modules, not on each: a layer with hooks of its own may take another path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(m): name or ROOT for name, m in model.named_modules()}
        self.stack: list[tuple[int, str]] = []
        self.starts: list[int] = []  # autograd nodes from here on ...
        self.owners: list[str] = []  # ... are made by this module
        self.entered: list[str] = []  # every call, in order
        self.thread = threading.get_ident()

    @property
    def current(self) -> str:
        return self.stack[-1][1] if self.stack else ""

    def of_node(self, number: int) -> str:
        """The module in whose forward the node of this sequence number was made."""
        at = bisect.bisect_right(self.starts, number) - 1
        return self.owners[at] if at >= 0 else ""

    def __enter__(self) -> Places:
        self.handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self.names and threading.get_ident() == self.thread:
            self.stack.append((id(module), self.names[id(module)]))
            self.entered.append(self.current)
            self._note()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self.names and threading.get_ident() == self.thread:
            # a module that was left by an exception before its hooks ran is still on top
            while self.stack and self.stack.pop()[0] != id(module):
                pass
            self._note()

    def _note(self) -> None:
        number = sequence_number()
        if self.starts and self.starts[-1] == number:
            self.owners[-1] = self.current
        else:
            self.starts.append(number)
            self.owners.append(self.current)
