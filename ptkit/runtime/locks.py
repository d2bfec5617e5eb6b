"""When a thread may read with a model, and when it may change it.

What a forward pass computes depends on its arguments alone, so any number of threads read with one
model at the same time. Putting a LoRA into it or taking it out replaces its modules: whoever does
that has the model alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ptkit.runtime.facts import known


class ReadWriteLock:
    """A lock for one changing thread or many reading ones. It is re-entrant, and handed over in
    the order in which threads asked for it.

    Use it as a context to change, and `shared` as one to read. A thread that reads cannot begin to
    change: it would wait for itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[object] = deque()
        self._owner: int | None = None
        #: Thread -> how many times it has entered.
        self._inside: dict[int, int] = {}

    @property
    def mine(self) -> bool:
        """Whether this thread has it, to read or to change."""
        return threading.get_ident() in self._inside

    def __enter__(self) -> Self:
        me = threading.get_ident()
        if self.mine and self._owner != me:
            raise RuntimeError("a thread cannot change a model while it reads with it")
        self._enter(alone=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within this context no other thread changes the model; others may read, too."""
        self._enter(alone=False)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, *, alone: bool) -> None:
        me = threading.get_ident()
        if me in self._inside:
            self._inside[me] += 1
            return
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: (
                        self._queue[0] is ticket
                        and self._owner is None
                        and not (alone and self._inside)
                    )
                )
                self._inside[me] = 1
                self._owner = me if alone else None
            finally:  # an interruption gives the place in the queue up
                self._queue.remove(ticket)
                self._changed.notify_all()

    def _leave(self) -> None:
        me = threading.get_ident()
        self._inside[me] -= 1
        if self._inside[me]:
            return
        with self._changed:
            del self._inside[me]
            if self._owner == me:
                self._owner = None
            self._changed.notify_all()


def lock_of(model: PreTrainedModel) -> ReadWriteLock:
    """The one lock of `model`, whoever uses it: several banks, a `LoadedAdapter`, a server.

    It is of the backbone, which models that differ in their heads share.
    """
    return known(model.base_model, _new_lock)


def _new_lock(_: nn.Module) -> ReadWriteLock:
    return ReadWriteLock()


def running(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """A context to read with `model` in: other threads read, too, and none changes it.

    Some models have rotary frequencies that follow the longest text read (`longrope`, `dynamic`).
    transformers keeps them in the model, so there one thread reads at a time.
    """
    if torch.compiler.is_compiling():  # the compiler traces no locks: who runs what it made has it
        return nullcontext()
    lock = lock_of(model)
    return lock if known(model.base_model, _reads_alone) else lock.shared()


def _reads_alone(backbone: nn.Module) -> bool:
    kinds = (getattr(module, "rope_type", None) for module in backbone.modules())
    named = (kind.values() if isinstance(kind, dict) else [kind] for kind in kinds)
    return any(name in ("longrope", "dynamic") for names in named for name in names)
