"""Which waiting answers begin when: what other threads may touch.

Among those waiting, the adapter with the fewest running rows comes first, then who asked first:
one adapter's crowd does not keep another's out. An answer begins when the blocks that it may come
to need are free of all promises to others. So it never ends for want of memory that others took.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ptkit.errors import UserError
from ptkit.prefix import KVPrefix
from ptkit.runtime.block_pool import BLOCK_SIZE
from ptkit.serve.answer import (
    Answer,
    DrainingError,
    InUseError,
    QueueFullError,
    RequestAdapter,
)


class BlockBudget:
    """Blocks promised to answers: all that each may come to need, and each prefix once.

    most: blocks there may be; None: no limit
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._promised = 0
        self._prefixes: Counter[int] = Counter()

    def needed(self, answer: Answer) -> int:
        """Blocks that `answer` may come to need, by itself."""
        return self._own(answer) + sum(self._shared(answer).values())

    def fits(self, answer: Answer) -> bool:
        """Whether `answer` may begin."""
        shared = sum(n for key, n in self._shared(answer).items() if not self._prefixes[key])
        return self.most is None or self._promised + self._own(answer) + shared <= self.most

    def take(self, answer: Answer) -> None:
        """Promise `answer` its blocks."""
        self._change(answer, 1)

    def give_back(self, answer: Answer) -> None:
        """`answer` has ended."""
        self._change(answer, -1)

    def clear(self) -> None:
        """Nothing is promised."""
        self._promised = 0
        self._prefixes.clear()

    def _change(self, answer: Answer, sign: int) -> None:
        self._promised += sign * self._own(answer)
        for key, blocks in self._shared(answer).items():
            before = self._prefixes[key]
            self._prefixes[key] += sign
            if not (before and self._prefixes[key]):
                self._promised += sign * blocks

    def _own(self, answer: Answer) -> int:
        """Blocks that are the answer's alone."""
        text = len(answer.prompt) + answer.sampling.max_tokens
        own = (a.virtual_tokens for a in answer.adapters if not _is_shared(a))
        return len(answer.adapters) * _blocks(text) + sum(map(_blocks, own))

    def _shared(self, answer: Answer) -> dict[int, int]:
        """The prefixes of the answer that others hold, too, and the blocks of each."""
        return {
            id(adapter.prefix): _blocks(adapter.virtual_tokens)
            for adapter in answer.adapters
            if _is_shared(adapter)
        }


def _is_shared(adapter: RequestAdapter) -> bool:
    """Whether its prefix is the same keys and values for every input."""
    return isinstance(adapter.prefix, KVPrefix) and not adapter.prefix.infix


