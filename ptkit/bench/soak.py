"""`ptkit bench soak`: swaps, loads, bad files and generation at once, for minutes on end."""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptkit.bank import AdapterBank
from ptkit.bench.bases import bench_base, random_prefixes, random_prompts
from ptkit.bench.result import BenchResult, Figure
from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import CONFIG, WEIGHTS
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import generate

ADAPTERS = 24
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@dataclass
class _Tally:
    """What the threads of a soak have seen; the lock guards the counts."""

    requests: int = 0
    failed: int = 0
    wrong: int = 0
    swaps: int = 0
    refused: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **changes: int) -> None:
        """Add to counts by name."""
        with self.lock:
            for name, change in changes.items():
                setattr(self, name, getattr(self, name) + change)


def bench_soak(model: str, *, minutes: float = 10.0, threads: int = 8) -> BenchResult:
    """Threads that generate in mixed batches while others swap, load and offer bad files.

    The bank's budget holds a third of the adapters, so that prefixes are evicted and read again
    throughout. Every answer is compared with the adapter's solo run; memory is the process's
    resident set, its last third against its second.
    """
    base = bench_base(model)
    own_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is that of the requests
    try:
        return _soak(base, minutes, threads)
    finally:
        torch.set_num_threads(own_threads)


def _soak(base: Base, minutes: float, threads: int) -> BenchResult:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        paths = random_prefixes(base, root / "good", ADAPTERS, 6)
        bad = _bad_files(paths[0], root / "bad")
        prompt = random_prompts(base, 1, 12)[0]
        every = AdapterBank(base)
        names = every.register_all(root / "good")
        solo = {name: _answers(base, [prompt], every.rows([name]))[0] for name in names}
        solo[""] = _answers(base, [prompt], None)[0]
        bank = AdapterBank(base, budget=every.resident_bytes // 3, check_every=0.05)
        bank.register_all(root / "good")
        bank.load(paths[0], "moving")
        tally, stop, memory = _Tally(), threading.Event(), []
        changing = max(1, threads // 4)

        def ask(thread: int) -> None:
            for turn in count(thread):
                if stop.is_set():
                    return
                asked = [names[(turn * 7 + i * 5) % ADAPTERS] for i in range(3)]
                try:
                    rows = bank.rows([*asked, None, "moving"])
                    found = _answers(base, [prompt] * 5, rows)
                except Exception:
                    tally.add(requests=1, failed=1)
                    continue
                right = [solo[name] for name in (*asked, "")]
                moving = found[4] in (solo[names[0]], solo[names[1]], solo[names[2]])
                tally.add(requests=1, wrong=int(found[:4] != right or not moving))

        def change(thread: int) -> None:
            for turn in count(thread):
                if stop.is_set():
                    return
                bank.swap("moving", paths[turn % 3])
                own = f"own-{thread}"
                bank.load(paths[turn % ADAPTERS], own)
                bank.unload(own)
                try:
                    bank.swap("moving", bad[turn % len(bad)])
                except AdapterError:
                    tally.add(swaps=1, refused=1)
                stop.wait(0.002)

        with ThreadPoolExecutor(threads) as pool:
            running = [pool.submit(change if i < changing else ask, i) for i in range(threads)]
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end and not any(f.done() for f in running):
                memory.append(_resident_set())
                stop.wait(min(1.0, minutes * 60 / 30))
            stop.set()
        for future in running:
            future.result()
    third = max(1, len(memory) // 3)
    middle, last = np.median(memory[third : 2 * third]), np.median(memory[-third:])
    return BenchResult(
        "soak",
        {"model": base.id, "minutes": minutes, "threads": threads, "adapters": ADAPTERS},
        "every row of every batch is compared with the adapter's solo run",
        [
            Figure("batches of five rows answered", tally.requests),
            Figure("failed", tally.failed, at_most=0),
            Figure("with a wrong token", tally.wrong, at_most=0),
            Figure("swaps", tally.swaps),
            Figure("bad files refused", tally.refused, at_least=tally.swaps),
            Figure("evictions", bank.counts.evictions),
            Figure("resident set, last third / second third", float(last / middle), "x",
                   at_most=1.02),
        ],
    )  # fmt: skip


def _answers(base: Base, prompts: list[list[int]], rows: PrefixBatch | None) -> list[list[int]]:
    return generate(base.model, prompts, rows, pad_token_id=base.pad_token_id, **OPTIONS)


def _bad_files(good: Path, folder: Path) -> list[Path]:
    """Adapter folders that must be refused: cut short, another base's shape, no safetensors."""
    weights, config = (good / WEIGHTS).read_bytes(), (good / CONFIG).read_text()
    contents = {"cut": weights[:-100], "empty": b"", "text": b"these are no tensors"}
    for name, content in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / CONFIG).write_text(config)
        (folder / name / WEIGHTS).write_bytes(content)
    return [folder / name for name in contents]


def _resident_set() -> int:
    """Bytes of the process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
