"""From options of the command line to what writes the answers."""

from __future__ import annotations

from pathlib import Path

from ptkit.bank import AdapterBank
from ptkit.errors import UserError
from ptkit.runtime.slot_file import cache_layout
from ptkit.serve.answer import AnswerExecutor, StatLogger
from ptkit.serve.build import MakeExecutor
from ptkit.serve.engines.llama_cpp.executor import SlotExecutor
from ptkit.serve.engines.llama_cpp.server import LlamaCppSettings
from ptkit.serve.scheduler import Scheduler


def started(
    gguf: Path | None,
    dtype: str,
    slots: int,
    context: int,
    where: str | None = None,
    slot_folder: Path | None = None,
) -> MakeExecutor:
    """What starts llama.cpp's server, once the base is loaded. See `LlamaCppSettings`.

    dtype: of the server's cache. Raises UserError without `gguf`, and for what was not tried
    """
    if gguf is None:
        raise UserError("--engine llama-cpp needs --gguf FILE, the model's file")
    layout = cache_layout(gguf, dtype)
    settings = LlamaCppSettings(
        gguf.resolve(), layout, slots, context, where=where, slot_folder=slot_folder
    )

    def make(bank: AdapterBank, scheduler: Scheduler, stats: StatLogger) -> AnswerExecutor:
        return SlotExecutor(bank, scheduler, stats, settings)

    return make
