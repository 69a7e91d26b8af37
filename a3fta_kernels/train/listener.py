"""What a run tells while it goes."""

from __future__ import annotations

from typing import Any


class Listener:
    """What a run tells while it goes. Does nothing; a progress bar overrides it."""

    def begin(self, title: str, step: int, steps: int) -> None: ...

    def step(self, entry: dict[str, Any]) -> None: ...

    def work(self, what: str, done: int, of: int) -> None:
        """Between steps: how much is done of what takes its time; at the end `done` is `of`."""

    def say(self, text: str) -> None: ...


class Share:
    """Work of `of` parts: tells a listener how many are done."""

    def __init__(self, listener: Listener, what: str, of: int) -> None:
        self._listener, self._what, self._of, self._done = listener, what, of, 0

    def more(self, count: int = 1) -> None:
        # of several processes the last ones may have a part less
        self._done = min(self._done + count, self._of)
        self._listener.work(self._what, self._done, self._of)
