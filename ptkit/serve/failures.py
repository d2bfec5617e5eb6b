"""What an error is taken for, and what is said of it."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size


def of_memory(error: Exception) -> bool:
    """Whether `error` says that memory, of the device or the machine, ran out."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def said(error: Exception) -> str:
    """What `error` says, with its type."""
    return f"{type(error).__name__}: {error}"
