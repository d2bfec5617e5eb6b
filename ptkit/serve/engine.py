"""The loop that runs all answers: one batch, joined and left at token boundaries.

One thread owns the model (`ptkit.serve.rows`). Others hand in answers to write
(`ptkit.serve.queue`) and are told of every piece of text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError, UserError
from ptkit.runtime.running import longest_row
from ptkit.serve.answer import Answer, DrainingError, Observer, Update, Voice
from ptkit.serve.failures import said
from ptkit.serve.queue import Queue
from ptkit.serve.rows import Rows

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over the adapters of a bank.

    max_rows: rows written at the same time
    max_waiting: answers that may wait for a row
    piece: tokens of inputs read between two steps of the rows under way; longer inputs are read
        in pieces, so that they hold back nobody for longer than that
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
        self.longest = longest_row(bank.base.model)
        self.queue = Queue(max_rows, max_waiting, piece)
        self.rows = Rows(bank, self.queue, piece, observer)
        self._thread = threading.Thread(target=self._run, name="ptkit-engine", daemon=True)
        self._thread.start()

    # Called from any thread

    def submit(self, answers: Sequence[Answer]) -> None:
        """Write `answers`; all are taken or none.

        Raises QueueFullError, DrainingError, InUseError when a LoRA adapter among them is being
        changed, and UserError when they can never fit.
        """
        self.queue.require_so_many(answers)
        for answer in answers:
            self._require_fit(answer)
        self.queue.submit(answers, self._is_stale)

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Stop writing `answers`; they are told nothing more."""
        self.queue.cancel(answers)

    def changing(self, name: str) -> AbstractContextManager[None]:
        """Within this context the LoRA adapter `name` may be replaced or taken out.

        A prefix may be at any time: rows keep the one they began with. Raises InUseError while
        answers use it.
        """
        return self.queue.changing(name)

    @property
    def waiting(self) -> int:
        """Answers waiting for a row."""
        return len(self.queue)

    @property
    def running(self) -> int:
        """Rows under way, those whose input is being read included."""
        return self.rows.running

    @property
    def draining(self) -> bool:
        """Whether nothing more is taken."""
        return self.queue.draining

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Take no more; what is there is finished."""
        self.queue.close(stop=False)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.queue.empty and not self.rows.running

    def close(self) -> None:
        """End the loop at the next token; answers under way are told that they failed."""
        self.queue.close(stop=True)
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
        queue = self.queue
        try:
            while True:
                with queue.changed:
                    queue.changed.wait_for(lambda: queue.stopped or not self.idle)
                    if queue.stopped:
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
            with queue.changed:
                queue.draining = queue.stopped = True
            self._end_all(DrainingError("the server has shut down"))

    def _turn(self) -> None:
        """Drop who is gone, begin what fits, read a piece of each input, write one token each."""
        self._drop_gone()
        rows = self.rows
        for answers in self.queue.admitted(rows.running, rows.reading, rows.by_name):
            rows.begin(answers)
        self.queue.begun()
        rows.advance()
        rows.step()

    def _drop_gone(self) -> None:
        """Take out answers nobody waits for any more, and those that took too long."""
        now = time.monotonic()

        def gone(answer: Answer) -> bool:
            late = answer.deadline is not None and now > answer.deadline
            return answer.cancelled or late

        for answer in self.queue.take_gone(gone):
            self.rows.give_up(answer)
        self.rows.drop(gone)

    def _end_all(self, error: PtkitError) -> None:
        """Tell everybody of `error` and begin from nothing."""
        answers = self.queue.emptied(self.rows.answers)
        self.rows.clear()
        for answer in answers:
            answer.tell(Update(error=error))
            self.rows.observe(answer, "error")
