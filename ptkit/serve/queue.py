"""Answers that wait for a row, and which adapters they use: what other threads may touch.

Among those waiting, the adapter with the fewest rows under way comes first, then who asked first:
one adapter's crowd does not keep another's out.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ptkit.errors import UserError
from ptkit.serve.answer import Answer, DrainingError, InUseError, QueueFullError, Voice


class Queue:
    """Answers that wait, guarded by one lock.

    max_rows: rows written at the same time
    max_waiting: answers that may wait for a row
    piece: tokens of inputs read in one turn of the loop
    changed: the lock; its waiters are told of everything that changes
    draining, stopped: nothing more is taken; the loop ends at the next token
    """

    def __init__(self, max_rows: int, max_waiting: int, piece: int) -> None:
        self._max_rows, self.max_waiting, self._piece = max_rows, max_waiting, piece
        self.changed = threading.Condition()
        self.draining = self.stopped = False
        self._waiting: deque[Answer] = deque()
        # Taken out of the queue to be begun; nothing is in neither place.
        self._starting: list[Answer] = []
        # Adapters being changed, and how many answers, waiting or under way, use each LoRA one.
        self._changing: set[str] = set()
        self._uses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def empty(self) -> bool:
        """Whether no answer waits or is about to begin."""
        return not (self._waiting or self._starting)

    def uses(self, name: str) -> int:
        """How many answers, waiting or under way, use the LoRA adapter `name`."""
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

    def submit(self, answers: Sequence[Answer], is_stale: Callable[[Voice], bool]) -> None:
        """Let `answers` wait for their rows; all are taken or none.

        is_stale: whether a voice's prefix and LoRA are not, or no longer, of one adapter

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
            voices = [(v, v.lora) for a in answers for v in a.voices if v.lora is not None]
            for voice, lora in voices:
                # Its prefix, if it has one, must be the one that came with the LoRA of now.
                if lora in self._changing or is_stale(voice):
                    raise InUseError(f"`{voice.name}` is being changed; ask again")
            self._uses.update(lora for _, lora in voices)
            self._waiting.extend(answers)
            self.changed.notify_all()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Let nobody write `answers`; they are told nothing more."""
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

    def admitted(
        self, running: int, reading: bool, under_way: Callable[[], Counter[str]]
    ) -> list[list[Answer]]:
        """Take out of the queue what is begun now: groups whose inputs are read together.

        running: rows under way
        reading: whether inputs are being read
        under_way: counts the rows by the names of their answers

        Nothing but book-keeping: whoever asks meanwhile waits for the lock.
        """
        groups: list[list[Answer]] = []
        group: list[Answer] = []
        rows = longest = begun = 0  # rows, longest of the group; begun: rows of all groups
        passed_over: list[Answer] = []
        long_one = reading  # short ones are read within their first turn
        with self.changed:
            while self._waiting:
                answer = self._fairest(under_way)
                voices = len(answer.voices)
                if running + begun + voices > self._max_rows:
                    passed_over.append(answer)  # it is next: those after it do not overtake it
                    break
                infix = any(v.prefix is not None and v.prefix.infix for v in answer.voices)
                length = max(longest, len(answer.prompt))
                if len(answer.prompt) * voices > self._piece or infix:
                    if long_one:  # one long input at a time; shorter ones may go before it
                        passed_over.append(answer)
                        continue
                    long_one = True
                    groups.append([answer])
                elif length * (rows + voices) <= self._piece or not group:
                    group.append(answer)
                    rows, longest = rows + voices, length
                else:
                    passed_over.append(answer)
                    break
                begun += voices
                self._starting.append(answer)
            self._waiting.extendleft(reversed(passed_over))
        return [*groups, group] if group else groups

    def begun(self) -> None:
        """All that was `admitted` has rows now, or has been told that it will have none."""
        self._starting.clear()

    def _fairest(self, under_way: Callable[[], Counter[str]]) -> Answer:
        """Take out the answer to begin next."""
        if len(self._waiting) > 1:
            rows = under_way()
            answer = min(self._waiting, key=lambda a: rows[a.name])  # the first of equals
            self._waiting.remove(answer)
            return answer
        return self._waiting.popleft()

    def release(self, answers: Sequence[Answer]) -> None:
        """Take out the uses of LoRA adapters of `answers`."""
        with self.changed:
            for answer in answers:
                self._uses.subtract(v.lora for v in answer.voices if v.lora is not None)

    def take_gone(self, gone: Callable[[Answer], bool]) -> list[Answer]:
        """Take out the waiting answers that are `gone`."""
        with self.changed:
            queued = [answer for answer in self._waiting if gone(answer)]
            for answer in queued:
                self._waiting.remove(answer)
                self._uses.subtract(v.lora for v in answer.voices if v.lora is not None)
        return queued

    def emptied(self, under_way: Sequence[Answer]) -> list[Answer]:
        """Take everything out, uses included; returns it, and `under_way` after it."""
        with self.changed:
            starting = [a for a in self._starting if a not in under_way]
            answers = [*self._waiting, *starting, *under_way]
            self._waiting.clear()
            self._starting.clear()
            self._uses.clear()
        return answers