def _blocks(positions: int) -> int:
    return -(-positions // BLOCK_SIZE)


class Scheduler:
    """Answers that wait, guarded by one lock.

    max_rows: rows written at the same time
    max_waiting: answers that may wait for a row
    budget: of the blocks of keys and values
    changed: the lock; its waiters are told of everything that changes
    draining, stopped: nothing more is taken; the loop ends at the next token
    """

    def __init__(self, max_rows: int, max_waiting: int, budget: BlockBudget) -> None:
        self._max_rows, self.max_waiting, self._budget = max_rows, max_waiting, budget
        self.changed = threading.Condition()
        self.draining = self.stopped = False
        self._waiting: deque[Answer] = deque()
        # Taken out of the queue to be begun; nothing is in neither place.
        self._starting: list[Answer] = []
        # Adapters being changed, and how many answers, waiting or running, use each LoRA one.
        self._changing: set[str] = set()
        self._uses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def empty(self) -> bool:
        """Whether no answer waits or is about to begin."""
        return not (self._waiting or self._starting)

    def uses(self, name: str) -> int:
        """How many answers, waiting or running, use the LoRA adapter `name`."""
        return self._uses[name]

    def close(self, *, stop: bool) -> None:
        """Take no more; `stop`: and let the loop end."""
        with self.changed:
            self.draining = True
            self.stopped = self.stopped or stop
            self.changed.notify_all()

    def require_so_many(self, answers: Sequence[Answer]) -> None:
        """Raise UserError when `answers` are more than may ever wait."""
        if len(answers) > self.max_waiting:
            raise UserError(
                f"the request asks for {len(answers)} answers, of which at most "
                f"{self.max_waiting} may wait here; ask for fewer (`n`, prompts)"
            )

    def submit(self, answers: Sequence[Answer], is_stale: Callable[[RequestAdapter], bool]) -> None:
        """Let `answers` wait for their rows; all are taken or none.

        is_stale: whether an adapter's prefix and LoRA are not, or no longer, of one adapter

        Raises QueueFullError, DrainingError, and InUseError when a LoRA adapter among them is
        being changed.
        """
        with self.changed:
            if self.draining:
                raise DrainingError("the server is shutting down")
            if len(self._waiting) + len(answers) > self.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} answers are waiting, of at most {self.max_waiting}"
                )
            adapters = [(a, a.lora) for b in answers for a in b.adapters if a.lora is not None]
            for adapter, lora in adapters:
                # Its prefix, if it has one, must be the one that came with the LoRA of now.
                if lora in self._changing or is_stale(adapter):
                    raise InUseError(f"`{adapter.name}` is being changed; ask again")
            self._uses.update(lora for _, lora in adapters)
            self._waiting.extend(answers)
            self.changed.notify_all()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Stop writing `answers`; they are told nothing more."""
        with self.changed:
            for answer in answers:
                answer.cancelled = True
            self.changed.notify_all()

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Within this context the LoRA adapter `name` may be replaced or taken out.

        A prefix may be at any time: rows keep the one they began with. Raises InUseError while
        answers use it.
        """
        with self.changed:
            if self._uses[name] or name in self._changing:
                raise InUseError(
                    f"`{name}` changes weights and is in use; try again when its answers are done"
                )
            self._changing.add(name)
        try:
            yield
        finally:
            with self.changed:
                self._changing.discard(name)

    def admitted(self, running: int, under_way: Callable[[], Counter[str]]) -> list[Answer]:
        """Take out of the queue what is begun now.

        running: rows that are decoded
        under_way: counts the rows by the names of their answers

        Nothing but book-keeping: whoever asks meanwhile waits for the lock.
        """
        begun = 0  # rows
        admitted: list[Answer] = []
        with self.changed:
            while self._waiting:
                answer = self._fairest(under_way, admitted)
                rows = len(answer.adapters)
                if running + begun + rows > self._max_rows or not self._budget.fits(answer):
                    self._waiting.appendleft(answer)  # it is next: none after it overtakes it
                    break
                self._budget.take(answer)
                begun += rows
                admitted.append(answer)
                self._starting.append(answer)
        return admitted

    def begun(self) -> None:
        """All that was `admitted` has rows now, or has been told that it will have none."""
        self._starting.clear()

    def _fairest(self, under_way: Callable[[], Counter[str]], admitted: Sequence[Answer]) -> Answer:
        """Take out the answer to begin next."""
        if len(self._waiting) > 1:
            rows = under_way()
            for answer in admitted:
                rows[answer.name] += len(answer.adapters)
            answer = min(self._waiting, key=lambda a: rows[a.name])  # the first of equals
            self._waiting.remove(answer)
            return answer
        return self._waiting.popleft()

    def release(self, answers: Sequence[Answer]) -> None:
        """Answers that were begun have ended: give back their blocks, and their uses of LoRA
        adapters."""
        with self.changed:
            for answer in answers:
                self._budget.give_back(answer)
                self._drop_uses(answer)

    def take_gone(self, gone: Callable[[Answer], bool]) -> list[Answer]:
        """Take out the waiting answers that are `gone`."""
        with self.changed:
            queued = [answer for answer in self._waiting if gone(answer)]
            for answer in queued:
                self._waiting.remove(answer)
                self._drop_uses(answer)
        return queued

    def _drop_uses(self, answer: Answer) -> None:
        self._uses.subtract(a.lora for a in answer.adapters if a.lora is not None)

    def emptied(self, under_way: Sequence[Answer]) -> list[Answer]:
        """Take everything out, uses included; returns it, and `under_way` after it."""
        with self.changed:
            starting = [a for a in self._starting if a not in under_way]
            answers = [*self._waiting, *starting, *under_way]
            self._waiting.clear()
            self._starting.clear()
            self._uses.clear()
            self._budget.clear()
        return answers
