"""An answer as it is asked for, and what its asker is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
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


class EngineDiedError(PtkitError):
    """The process that writes the answers has ended; the same request may be taken later."""


class TooLongError(UserError):
    """The request needs more positions than there are."""


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
        """Virtual tokens whose keys and values it has."""
        return 0 if self.prefix is None else self.prefix.virtual_tokens

    @property
    def positions(self) -> int:
        """Positions before the text that its virtual tokens take."""
        return 0 if self.prefix is None else self.prefix.positions


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
    def virtual_positions(self) -> int:
        """Positions its longest prefix takes."""
        return max(adapter.positions for adapter in self.adapters)

    @property
    def positions(self) -> int:
        """Positions its longest row may take."""
        return self.virtual_positions + len(self.prompt) + self.sampling.max_tokens


class StatLogger(Protocol):
    """Is told what the engine does (see `ptkit.serve.metrics`)."""

    def stepped(self, rows: int) -> None:
        """One token was written in each of `rows` rows."""

    def ended(self, answer: Answer, outcome: str) -> None:
        """An answer ended: `stop`, `length`, `cancelled`, `timeout` or `error`."""


class AnswerExecutor(Protocol):
    """What writes the answers that an `Engine` begins. Called from the engine's thread, but for
    `require`."""

    @property
    def longest(self) -> int | None:
        """Positions a sequence may take; None: no limit."""

    @property
    def running(self) -> int:
        """Rows that are taken."""

    @property
    def answers(self) -> list[Answer]:
        """The answers that have rows."""

    def require(self, answer: Answer) -> None:
        """Raise UserError for an answer that can never be written here. From any thread."""

    def by_name(self) -> Counter[str]:
        """The number of rows by the names of their answers."""

    def begin(self, answers: Sequence[Answer]) -> None:
        """Give rows to `answers`; one that cannot be begun is told so."""

    def step(self) -> None:
        """Write what can be written now."""

    def drop(self, gone: Callable[[Answer], bool]) -> None:
        """Take out answers that are `gone`."""

    def give_up(self, answer: Answer) -> None:
        """Count an answer that was cancelled; tell of one that took too long."""

    def log_end(self, answer: Answer, outcome: str) -> None:
        """Log how an answer ended."""

    def clear(self) -> None:
        """Begin from nothing; no answer is told."""

    def close(self) -> None:
        """Free what is held for answers alone, outside this process too. Nothing follows."""


class Endings:
    """How answers end, for a `StatLogger`; a part of every executor."""

    def __init__(self, stats: StatLogger | None) -> None:
        self._stats = stats

    def give_up(self, answer: Answer) -> None:
        """Count an answer that was cancelled; tell of one that took too long."""
        if answer.cancelled:
            self.log_end(answer, "cancelled")
        else:
            seconds = time.monotonic() - answer.asked
            answer.tell(Update(error=TimedOutError(f"not finished after {seconds:.0f} s")))
            self.log_end(answer, "timeout")

    def log_end(self, answer: Answer, outcome: str) -> None:
        """Log how an answer ended."""
        if self._stats is not None:
            self._stats.ended(answer, outcome)
