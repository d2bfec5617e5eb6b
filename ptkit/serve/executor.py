"""Prefill and decode of the running answers: for the loop's thread alone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError, UserError
from ptkit.prefix import KVPrefix
from ptkit.runtime.block_pool import BlockPool
from ptkit.runtime.decode_loop import DecodeLoop, LoopRow, Ready
from ptkit.runtime.generation import end_ids
from ptkit.runtime.packed import PackedWeights
from ptkit.runtime.paged_batch import PagedBatch, PagedSequence, SequenceInput
from ptkit.runtime.paged_support import longest_sequence
from ptkit.serve.answer import (
    Answer,
    Endings,
    NoMemoryError,
    RequestAdapter,
    StatLogger,
    Update,
)
from ptkit.serve.decoding import DecodeState, together
from ptkit.serve.failures import of_memory, said
from ptkit.serve.sampling import NotFiniteError, Token, sample
from ptkit.serve.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: Blocks that nobody uses are kept for requests with the same beginning, up to this many.
_KEPT_BLOCKS = 256


class AnswerRow(LoopRow):
    """A running sequence, and the answer it belongs to."""

    def __init__(self, state: DecodeState, sequence: PagedSequence) -> None:
        super().__init__(sequence)
        self.state = state

    @property
    def last_token(self) -> int:
        return self.state.last_token

    @property
    def owner(self) -> DecodeState:
        """Its answer: the rows of one answer are read before it begins."""
        return self.state


class Executor(Endings):
    """The rows of all running answers.

    scheduler: is told of answers that end
    piece: tokens of inputs read between two steps
    most: blocks of keys and values there may be; None: as memory lasts
    packed_bytes: that copies of weights may take (`ptkit.runtime.packed`)
    """

    def __init__(
        self,
        bank: AdapterBank,
        scheduler: Scheduler,
        piece: int,
        most: int | None,
        stats: StatLogger | None,
        packed_bytes: int = 0,
    ) -> None:
        super().__init__(stats)
        self._packed = PackedWeights(bank.base.model, packed_bytes)
        self.bank = bank
        self.longest = longest_sequence(bank.base.model)
        self._scheduler, self._piece, self._most = scheduler, piece, most
        self._ends = frozenset(end_ids(bank.base.model))
        self._loop = self._new_loop()

    def _new_loop(self) -> DecodeLoop[AnswerRow]:
        base = self.bank.base
        kept = _KEPT_BLOCKS if self._most is None else min(_KEPT_BLOCKS, self._most // 4)
        pool = BlockPool(base.layout, most=self._most, kept=kept)
        return DecodeLoop(PagedBatch(base.model, pool, self.bank.weights), self._piece)

    @property
    def running(self) -> int:
        """Running rows, those whose input is being read included."""
        return len(self._loop.rows)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held."""
        return self._loop.batch.pool.nbytes

    @property
    def answers(self) -> list[Answer]:
        """The answers that have rows."""
        return [state.answer for state in self._states()]

    def require(self, answer: Answer) -> None:
        """See `AnswerExecutor`: the engine has asked all there is to ask."""

    def by_name(self) -> Counter[str]:
        """The number of rows by the names of their answers."""
        return Counter(row.state.answer.name for row in self._loop.rows)

    def begin(self, answers: Sequence[Answer]) -> None:
        """Give rows to `answers`; one that cannot be begun is told so."""
        made: dict[tuple[int, tuple[int, ...]], KVPrefix] = {}
        for answer in answers:
            rows: list[AnswerRow] = []
            failure = None
            try:
                state = DecodeState(answer, self.bank.base, self._ends)
                for adapter in answer.adapters:
                    given = self._input(answer, adapter, made)
                    rows.append(AnswerRow(state, self._loop.batch.begin(given)))
            except Exception as error:  # of this answer
                logger.exception("beginning an answer failed")
                failure = self._failure("the answer could not be begun", error, ())
            if failure is None:
                self._loop.prefilling += rows
                continue
            for row in rows:
                self._loop.batch.end(row.sequence)
            answer.tell(Update(error=failure))
            self.log_end(answer, "error")
            self._scheduler.release([answer])

    def _input(
        self,
        answer: Answer,
        adapter: RequestAdapter,
        made: dict[tuple[int, tuple[int, ...]], KVPrefix],
    ) -> SequenceInput:
        """made: the prefixes of inputs so far, so that equal inputs have the same one"""
        prompt, prefix, lora = answer.prompt, None, None
        if adapter.prefix is not None:
            key = id(adapter.prefix), tuple(prompt)
            prefix = made.get(key) or adapter.prefix.for_input(prompt)
            made[key] = prefix
        if adapter.lora is not None:
            lora = adapter.lora, self.bank.versions(adapter.lora)[0]
        return SequenceInput(prompt, prefix, lora)

    def step(self) -> None:
        """Read a piece of the inputs and write one token in every row, in one pass. Rows whose
        inputs were read to their ends get their first tokens. Where the pass fails, its parts are
        made one by one, so that only what fails by itself has failed."""
        loop = self._loop
        if not loop.rows:
            return
        try:
            ready = loop.step()
        except Exception:
            logger.exception("a step failed; its parts are made one by one")
        else:
            self._advance(ready)
            return
        for rows in loop.pieces():
            self._prefill(rows)
        self._decode()

    def _advance(self, ready: Ready[AnswerRow]) -> None:
        """Give the rows that are `ready` their next tokens."""
        if ready.decoded and self._stats is not None:
            self._stats.stepped(ready.decoded)
        if ready.rows:
            self._choose(ready.logits, ready.rows)

    def _prefill(self, rows: Sequence[AnswerRow]) -> None:
        """Read a piece of the inputs of `rows`. Where that fails, each answer's apart; what fails
        by itself has failed."""
        failure = None
        try:
            self._loop.prefill(rows)
        except Exception as error:  # of these inputs; nobody else's rows are touched
            logger.exception("reading an input failed")
            failure = self._failure("the input could not be read", error, rows)
        if failure is None:
            return
        states = dict.fromkeys(row.state for row in rows)
        if len(states) == 1:
            self._fail(dict.fromkeys(states, failure))
            return
        for state in states:
            self._prefill([row for row in rows if row.state is state])

    def _decode(self) -> None:
        """Write one token in every row. Where memory does not last for all, the longest row is
        given up, until it lasts for the others."""
        while True:
            rows = self._loop.decoding
            try:
                ready = self._loop.decode()
            except Exception as error:
                if not of_memory(error):
                    raise
                logger.exception("no memory for the next token of %d rows", len(rows))
                longest = max(rows, key=lambda row: row.sequence.length)
                failure = self._failure("the next token could not be written", error, [longest])
            else:
                self._advance(ready)
                return
            self._fail({longest.state: failure})

    def drop(self, gone: Callable[[Answer], bool]) -> None:
        """Take out answers that are `gone`."""
        leaving = {state for state in self._states() if gone(state.answer)}
        for state in leaving:
            self.give_up(state.answer)
        self._leave(leaving)

    def clear(self) -> None:
        """Begin from nothing; no answer is told."""
        self._loop = self._new_loop()

    def close(self) -> None:
        """See `AnswerExecutor`."""
        self._packed.close()

    def _choose(self, logits: Tensor, rows: Sequence[AnswerRow]) -> None:
        """The next token of every answer with all its rows among `rows`.

        logits: `[rows, vocabulary]`
        """
        of: dict[DecodeState, list[int]] = {}
        for index, row in enumerate(rows):
            of.setdefault(row.state, []).append(index)
        if len(of) < len(rows):  # several adapters write one answer together
            logits = torch.stack([together(logits[indices]) for indices in of.values()])
        failed: dict[DecodeState, PtkitError] = {}
        ended = set()
        for state, token in zip(of, self._sampled(logits, [*of]), strict=True):
            if isinstance(token, NotFiniteError):
                failed[state] = token
                continue
            try:
                finish = state.take(token)
            except Exception as error:  # of this answer's text
                logger.exception("adding a token failed")
                failed[state] = PtkitError(f"the token could not be added: {said(error)}")
                continue
            if finish is not None:
                self.log_end(state.answer, finish)
                ended.add(state)
        self._leave(ended)
        self._fail(failed)

    def _sampled(
        self, logits: Tensor, states: Sequence[DecodeState]
    ) -> list[Token | NotFiniteError]:
        """The next token of each of `states`, or why there is none."""
        try:
            tokens = sample(logits, [state.sampler for state in states])
        except Exception as error:
            if len(states) == 1:
                logger.exception("choosing a token failed")
                return [NotFiniteError(f"no token could be chosen: {error}")]
            # Of one answer, perhaps: the others' tokens are chosen.
            return [
                one for row, state in zip(logits, states, strict=True)
                for one in self._sampled(row[None], [state])
            ]  # fmt: skip
        return [NotFiniteError() if token is None else token for token in tokens]

    def _leave(self, states: set[DecodeState]) -> None:
        """Take the rows of `states` out."""
        if not states:
            return
        self._loop.remove([row for row in self._loop.rows if row.state in states])
        self._scheduler.release([state.answer for state in states])

    def _fail(self, failures: dict[DecodeState, PtkitError]) -> None:
        for state, failure in failures.items():
            state.answer.tell(Update(error=failure))
            self.log_end(state.answer, "error")
        self._leave({*failures})

    def _failure(self, what: str, error: Exception, rows: Sequence[AnswerRow]) -> PtkitError:
        """What the answers of `rows` are told of `error`. It does not hold on to `error`, whose
        frames hold tensors."""
        if not of_memory(error):
            return PtkitError(f"{what}: {said(error)}")
        if self._states() - {row.state for row in rows}:
            return NoMemoryError(f"{what}: no memory is left beside the running answers")
        return UserError(
            f"{what}: this machine's memory does not hold the request, even by itself; shorten "
            "the prompt or lower max_tokens"
        )

    def _states(self) -> set[DecodeState]:
        """The answers that have rows."""
        return {row.state for row in self._loop.rows}
