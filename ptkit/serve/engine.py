"""The loop that runs all answers: one batch, joined and left at token boundaries.

One thread runs the model (`ptkit.serve.executor`). Others hand in answers to write
(`ptkit.serve.scheduler`) and are told of every piece of text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError, UserError
from ptkit.runtime.block_pool import BLOCK_SIZE, position_bytes
from ptkit.serve.answer import (
    Answer,
    AnswerExecutor,
    DrainingError,
    RequestAdapter,
    StatLogger,
    TooLongError,
    Update,
)
from ptkit.serve.executor import Executor
from ptkit.serve.failures import said
from ptkit.serve.scheduler import BlockBudget, Scheduler

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over the adapters of a bank.

    max_rows: rows written at the same time
    max_waiting: answers that may wait for a row
    piece: tokens of inputs read between two steps of the running rows. Longer inputs are read
        in pieces, so that no row waits longer than that
    kv_bytes: memory for keys and values; an answer waits until all that it may come to need is
        free. None: no limit
    packed_bytes: memory for copies of weights that are multiplied faster
        (`ptkit.runtime.packed`), until the engine is closed
    executor: makes what writes the answers; default: an `Executor` in this process
    """

    def __init__(
        self,
        bank: AdapterBank,
        *,
        max_rows: int = 32,
        max_waiting: int = 256,
        piece: int = 512,
        kv_bytes: int | None = None,
        packed_bytes: int = 0,
        logger: StatLogger | None = None,
        executor: Callable[[Scheduler], AnswerExecutor] | None = None,
    ) -> None:
        self.bank = bank
        self.max_rows = max_rows
        block_bytes = BLOCK_SIZE * position_bytes(bank.base.layout, bank.base.model.dtype)
        most = None if kv_bytes is None else kv_bytes // block_bytes
        self._budget, self._block_bytes = BlockBudget(most), block_bytes
        self.scheduler = Scheduler(max_rows, max_waiting, self._budget)
        self.executor: AnswerExecutor = (
            Executor(bank, self.scheduler, piece, most, logger, packed_bytes)
            if executor is None
            else executor(self.scheduler)
        )
        self.longest = self.executor.longest
        self._thread = threading.Thread(target=self._run, name="ptkit-engine", daemon=True)
        self._thread.start()

    # Called from any thread

    def submit(self, answers: Sequence[Answer]) -> None:
        """Write `answers`; all are taken or none.

        Raises QueueFullError, DrainingError, InUseError when a LoRA adapter among them is being
        changed, and UserError when they can never fit.
        """
        self.scheduler.require_so_many(answers)
        for answer in answers:
            self._require_fit(answer)
        self.scheduler.submit(answers, self._is_stale)

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Stop writing `answers`; they are told nothing more."""
        self.scheduler.cancel(answers)

    def changing(self, name: str) -> AbstractContextManager[None]:
        """Within this context the LoRA adapter `name` may be replaced or taken out.

        A prefix may be at any time: rows keep the one they began with. Raises InUseError while
        answers use it.
        """
        return self.scheduler.changing(name)

    @property
    def waiting(self) -> int:
        """Answers waiting for a row."""
        return len(self.scheduler)

    @property
    def running(self) -> int:
        """Running rows, those whose input is being read included."""
        return self.executor.running

    @property
    def draining(self) -> bool:
        """Whether nothing more is taken."""
        return self.scheduler.draining

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Take no more; what is there is finished."""
        self.scheduler.close(stop=False)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.scheduler.empty and not self.executor.running

    def close(self) -> None:
        """End the loop at the next token; running answers are told that they failed."""
        self.scheduler.close(stop=True)
        self._thread.join()

    def _is_stale(self, adapter: RequestAdapter) -> bool:
        """Whether its prefix and LoRA are not, or no longer, of one adapter."""
        return adapter.prefix is not None and self.bank.parts(adapter.name)[0] is not adapter.prefix

    def _require_fit(self, answer: Answer) -> None:
        if len(answer.adapters) > self.max_rows:
            raise UserError(
                f"{len(answer.adapters)} adapters cannot answer together, at most {self.max_rows} "
                "can"
            )
        if self.longest is not None and answer.positions > self.longest:
            raise TooLongError(
                f"the request needs {answer.positions} positions (adapter "
                f"{answer.virtual_positions}, prompt "
                f"{len(answer.prompt)}, answer {answer.sampling.max_tokens}), of which "
                f"there are {self.longest} here; shorten the prompt or lower max_tokens"
            )
        self.executor.require(answer)
        most, needed = self._budget.most, self._budget.needed(answer)
        if most is not None and needed > most:
            raise UserError(
                f"the request may need {needed * self._block_bytes:,} bytes of keys and values, "
                f"this server has {most * self._block_bytes:,} for all answers; shorten the prompt "
                "or lower max_tokens"
            )

    # The loop

    def _run(self) -> None:
        scheduler = self.scheduler
        try:
            while True:
                with scheduler.changed:
                    scheduler.changed.wait_for(lambda: scheduler.stopped or not self.idle)
                    if scheduler.stopped:
                        return
                try:
                    self._turn()
                except Exception as error:  # whatever happens, the server stays up
                    logger.exception("a step of the batch failed")
                    failure = PtkitError(f"the batch failed: {said(error)}")
                else:
                    continue
                self._end_all(failure)
        finally:  # nobody is left waiting for a loop that has ended, for whatever reason
            with scheduler.changed:
                scheduler.draining = scheduler.stopped = True
            self._end_all(DrainingError("the server has shut down"))
            self.executor.close()

    def _turn(self) -> None:
        """Drop who is gone, begin what fits, and make one step."""
        self._drop_gone()
        executor = self.executor
        executor.begin(self.scheduler.admitted(executor.running, executor.by_name))
        self.scheduler.begun()
        executor.step()

    def _drop_gone(self) -> None:
        """Take out answers nobody waits for any more, and those that took too long."""
        now = time.monotonic()

        def gone(answer: Answer) -> bool:
            late = answer.deadline is not None and now > answer.deadline
            return answer.cancelled or late

        for answer in self.scheduler.take_gone(gone):
            self.executor.give_up(answer)
        self.executor.drop(gone)

    def _end_all(self, error: PtkitError) -> None:
        """Tell everybody of `error` and begin from nothing."""
        answers = self.scheduler.emptied(self.executor.answers)
        self.executor.clear()
        for answer in answers:
            answer.tell(Update(error=error))
            self.executor.log_end(answer, "error")
