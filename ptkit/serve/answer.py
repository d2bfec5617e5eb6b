"""An answer as it is asked for, and what its asker is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ptkit.errors import PtkitError, UserError
from ptkit.prefix import Compiled
from ptkit.serve.sampling import Sampling, Token

FinishReason = Literal["stop", "length"]


class QueueFullError(PtkitError):
    """As many answers wait as may wait; the same request may be taken later."""


class DrainingError(PtkitError):
    """The engine finishes what it has and takes no more."""


class TimedOutError(PtkitError):
    """The answer was not finished in time."""


class NoMemoryError(PtkitError):
    """The running answers leave no memory for this one; the same request may be taken later."""


class InUseError(UserError):
    """The adapter takes part in running answers and cannot be changed now."""


@dataclass(frozen=True)
class RequestAdapter:
    """An adapter that answers, as it was when the answer was asked for.

    prefix: what gives a sequence its own, from its input
    lora: name of the LoRA adapter
    """

    name: str
    prefix: Compiled | None
    lora: str | None = None

    @property
    def virtual_tokens(self) -> int:
        """Positions its prefix takes."""
        return 0 if self.prefix is None else self.prefix.virtual_tokens


@dataclass(frozen=True)
class Update:
    """News of an answer: text that became certain, its tokens, and why it ended if it did."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    error: PtkitError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Answer:
    """An answer to be written.

    adapters: one, or several that write one answer together (the mean of their log-probabilities
        decides every token, as in `AdapterBank.ensemble`)
    tell: called with every update, from the engine's thread: it must not block
    each_piece: tell of every piece; otherwise once, at the end
    deadline: `time.monotonic()` after which it is given up; None: never
    ends: token ids at which it ends, beside the model's own
    """

    prompt: list[int]
    adapters: tuple[RequestAdapter, ...]
    sampling: Sampling
    tell: Callable[[Update], None]
    each_piece: bool = True
    deadline: float | None = None
    ends: frozenset[int] = frozenset()
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    written: int = 0

    @property
    def name(self) -> str:
        """What its requests are counted under."""
        return self.adapters[0].name if len(self.adapters) == 1 else "ensemble"

    @property
    def virtual_tokens(self) -> int:
        """Positions its longest prefix takes."""
        return max(adapter.virtual_tokens for adapter in self.adapters)

    @property
    def positions(self) -> int:
        """Positions its longest row may take."""
        return self.virtual_tokens + len(self.prompt) + self.sampling.max_tokens


class StatLogger(Protocol):
    """Is told what the engine does (see `ptkit.serve.metrics`)."""

    def stepped(self, rows: int) -> None:
        """One token was written in each of `rows` rows."""

    def ended(self, answer: Answer, outcome: str) -> None:
        """An answer ended: `stop`, `length`, `cancelled`, `timeout` or `error`."""
