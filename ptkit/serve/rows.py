"""Rows under way in one batch, and inputs read to become rows: for the loop's thread alone."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError, UserError
from ptkit.runtime.generation import end_ids
from ptkit.runtime.running import Reading, RowInput, RunningBatch
from ptkit.serve.answer import Answer, NoMemoryError, Observer, TimedOutError, Update, Voice
from ptkit.serve.failures import of_memory, said
from ptkit.serve.queue import Queue
from ptkit.serve.sampling import NotFiniteError, Token
from ptkit.serve.writing import Writing, together

logger = logging.getLogger(__name__)

#: A row: the answer it belongs to, and what it speaks with.
Row = tuple[Writing, Voice]


class Rows:
    """The rows of all answers under way.

    queue: is told of answers that end, for the LoRA adapters they used
    piece: tokens of inputs read between two steps
    """

    def __init__(
        self, bank: AdapterBank, queue: Queue, piece: int, observer: Observer | None
    ) -> None:
        self.bank = bank
        self._queue, self._piece, self._observer = queue, piece, observer
        self._ends = frozenset(end_ids(bank.base.model))
        # Rows in the batch's order, and inputs being read.
        self._batch = RunningBatch(bank.base.model)
        self._rows: list[Row] = []
        self._readings: list[tuple[Reading, list[Row]]] = []

    @property
    def running(self) -> int:
        """Rows under way, those whose input is being read included."""
        return len(self._rows) + sum(len(rows) for _, rows in self._readings)

    @property
    def reading(self) -> bool:
        """Whether inputs are being read."""
        return bool(self._readings)

    @property
    def answers(self) -> list[Answer]:
        """The answers that have rows."""
        return [writing.answer for writing in self._under_way()]

    def by_name(self) -> Counter[str]:
        """The number of rows by the names of their answers."""
        counts = Counter(w.answer.name for w, _ in self._rows)
        for _, rows in self._readings:
            counts.update(w.answer.name for w, _ in rows)
        return counts

    def begin(self, answers: Sequence[Answer]) -> None:
        """Begin to read the inputs of `answers` together."""
        self._begin(self._writings(answers))

    def advance(self) -> None:
        """Read a piece of each input; those that were read to their end become rows."""
        for reading, rows in list(self._readings):
            failure = None
            try:
                with self.bank.weights([voice.lora for _, voice in rows]):
                    reading.advance(max(1, self._piece // reading.rows))
            except Exception as error:  # of these inputs; nobody else's rows are touched
                logger.exception("reading an input failed")
                failure = self._failure("the input could not be read", error, rows)
            if failure is not None:
                self._readings.remove((reading, rows))
                del reading  # what it holds is free for the next attempt
                self._begin_apart(rows, failure)
            elif reading.done:
                self._readings.remove((reading, rows))
                self._join(reading, rows)

    def step(self) -> None:
        """Write one token in every row. Where memory does not last for all, the longest row, which
        decides how much is needed for each, is given up, until it lasts for the others."""
        while self._rows:
            failure = None
            try:
                with self.bank.weights([voice.lora for _, voice in self._rows]):
                    logits = self._batch.step([writing.last_token for writing, _ in self._rows])
            except Exception as error:
                if not of_memory(error):
                    raise
                logger.exception("no memory for the next token of %d rows", len(self._rows))
                longest = max(self._rows, key=lambda row: row[0].length)
                failure = self._failure("the next token could not be written", error, [longest])
            if failure is not None:
                self._fail_all({longest[0]}, failure)
                continue
            self._choose(logits, self._rows)
            if self._observer is not None:
                self._observer.stepped(len(self._rows))
            return

    def drop(self, gone: Callable[[Answer], bool]) -> None:
        """Take out answers that are `gone`."""
        under_way = {writing for writing, _ in self._rows if gone(writing.answer)}
        for writing in under_way:
            self.give_up(writing.answer)
        self._leave([*under_way])
        for reading, rows in list(self._readings):
            if any(gone(writing.answer) for writing, _ in rows):
                self._reread_without(reading, rows, gone)

    def clear(self) -> None:
        """Begin from nothing; nobody is told."""
        self._rows, self._readings = [], []
        self._batch = RunningBatch(self.bank.base.model)

    def give_up(self, answer: Answer) -> None:
        """Count an answer that was cancelled; tell of one that took too long."""
        if answer.cancelled:
            self.observe(answer, "cancelled")
        else:
            seconds = time.monotonic() - answer.asked
            answer.tell(Update(error=TimedOutError(f"not finished after {seconds:.0f} s")))
            self.observe(answer, "timeout")

    def observe(self, answer: Answer, outcome: str) -> None:
        """Tell the observer how an answer ended."""
        if self._observer is not None:
            self._observer.ended(answer, outcome)

    def _writings(self, answers: Sequence[Answer]) -> list[Row]:
        """The rows of `answers`, ready to begin; one that cannot be is told so."""
        rows = []
        for answer in answers:
            failure = None
            try:
                writing = Writing(answer, self.bank.base, self._ends)
            except Exception as error:  # of this answer
                logger.exception("beginning an answer failed")
                failure = self._failure("the answer could not be begun", error, [])
            if failure is None:
                rows += [(writing, voice) for voice in answer.voices]
                continue
            answer.tell(Update(error=failure))
            self.observe(answer, "error")
            self._queue.release([answer])
        return rows

    def _begin(self, rows: list[Row]) -> None:
        """Begin to read the inputs of `rows` together; where that fails, each apart."""
        if not rows:
            return
        base, failure = self.bank.base, None
        try:
            inputs = []
            for writing, voice in rows:
                prompt, prefix = writing.answer.prompt, voice.prefix
                own = None if prefix is None else prefix.for_input(prompt)
                inputs.append(RowInput(prompt, own))
            reading = Reading(base.model, inputs, base.layout, base.pad_token_id)
        except Exception as error:
            logger.exception("beginning to read inputs failed")
            failure = self._failure("the input could not be read", error, rows)
        if failure is None:
            self._readings.append((reading, rows))
        else:
            self._begin_apart(rows, failure)

    def _begin_apart(self, rows: list[Row], failure: PtkitError) -> None:
        """After a failure of inputs read together, each answer's apart; a lone one has failed."""
        writings = list(dict.fromkeys(writing for writing, _ in rows))
        if len(writings) == 1:
            self._fail_all({*writings}, failure)
            return
        for writing in writings:
            self._begin([row for row in rows if row[0] is writing])

    def _join(self, reading: Reading, rows: list[Row]) -> None:
        """Let finished inputs become rows, with their first tokens."""
        failed: dict[Writing, PtkitError] = {}
        joined: list[int] = []
        for index, row in enumerate(rows):
            if row[0] in failed:
                continue
            try:
                self._batch.join(reading, index)
            except Exception as error:  # of this row: those under way are as they were
                logger.exception("joining the batch failed")
                failed[row[0]] = self._failure("the answer could not be begun", error, rows)
                continue
            self._rows.append(row)
            joined.append(index)
        for writing, failure in failed.items():
            self._fail_all({writing}, failure)
        joined = [index for index in joined if rows[index][0] not in failed]
        if joined:
            self._choose(reading.logits[joined], [rows[index] for index in joined])

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> None:
        """The next token of every answer with all its rows among `rows`.

        logits: `[rows, vocabulary]`
        """
        # max gives a NaN where there is one, so a bad row is noticed at no further cost.
        best, likeliest = (t.tolist() for t in logits.max(-1))
        of: dict[Writing, list[int]] = {}
        for index, (writing, _) in enumerate(rows):
            of.setdefault(writing, []).append(index)
        ended = []
        for writing, indices in of.items():
            if len(indices) == 1 and writing.sampler.takes_the_likeliest:
                index = indices[0]
                if best[index] != best[index] or best[index] == float("inf"):
                    self._fail(writing, NotFiniteError())
                    ended.append(writing)
                    continue
                token = Token(likeliest[index])
            else:
                try:
                    token = writing.sampler.choose(together(logits[indices]))
                except Exception as error:  # of this answer; the others' tokens are chosen
                    if not isinstance(error, NotFiniteError):
                        logger.exception("choosing a token failed")
                    self._fail(writing, NotFiniteError(f"no token could be chosen: {error}"))
                    ended.append(writing)
                    continue
            try:
                finish = writing.take(token)
            except Exception as error:  # of this answer's text
                logger.exception("adding a token failed")
                self._fail(writing, PtkitError(f"the token could not be added: {said(error)}"))
                ended.append(writing)
                continue
            if finish is not None:
                self.observe(writing.answer, finish)
                ended.append(writing)
        self._leave(ended)

    def _leave(self, writings: Sequence[Writing]) -> None:
        """Take the rows of `writings`, and their uses of LoRA adapters, out."""
        if not writings:
            return
        gone = set(writings)
        for row in reversed(range(len(self._rows))):
            if self._rows[row][0] in gone:
                self._batch.leave(row)
                self._rows[row] = self._rows[-1]
                self._rows.pop()
        self._queue.release([writing.answer for writing in gone])

    def _reread_without(
        self,
        reading: Reading,
        rows: list[Row],
        gone: Callable[[Answer], bool],
    ) -> None:
        """Inputs read together are of one cache: those who stay are begun anew."""
        self._readings.remove((reading, rows))
        leaving = {writing for writing, _ in rows if gone(writing.answer)}
        for writing in leaving:
            self.give_up(writing.answer)
        self._leave([*leaving])
        staying = [row for row in rows if row[0] not in leaving]
        if staying:
            self._begin(staying)

    def _fail(self, writing: Writing, error: PtkitError) -> None:
        writing.answer.tell(Update(error=error))
        self.observe(writing.answer, "error")

    def _fail_all(self, writings: set[Writing], failure: PtkitError) -> None:
        for writing in writings:
            self._fail(writing, failure)
        self._leave([*writings])

    def _failure(self, what: str, error: Exception, rows: Sequence[Row]) -> PtkitError:
        """What the answers of `rows` are told of `error`. It does not hold on to `error`, whose
        frames hold tensors."""
        if not of_memory(error):
            return PtkitError(f"{what}: {said(error)}")
        if self._under_way() - {writing for writing, _ in rows}:
            return NoMemoryError(f"{what}: no memory is left beside the answers under way")
        return UserError(
            f"{what}: this machine's memory does not hold the request, even by itself; shorten "
            "the prompt or lower max_tokens"
        )

    def _under_way(self) -> set[Writing]:
        """The answers that have rows."""
        return {w for w, _ in self._rows} | {w for _, own in self._readings for w, _ in own}
