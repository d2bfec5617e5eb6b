"""Answers written by llama.cpp's server, each in a slot that holds its adapter."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ptkit.bank import AdapterBank
from ptkit.errors import AdapterError, PtkitError, UserError
from ptkit.prefix import KVPrefix
from ptkit.runtime.cache import has_state, sees_everything, shares_keys
from ptkit.runtime.generation import end_ids
from ptkit.runtime.paged_support import longest_sequence
from ptkit.runtime.slot_file import placeholders, slot_file
from ptkit.serve.answer import Answer, Endings, EngineDiedError, StatLogger, Update
from ptkit.serve.decoding import DecodeState
from ptkit.serve.engines.llama_cpp.events import ServerEvent, asked_of_server, read_event
from ptkit.serve.engines.llama_cpp.server import LlamaCppSettings, LlamaServer, refused_restore
from ptkit.serve.engines.llama_cpp.trial import require_same_answers
from ptkit.serve.failures import said
from ptkit.serve.sampling import Token
from ptkit.serve.scheduler import Scheduler

logger = logging.getLogger(__name__)

#: News of a run whose slot is free again.
_FREE = object()
#: Seconds after which the loop looks for answers that are cancelled or late.
_LOOK = 0.05
_Result = TypeVar("_Result")


class _NotKnown:
    """What a slot holds that nothing is known of."""


@dataclass(eq=False)
class Slot:
    """A slot of the server. holds: a prefix, None for the plain base; used: when it last was"""

    number: int
    holds: KVPrefix | type[_NotKnown] | None = _NotKnown
    generation: int = 0
    busy: bool = False
    used: float = 0.0


@dataclass(eq=False)
class _Run:
    """An answer that has a slot. ended: its asker is told nothing more"""

    state: DecodeState
    prefix: KVPrefix | None
    slot: Slot
    task: asyncio.Task[None] | None = None
    ended: bool = False

    @property
    def answer(self) -> Answer:
        """The answer."""
        return self.state.answer


class SlotExecutor(Endings):
    """An executor whose rows are the slots of llama.cpp's server.

    An answer takes an idle slot that holds its adapter. Where there is none, the adapter is
    restored into the idle slot that was not used for the longest time. A slot that answers is never
    taken. The scheduler lets answers wait while all slots do.
    """

    def __init__(
        self,
        bank: AdapterBank,
        scheduler: Scheduler,
        stats: StatLogger | None,
        settings: LlamaCppSettings,
    ) -> None:
        """Start the server, and compare it with the base (see `require_same_answers`).

        Raises UserError for a base with more in its cache than keys and values of all tokens.
        """
        super().__init__(stats)
        model = bank.base.model
        if has_state(model) or shares_keys(model) or not sees_everything(model):
            raise UserError(
                f"layers of {bank.base.id} see a window, share keys or keep a state; llama.cpp "
                "keeps more for them than a slot file of keys and values holds"
            )
        self._base, self._scheduler = bank.base, scheduler
        self._ends = frozenset(end_ids(bank.base.model))
        own = longest_sequence(bank.base.model)
        self.longest: int = min(settings.context, own or settings.context)
        self._layout = settings.layout
        self._slots = [Slot(number) for number in range(settings.slots)]
        self._runs: set[_Run] = set()
        self._news: list[tuple[_Run, Any]] = []
        self._placeholders: WeakKeyDictionary[KVPrefix, list[int]] = WeakKeyDictionary()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="ptkit-llama-cpp", daemon=True
        )
        self._thread.start()
        try:
            self._server = self._wait(self._made(settings))
        except BaseException:
            self._end_loop()
            raise
        try:
            self._wait(self._server.ready())
            self._wait(require_same_answers(self._server, bank.base))
        except BaseException:
            self.close()
            raise

    # Called from the engine's thread

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._runs)

    @property
    def answers(self) -> list[Answer]:
        """The answers that are written."""
        return [run.answer for run in self._runs if not run.ended]

    def by_name(self) -> Counter[str]:
        """The number of taken slots by the names of their answers."""
        return Counter(run.answer.name for run in self._runs)

    def require(self, answer: Answer) -> None:
        """See `AnswerExecutor`. Raises AdapterError for what no slot can hold."""
        if len(answer.adapters) > 1:
            raise UserError("a slot of llama.cpp's server holds one adapter; ask for one at a time")
        sampling, adapter = answer.sampling, answer.adapters[0]
        if sampling.penalised:
            raise UserError(
                "`presence_penalty` and `frequency_penalty` are not supported with llama.cpp's "
                "server: it counts the tokens of the prompt, too"
            )
        if sampling.ignore_eos:
            raise UserError("`ignore_eos` is not supported with llama.cpp's server")
        why = _not_held(adapter.prefix)
        if adapter.lora is not None:
            why = "it changes the base's weights"
        if why is not None:
            raise AdapterError(
                f"`{adapter.name}`: {why}, so no slot of llama.cpp's server can hold it; serve it "
                "with ptkit's own engine"
            )

    def begin(self, answers: Sequence[Answer]) -> None:
        """Give a slot to each of `answers`; one that cannot be begun is told so."""
        for answer in answers:
            try:
                state = DecodeState(answer, self._base, self._ends)
                prefix: Any = answer.adapters[0].prefix
                run = _Run(state, prefix, self._free_slot(prefix))
            except Exception as error:  # of this answer
                logger.exception("beginning an answer failed")
                failure = PtkitError(f"the answer could not be begun: {said(error)}")
                answer.tell(Update(error=failure))
                self.log_end(answer, "error")
                self._scheduler.release([answer])
                continue
            run.slot.busy = True
            self._runs.add(run)
            self._loop.call_soon_threadsafe(self._start, run)

    def step(self) -> None:
        """Hand on what the server has written, or wait for it for a moment."""
        scheduler = self._scheduler

        def something() -> bool:
            begins = len(scheduler) > 0 and len(self._runs) < len(self._slots)
            return bool(self._news) or begins or scheduler.stopped

        with scheduler.changed:
            scheduler.changed.wait_for(something, timeout=_LOOK)
            news, self._news = self._news, []
        for run, what in news:
            try:
                self._take(run, what)
            except Exception as error:  # of this answer's text
                logger.exception("adding a token failed")
                self._fail(run, PtkitError(f"the token could not be added: {said(error)}"))

    def drop(self, gone: Callable[[Answer], bool]) -> None:
        """Take out answers that are `gone`. The server stops writing them."""
        for run in [run for run in self._runs if not run.ended and gone(run.answer)]:
            self.give_up(run.answer)
            self._end(run)

    def clear(self) -> None:
        """Stop writing; no answer is told."""
        for run in self._runs:
            run.ended = True
            self._loop.call_soon_threadsafe(self._stop, run)

    def close(self) -> None:
        """End the server."""
        self._wait(self._server.close())
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _free_slot(self, prefix: KVPrefix | None) -> Slot:
        """The idle slot that holds `prefix`, else the one not used for the longest time."""
        idle = [slot for slot in self._slots if not slot.busy]
        return min(idle, key=lambda slot: (slot.holds is not prefix, slot.used))

    def _take(self, run: _Run, what: Any) -> None:
        if what is _FREE:
            self._runs.discard(run)
            run.slot.busy, run.slot.used = False, time.monotonic()
        elif run.ended:
            return
        elif isinstance(what, PtkitError):
            self._fail(run, what)
        elif isinstance(what, ServerEvent):
            # Tokens that are not whole characters are not told, but counted.
            run.answer.written = max(0, what.written - len(what.tokens))
            for token in what.tokens:
                finish = run.state.take(token)
                if finish is not None:
                    self.log_end(run.answer, finish)
                    self._end(run)
                    return
            if what.finish is not None:
                run.state.end(what.finish)
                self.log_end(run.answer, what.finish)
                self._end(run)

    def _fail(self, run: _Run, failure: PtkitError) -> None:
        run.answer.tell(Update(error=failure))
        self.log_end(run.answer, "error")
        self._end(run)

    def _end(self, run: _Run) -> None:
        """Nothing more is told of `run`; its slot is free when the server has let go of it."""
        run.ended = True
        self._scheduler.release([run.answer])
        self._loop.call_soon_threadsafe(self._stop, run)

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # In the event loop

    @staticmethod
    async def _made(settings: LlamaCppSettings) -> LlamaServer:
        return LlamaServer(settings)

    def _start(self, run: _Run) -> None:
        run.task = self._loop.create_task(self._write(run))
        # However it ends, and even if it never began, the slot is given back.
        run.task.add_done_callback(lambda _: self._post(run, _FREE))

    @staticmethod
    def _stop(run: _Run) -> None:
        assert run.task is not None, "`_start` comes first"
        run.task.cancel()

    async def _write(self, run: _Run) -> None:
        """Write one answer, and tell the engine's thread of all that happens."""
        try:
            await self._answer(run)
        except PtkitError as error:
            self._post(run, error)
        except Exception as error:
            logger.exception("an answer failed")
            self._post(run, PtkitError(f"the answer failed: {said(error)}"))

    def _post(self, run: _Run, what: Any) -> None:
        with self._scheduler.changed:
            self._news.append((run, what))
            self._scheduler.changed.notify_all()

    async def _answer(self, run: _Run) -> None:
        """Raises EngineDiedError when the server ends, PtkitError for what it refuses."""
        lead = await self._lead(run.prefix)
        for _ in range(2):
            await self._hold(run.slot, run.prefix, lead)
            if await self._stream(run, lead):
                return
            # Somebody else, or the server itself, has put something else into the slot.
            run.slot.holds = _NotKnown
        raise PtkitError(
            "llama.cpp's server does not keep the adapter in its slot; does another client use it?"
        )

    async def _lead(self, prefix: KVPrefix | None) -> list[int]:
        """The ids that stand for the virtual tokens in a prompt."""
        if prefix is None:
            return []
        if prefix not in self._placeholders:
            made = await asyncio.to_thread(placeholders, prefix, self._base)
            self._placeholders[prefix] = made
        return self._placeholders[prefix]

    async def _hold(self, slot: Slot, prefix: KVPrefix | None, lead: list[int]) -> None:
        """Put `prefix` into `slot`, unless it is there."""
        generation = await self._server.ready()
        if slot.holds is prefix and slot.generation == generation:
            return
        slot.holds, slot.generation = _NotKnown, generation
        if prefix is None:
            await self._server.erase(slot.number)
        else:
            data = await asyncio.to_thread(slot_file, prefix, lead, self._layout)
            try:
                restored = await self._server.restore(slot.number, data)
            except EngineDiedError:
                raise
            except PtkitError as error:
                raise PtkitError(str(refused_restore(error, self._layout))) from error
            if restored != len(lead):
                raise PtkitError(f"llama.cpp's server restored {restored} of {len(lead)} tokens")
        slot.holds = prefix

    async def _stream(self, run: _Run, lead: list[int]) -> bool:
        """Write the answer. False: the slot did not hold the adapter, and nothing was told."""
        answer, sampling = run.answer, run.answer.sampling
        before = 0
        ids = [*lead, *answer.prompt]
        stream = self._server.stream(run.slot.number, ids, **asked_of_server(sampling))
        try:
            async for event in stream:
                kept = event.get("timings", {}).get("cache_n")
                if kept is not None and kept < len(lead):
                    return False
                written = read_event(event, before, sampling.logprobs or 0)
                if written.missing and sampling.logprobs is not None:
                    raise UserError(
                        "llama.cpp's server tells no log-probabilities of tokens that are parts "
                        "of a character, and this answer has some; ask without `logprobs`"
                    )
                before = written.written
                self._post(run, self._whole(written))
                if event["stop"]:
                    return True
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
        raise EngineDiedError("llama.cpp's server ended its answer before it was finished")

    def _whole(self, written: ServerEvent) -> ServerEvent:
        """`written` with tokens for a character that the server has told as text only."""
        if not written.missing or not written.text:
            return written
        ids = self._base.encode_part(written.text)
        return ServerEvent(tuple(map(Token, ids)), written.written, written.finish)


def _not_held(prefix: object) -> str | None:
    """Why no slot can hold it; None for a KV prefix and for the plain base."""
    if prefix is None:
        return None
    if not isinstance(prefix, KVPrefix):
        return "its keys and values depend on the input"
    if prefix.infix:
        return "its virtual tokens stand before the last word of each input, not at the front"
    if prefix.placeless:
        return "its texts begin at position 0, and those behind a slot's tokens after them"
    return None
