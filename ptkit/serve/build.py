"""The whole server from a model and a folder, for the command line and for other frameworks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import psutil
import torch

from ptkit.bank import AdapterBank
from ptkit.extras import extra
from ptkit.methods.base_names import is_here
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.answer import AnswerExecutor, StatLogger
from ptkit.serve.answers import RequestLimits
from ptkit.serve.app import create_app
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library
from ptkit.serve.metrics import Metrics
from ptkit.serve.scheduler import Scheduler

with extra("serve", "`ptkit serve`"):
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

MakeExecutor = Callable[[AdapterBank, Scheduler, StatLogger], AnswerExecutor]


def build_app(
    model: str | Base | None = None,
    adapters: Path | None = None,
    *,
    model_name: str | None = None,
    model_aliases: Collection[str] = (),
    budget: int | None = None,
    kv_bytes: int | None = None,
    packed: bool = True,
    max_batch: int = 64,
    max_queue: int = 256,
    max_tokens: int = 1024,
    timeout: float = 600.0,
    keys: tuple[str, ...] = (),
    allow_hub: bool = False,
    read_only: bool = False,
    loopback_only: bool = False,
    chosen: bool | None = None,
    executor: MakeExecutor | None = None,
) -> FastAPI:
    """An ASGI application that serves `model` (`tiny-en`) and every adapter directly below
    `adapters`.

    model_name: what requests call the base; default: its id, of a folder or file its name
    model_aliases: further names of it, which no list shows
    budget: bytes for prefixes on the device; None: no limit
    kv_bytes: bytes for keys and values of the running answers; an answer waits until all that it
        may come to need is free. None: half of what is free on the device now
    packed: keep copies of weights that a CPU multiplies faster (`ptkit.runtime.packed`), in a
        quarter of what is free at most
    max_batch, max_queue: answers written at the same time, and waiting
    max_tokens, timeout: of one answer, in tokens and seconds
    keys, loopback_only: see `create_app`; allow_hub, read_only, chosen: see `Library` (`chosen`
        where `model` is given, unless said otherwise)
    executor: makes what writes the answers instead of this process

    Adapters that cannot be served are left out with a warning. The engine, which runs from now
    on, is `app.state.library.engine`; it ends with the application.
    """
    chosen = model is not None if chosen is None else chosen
    base = model
    if not isinstance(base, Base):
        base = load_base(base or TINY_EN, device="auto")
    bank = AdapterBank(base, budget=budget)
    metrics = Metrics(bank)
    free = free_bytes(base.model.device)
    if kv_bytes is None and executor is None:
        kv_bytes = free // 2
    engine = Engine(
        bank, max_rows=max_batch, max_waiting=max_queue, logger=metrics, kv_bytes=kv_bytes,
        packed_bytes=free // 4 if packed else 0,
        executor=executor and (lambda scheduler: executor(bank, scheduler, metrics)),
    )  # fmt: skip
    metrics.watch(engine)
    name = model_name or named(base)
    library = Library(
        engine, adapters, base_name=name, base_aliases=model_aliases, allow_hub=allow_hub,
        allow_changes=not read_only, chosen=chosen,
    )  # fmt: skip
    for fault in library.register_all():
        logger.warning("left out: %s", fault)
    limits = RequestLimits(max_tokens=max_tokens, timeout=timeout)
    return create_app(library, metrics, limits, keys=keys, loopback_only=loopback_only)


def named(base: Base) -> str:
    """What requests call `base`: its id, of a folder or file its name."""
    return Path(base.id).name if is_here(base.id) else base.id


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
