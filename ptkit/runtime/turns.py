"""One thread at a time in a model.

A prefix that cannot be part of a cache is put into the model's attention for the time of a call
(`ptkit.runtime.attention`), and so are hooks and LoRA rows. All threads share the one model, so
whoever reads with it has it alone until the call is done.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Self

from transformers import PreTrainedModel

_KEY = "ptkit_turn"


class Turn:
    """A lock: re-entrant, and handed over in the order in which threads asked for it.

    A loop that takes it again at once, as a server's does, would otherwise keep all others out.
    Use it as a context.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[object] = deque()
        self._owner: int | None = None
        self._depth = 0

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> Self:
        if self.mine:
            self._depth += 1
            return self
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._owner is None and self._queue[0] is ticket)
                self._owner, self._depth = threading.get_ident(), 1
            finally:  # an interruption gives the place in the queue up
                self._queue.remove(ticket)
                self._changed.notify_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        with self._changed:
            self._owner = None
            self._changed.notify_all()

    # A copy of a model is a model of its own.
    def __deepcopy__(self, _: dict[int, Any]) -> Turn:
        return Turn()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def turn(model: PreTrainedModel) -> Turn:
    """The one lock of `model`, whoever uses it: several banks, a `LoadedAdapter`, a server.

    It is on the backbone, which models that differ in their heads share.
    """
    found: Turn = model.base_model.__dict__.setdefault(_KEY, Turn())
    return found
