"""Which weights each row of the running batch uses, for layers that can tell rows apart.

`ptkit.bank.lora_rows` says it, for the rows of its batch. Whatever else is read meanwhile (a soft
prompt being compiled, a model being tried out) is read by the base alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_rows: ContextVar[tuple[str, ...]] = ContextVar("row_adapters", default=())


def row_adapters() -> tuple[str, ...]:
    """The name each row's layers know its adapter by, in order; empty where all are the base's."""
    return _rows.get()


@contextmanager
def rows_run_with(names: tuple[str, ...]) -> Iterator[None]:
    """Within this context (of this thread) row i runs with the adapter `names[i]`; with none
    named, every row runs with the base alone."""
    token = _rows.set(names)
    try:
        yield
    finally:
        _rows.reset(token)
