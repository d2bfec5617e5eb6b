"""Engines whose answers `ptkit verify --engine` compares; each is a module, found by being there.

Such a module has

    greedy(source, base, prompts, max_new_tokens, **settings) -> list[list[int]]

which starts its engine with the adapter folder `source`, writes the greedy answers to `prompts`,
and ends the engine. Prompts are the token ids of whole inputs, without placeholders. It returns the
answers' token ids, without those that end a text. It raises UserError or AdapterError for what its
engine cannot hold. Settings are keywords; `ptkit verify` sets those that it has options for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ptkit.declared import declared

if TYPE_CHECKING:
    from ptkit.runtime.base_model import Base


class Greedy(Protocol):
    """Writes greedy answers with one engine."""

    def __call__(
        self,
        source: Path,
        base: Base,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        **settings: Any,
    ) -> list[list[int]]: ...


@cache
def engines_that_run() -> tuple[str, ...]:
    """The names of the engines."""
    return tuple(name.replace("_", "-") for name in declared(Path(__file__).parent, "__doc__"))


def greedy_of(engine: str) -> Greedy:
    """What writes greedy answers with `engine`, one of `engines_that_run()`."""
    module = import_module(f"{__name__}.{engine.replace('-', '_')}")
    return cast(Greedy, module.greedy)
