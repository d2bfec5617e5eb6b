"""The loop that runs all answers: one batch, joined and left at token boundaries.

One thread owns the model. Others hand in answers to write and are told of every piece of text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError, UserError
from ptkit.prefix import Compiled
from ptkit.runtime.generation import end_ids
from ptkit.runtime.running import Reading, RowInput, RunningBatch, longest_row
from ptkit.serve.sampling import NotFiniteError, Sampler, Sampling, Token
from ptkit.serve.text import TextStream

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length"]


class QueueFullError(PtkitError):
    """As many answers wait as may wait; the same request may be taken later."""


class DrainingError(PtkitError):
    """The engine finishes what it has and takes no more."""


class TimedOutError(PtkitError):
    """The answer was not finished in time."""


class NoMemoryError(PtkitError):
    """The answers under way leave no memory for this one; the same request may be taken later."""


class InUseError(UserError):
    """The adapter takes part in answers under way and cannot be changed now."""


@dataclass(frozen=True)
class Voice:
    """What one row of an answer speaks with, as it was when the answer was asked for.

    prefix: what gives the row its own, once its input is read
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

    voices: one, or several that write one answer together (the mean of their log-probabilities
        decides every token, as in `AdapterBank.ensemble`)
    tell: called with every update, from the engine's thread: it must not block
    each_piece: tell of every piece; otherwise once, at the end
    deadline: `time.monotonic()` after which it is given up; None: never
    """

    prompt: list[int]
    voices: tuple[Voice, ...]
    sampling: Sampling
    tell: Callable[[Update], None]
    each_piece: bool = True
    deadline: float | None = None
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    written: int = 0

    @property
    def name(self) -> str:
        """What its requests are counted under."""
        return self.voices[0].name if len(self.voices) == 1 else "ensemble"

    @property
    def virtual_tokens(self) -> int:
        """Positions its longest prefix takes."""
        return max(voice.virtual_tokens for voice in self.voices)

    @property
    def positions(self) -> int:
        """Positions its longest row may take."""
        return self.virtual_tokens + len(self.prompt) + self.sampling.max_tokens


class Observer(Protocol):
    """Is told what the engine does (see `ptkit.serve.metrics`)."""

    def stepped(self, rows: int) -> None:
        """One token was written in each of `rows` rows."""

    def ended(self, answer: Answer, outcome: str) -> None:
        """An answer ended: `stop`, `length`, `cancelled`, `timeout` or `error`."""


class _Writing:
    """The state of an answer under way: its sampler, its text and the rows it has."""

    def __init__(self, answer: Answer, engine: Engine) -> None:
        base = engine.bank.base
        self.answer = answer
        self.sampler = Sampler(answer.sampling, base.model.device)
        self._stream = TextStream(base.tokenizer, answer.sampling.stop, base.frame)
        self._ends = frozenset() if answer.sampling.ignore_eos else engine.end_ids
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self.last_token = 0

    def take(self, token: Token) -> FinishReason | None:
        """Add a token to the answer and tell of what is new. Returns why it ended, if it did."""
        answer = self.answer
        if answer.first_token is None:
            answer.first_token = time.monotonic()
        finish: FinishReason | None = None
        text = ""
        self.last_token = token.id
        answer.written += 1
        if token.id in self._ends:
            finish, text = "stop", self._stream.finish()
        else:
            self._tokens.append(token)
            piece = self._stream.push(token.id)
            text = piece.text
            if piece.stopped:
                finish = "stop"
            elif answer.written >= answer.sampling.max_tokens:
                finish, text = "length", text + self._stream.finish()
        self._text.append(text)
        if finish or (answer.each_piece and text):
            answer.tell(Update("".join(self._text), tuple(self._tokens), finish))
            self._text, self._tokens = [], []
        return finish


class Engine:
    """Continuous batching over the adapters of a bank.

    max_rows: rows written at the same time
    max_waiting: answers that may wait for a row
    piece: tokens of inputs read between two steps of the rows under way; longer inputs are read
        in pieces, so that they hold back nobody for longer than that

    Among those waiting, the adapter with the fewest rows under way comes first, then who asked
    first: one adapter's crowd does not keep another's out.
    """

    def __init__(
        self,
        bank: AdapterBank,
        *,
        max_rows: int = 32,
        max_waiting: int = 256,
        piece: int = 512,
        observer: Observer | None = None,
    ) -> None:
        self.bank = bank
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.longest = longest_row(bank.base.model)
        self.end_ids = frozenset(end_ids(bank.base.model))
        self._piece = piece
        self._observer = observer
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        # Taken out of the queue to be begun; nothing is in neither place.
        self._starting: list[Answer] = []
        self._draining = self._stopped = False
        # Adapters being changed, and how many answers, waiting or under way, use each LoRA one.
        self._changing: set[str] = set()
        self._uses: Counter[str] = Counter()
        # The loop's own: rows under way in the batch's order, and inputs being read.
        self._batch = RunningBatch(bank.base.model)
        self._rows: list[tuple[_Writing, Voice]] = []
        self._readings: list[tuple[Reading, list[tuple[_Writing, Voice]]]] = []
        self._thread = threading.Thread(target=self._run, name="ptkit-engine", daemon=True)
        self._thread.start()

    # Called from any thread

    def submit(self, answers: Sequence[Answer]) -> None:
        """Write `answers`; all are taken or none.

        Raises QueueFullError, DrainingError, InUseError when a LoRA adapter among them is being
        changed, and UserError when they can never fit.
        """
        if len(answers) > self.max_waiting:
            raise UserError(
                f"the request asks for {len(answers)} answers, of which at most "
                f"{self.max_waiting} may wait here; ask for fewer (`n`, prompts)"
            )
        for answer in answers:
            self._require_fit(answer)
        with self._changed:
            if self._draining:
                raise DrainingError("the server is shutting down")
            if len(self._waiting) + len(answers) > self.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} answers are waiting, of at most {self.max_waiting}"
                )
            voices = [(v, v.lora) for a in answers for v in a.voices if v.lora is not None]
            for voice, lora in voices:
                # Its prefix, if it has one, must be the one that came with the LoRA of now.
                if lora in self._changing or self._is_stale(voice):
                    raise InUseError(f"`{voice.name}` is being changed; ask again")
            self._uses.update(lora for _, lora in voices)
            self._waiting.extend(answers)
            self._changed.notify_all()

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Stop writing `answers`; they are told nothing more."""
        with self._changed:
            for answer in answers:
                answer.cancelled = True
            self._changed.notify_all()

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Within this context the LoRA adapter `name` may be replaced or taken out.

        A prefix may be at any time: rows keep the one they began with. Raises InUseError while
        answers use it.
        """
        with self._changed:
            if self._uses[name] or name in self._changing:
                raise InUseError(
                    f"`{name}` changes weights and is in use; try again when its answers are done"
                )
            self._changing.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._changing.discard(name)

    @property
    def waiting(self) -> int:
        """Answers waiting for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows under way, those whose input is being read included."""
        return len(self._rows) + sum(len(rows) for _, rows in self._readings)

    @property
    def draining(self) -> bool:
        """Whether nothing more is taken."""
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Take no more; what is there is finished."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._starting or self._rows or self._readings)

    def close(self) -> None:
        """End the loop at the next token; answers under way are told that they failed."""
        with self._changed:
            self._draining = self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _is_stale(self, voice: Voice) -> bool:
        """Whether its prefix and LoRA are not, or no longer, of one adapter."""
        return voice.prefix is not None and self.bank.parts(voice.name)[0] is not voice.prefix

    def _require_fit(self, answer: Answer) -> None:
        if len(answer.voices) > self.max_rows:
            raise UserError(
                f"{len(answer.voices)} adapters cannot answer together, at most {self.max_rows} can"
            )
        if self.longest is not None and answer.positions > self.longest:
            raise UserError(
                f"the request needs {answer.positions} positions (adapter "
                f"{answer.virtual_tokens}, prompt "
                f"{len(answer.prompt)}, answer {answer.sampling.max_tokens}), the model has "
                f"{self.longest}; shorten the prompt or lower max_tokens"
            )

    # The loop

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or not self.idle)
                    if self._stopped:
                        return
                try:
                    self._turn()
                except Exception as error:  # whatever happens, the server stays up
                    logger.exception("a step of the batch failed")
                    failure = PtkitError(f"the batch failed: {_said(error)}")
                else:
                    continue
                self._end_all(failure)
        finally:  # nobody is left waiting for a loop that has ended, for whatever reason
            with self._changed:
                self._draining = self._stopped = True
            self._end_all(DrainingError("the server has shut down"))

    def _turn(self) -> None:
        """Drop who is gone, begin what fits, read a piece of each input, write one token each."""
        self._drop_gone()
        for answers in self._admitted():
            self._begin(self._writings(answers))
        self._starting.clear()
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
        self._step()

    def _step(self) -> None:
        """Write one token in every row. Where memory does not last for all, the longest row, which
        decides how much is needed for each, is given up, until it lasts for the others."""
        while self._rows:
            failure = None
            try:
                with self.bank.weights([voice.lora for _, voice in self._rows]):
                    logits = self._batch.step([writing.last_token for writing, _ in self._rows])
            except Exception as error:
                if not _of_memory(error):
                    raise
                logger.exception("no memory for the next token of %d rows", len(self._rows))
                longest = max(self._rows, key=lambda row: _length(row[0]))
                failure = self._failure("the next token could not be written", error, [longest])
            if failure is not None:
                self._fail_all({longest[0]}, failure)
                continue
            self._choose(logits, self._rows)
            if self._observer is not None:
                self._observer.stepped(len(self._rows))
            return

    def _admitted(self) -> list[list[Answer]]:
        """Take out of the queue what is begun now: groups whose inputs are read together.

        Nothing but book-keeping: whoever asks meanwhile waits for the lock.
        """
        groups: list[list[Answer]] = []
        group: list[Answer] = []
        rows = longest = begun = 0  # rows, longest of the group; begun: rows of all groups
        passed_over: list[Answer] = []
        long_one = bool(self._readings)  # short ones are read within their first turn
        with self._changed:
            while self._waiting:
                answer = self._fairest()
                voices = len(answer.voices)
                if self.running + begun + voices > self.max_rows:
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

    def _writings(self, answers: Sequence[Answer]) -> list[tuple[_Writing, Voice]]:
        """The rows of `answers`, ready to begin; one that cannot be is told so."""
        rows = []
        for answer in answers:
            failure = None
            try:
                writing = _Writing(answer, self)
            except Exception as error:  # of this answer
                logger.exception("beginning an answer failed")
                failure = self._failure("the answer could not be begun", error, [])
            if failure is None:
                rows += [(writing, voice) for voice in answer.voices]
                continue
            answer.tell(Update(error=failure))
            self._observe(answer, "error")
            self._release([answer])
        return rows

    def _fairest(self) -> Answer:
        """Take out the answer to begin next."""
        if len(self._waiting) > 1:
            under_way = Counter(w.answer.name for w, _ in self._rows)
            for _, rows in self._readings:
                under_way.update(w.answer.name for w, _ in rows)
            answer = min(self._waiting, key=lambda a: under_way[a.name])  # the first of equals
            self._waiting.remove(answer)
            return answer
        return self._waiting.popleft()

    def _begin(self, rows: list[tuple[_Writing, Voice]]) -> None:
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

    def _begin_apart(self, rows: list[tuple[_Writing, Voice]], failure: PtkitError) -> None:
        """After a failure of inputs read together, each answer's apart; a lone one has failed."""
        writings = list(dict.fromkeys(writing for writing, _ in rows))
        if len(writings) == 1:
            self._fail_all({*writings}, failure)
            return
        for writing in writings:
            self._begin([row for row in rows if row[0] is writing])

    def _join(self, reading: Reading, rows: list[tuple[_Writing, Voice]]) -> None:
        """Let finished inputs become rows, with their first tokens."""
        failed: dict[_Writing, PtkitError] = {}
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

    def _choose(self, logits: Tensor, rows: Sequence[tuple[_Writing, Voice]]) -> None:
        """The next token of every answer with all its rows among `rows`.

        logits: `[rows, vocabulary]`
        """
        # max gives a NaN where there is one, so a bad row is noticed at no further cost.
        best, likeliest = (t.tolist() for t in logits.max(-1))
        of: dict[_Writing, list[int]] = {}
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
                    token = writing.sampler.choose(_together(logits[indices]))
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
                self._fail(writing, PtkitError(f"the token could not be added: {_said(error)}"))
                ended.append(writing)
                continue
            if finish is not None:
                self._observe(writing.answer, finish)
                ended.append(writing)
        self._leave(ended)

    def _leave(self, writings: Sequence[_Writing]) -> None:
        """Take the rows of `writings`, and their uses of LoRA adapters, out."""
        if not writings:
            return
        gone = set(writings)
        for row in reversed(range(len(self._rows))):
            if self._rows[row][0] in gone:
                self._batch.leave(row)
                self._rows[row] = self._rows[-1]
                self._rows.pop()
        self._release([writing.answer for writing in gone])

    def _release(self, answers: Sequence[Answer]) -> None:
        """Take out the uses of LoRA adapters of `answers`."""
        with self._changed:
            for answer in answers:
                self._uses.subtract(v.lora for v in answer.voices if v.lora is not None)

    def _drop_gone(self) -> None:
        """Take out answers nobody waits for any more, and those that took too long."""
        now = time.monotonic()

        def gone(answer: Answer) -> bool:
            late = answer.deadline is not None and now > answer.deadline
            return answer.cancelled or late

        with self._changed:
            queued = [answer for answer in self._waiting if gone(answer)]
            for answer in queued:
                self._waiting.remove(answer)
                self._uses.subtract(v.lora for v in answer.voices if v.lora is not None)
        under_way = {writing for writing, _ in self._rows if gone(writing.answer)}
        for answer in [*queued, *(writing.answer for writing in under_way)]:
            self._give_up(answer)
        self._leave([*under_way])
        for reading, rows in list(self._readings):
            if any(gone(writing.answer) for writing, _ in rows):
                self._reread_without(reading, rows, gone)

    def _reread_without(
        self,
        reading: Reading,
        rows: list[tuple[_Writing, Voice]],
        gone: Callable[[Answer], bool],
    ) -> None:
        """Inputs read together are of one cache: those who stay are begun anew."""
        self._readings.remove((reading, rows))
        leaving = {writing for writing, _ in rows if gone(writing.answer)}
        for writing in leaving:
            self._give_up(writing.answer)
        self._leave([*leaving])
        staying = [row for row in rows if row[0] not in leaving]
        if staying:
            self._begin(staying)

    def _give_up(self, answer: Answer) -> None:
        if answer.cancelled:
            self._observe(answer, "cancelled")
        else:
            seconds = time.monotonic() - answer.asked
            answer.tell(Update(error=TimedOutError(f"not finished after {seconds:.0f} s")))
            self._observe(answer, "timeout")

    def _fail(self, writing: _Writing, error: PtkitError) -> None:
        writing.answer.tell(Update(error=error))
        self._observe(writing.answer, "error")

    def _fail_all(self, writings: set[_Writing], failure: PtkitError) -> None:
        for writing in writings:
            self._fail(writing, failure)
        self._leave([*writings])

    def _failure(
        self, what: str, error: Exception, rows: Sequence[tuple[_Writing, Voice]]
    ) -> PtkitError:
        """What the answers of `rows` are told of `error`. It does not hold on to `error`, whose
        frames hold tensors."""
        if not _of_memory(error):
            return PtkitError(f"{what}: {_said(error)}")
        others = {w for w, _ in self._rows} | {w for _, own in self._readings for w, _ in own}
        if others - {writing for writing, _ in rows}:
            return NoMemoryError(f"{what}: no memory is left beside the answers under way")
        return UserError(
            f"{what}: this machine's memory does not hold the request, even by itself; shorten "
            "the prompt or lower max_tokens"
        )

    def _end_all(self, error: PtkitError) -> None:
        """Tell everybody of `error` and begin from nothing."""
        writings = {w for w, _ in self._rows} | {w for _, rows in self._readings for w, _ in rows}
        under_way = [writing.answer for writing in writings]
        with self._changed:
            starting = [a for a in self._starting if a not in under_way]
            answers = [*self._waiting, *starting, *under_way]
            self._waiting.clear()
            self._starting.clear()
            self._uses.clear()
        self._rows, self._readings = [], []
        self._batch = RunningBatch(self.bank.base.model)
        for answer in answers:
            answer.tell(Update(error=error))
            self._observe(answer, "error")

    def _observe(self, answer: Answer, outcome: str) -> None:
        if self._observer is not None:
            self._observer.ended(answer, outcome)


def _length(writing: _Writing) -> int:
    """Positions its longest row takes by now."""
    answer = writing.answer
    return answer.virtual_tokens + len(answer.prompt) + answer.written


def _of_memory(error: Exception) -> bool:
    """Whether `error` says that memory, of the device or the machine, ran out."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _together(logits: Tensor) -> Tensor:
    """One row of scores from an answer's rows, `[rows, vocabulary]`."""
    if len(logits) == 1:
        return logits[0]
    return torch.log_softmax(logits.float(), -1).mean(0)
