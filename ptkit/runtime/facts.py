"""What is found out about a model by asking it, each thing once.

A fact belongs to the module it was asked of, and goes when the module goes. A copy of a model is a
model of its own, so it is asked again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import finalize

from torch import nn

Fact = TypeVar("Fact")
Asked = TypeVar("Asked", bound=nn.Module)


class _Facts:
    """An attribute for each module, of its id. torch.compile reads a dictionary whole, while the
    garbage collector may take an entry out of it, and would depend on every other model's."""


_FACTS = _Facts()
_ADDING = threading.Lock()


class NotNow(Exception):
    """A fact cannot be found out now: what is trained in the model gives no numbers, say."""


def holds(module: Asked, find: Callable[[Asked], bool]) -> bool:
    """Whether `find` is true of `module`; false as long as it raises `NotNow`."""
    try:
        return known(module, find)
    except NotNow:
        return False


def known(module: Asked, find: Callable[[Asked], Fact]) -> Fact:
    """What `find` says of `module`, asked the first time only.

    The answer must not hold `module`, which would then never be freed. All threads get the same
    object, even where several asked at the same time. What `find` raises is not kept.
    """
    name = f"of_{id(module)}"
    facts: dict[Any, Any] | None = getattr(_FACTS, name, None)
    if facts is not None and find in facts:
        kept: Fact = facts[find]
        return kept
    found = find(module)
    with _ADDING:
        if not hasattr(_FACTS, name):
            setattr(_FACTS, name, {})
            finalize(module, delattr, _FACTS, name)
        kept = getattr(_FACTS, name).setdefault(find, found)
        return kept
