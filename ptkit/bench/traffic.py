"""`ptkit bench traffic`: thousands of registered adapters, a budget for few, skewed requests."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptkit.bank import AdapterBank
from ptkit.bench.bases import ParityError, bench_base, random_prefixes, random_prompts
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import interleaved, ratio
from ptkit.errors import UserError
from ptkit.formats.sizes import in_bytes
from ptkit.prefix import KVLayout
from ptkit.runtime.generation import generate

#: Requests before anything is counted, per adapter the budget holds: the cache fills first.
WARM_UP = 20


def bench_traffic(
    model: str,
    *,
    adapters: int = 10_000,
    budget_adapters: int = 500,
    virtual_tokens: int = 10,
    requests: int = 20_000,
    batch: int = 16,
    new_tokens: int = 24,
    rounds: int = 10,
    exponent: float = 1.0,
    folder: Path | None = None,
) -> BenchResult:
    """Requests for `adapters` registered adapters with Zipf's frequencies (rank ** -exponent).

    The bank's budget holds `budget_adapters` of them; the rest stay on disk, one bfloat16 file
    each. Fetches are timed one by one over `requests` requests. Then batches of that traffic are
    generated, in turn with batches for one adapter.
    folder: where the files go (several GB for the default); it is created, and removed at the end.
    """
    base = bench_base(model)
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        _require_space(
            scratch, bytes_per_token(base.layout, torch.bfloat16) * virtual_tokens * adapters
        )
        random_prefixes(base, scratch, adapters, virtual_tokens, torch.bfloat16)
        one = bytes_per_token(base.layout, base.model.dtype) * virtual_tokens
        bank = AdapterBank(base, budget=one * budget_adapters)
        started = time.perf_counter()
        bank.register_all(scratch)
        registering = time.perf_counter() - started
        names = bank.list()
        generator = np.random.default_rng(0)
        weights = 1.0 / np.arange(1, adapters + 1) ** exponent
        # Ranks in an order of their own, so that popular adapters are not neighbours on disk.
        ranked = generator.permutation(adapters)
        drawn = ranked[generator.choice(
            adapters, size=WARM_UP * budget_adapters + requests, p=weights / weights.sum()
        )]  # fmt: skip
        traffic = [names[i] for i in drawn]
        for name in traffic[: WARM_UP * budget_adapters]:
            bank.prefix(name)
        before = bank.counts.hits
        seconds = []
        for name in traffic[-requests:]:
            clock = time.perf_counter()
            bank.prefix(name)
            seconds.append(time.perf_counter() - clock)
        hit_rate = (bank.counts.hits - before) / requests
        busiest = names[int(ranked[0])]
        prompts = random_prompts(base, batch, 32)
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
        }
        upcoming = iter(generator.permutation(drawn[-requests:]).tolist())

        def answer(rows: list[str]) -> list[list[int]]:
            return generate(
                base.model, prompts, bank.prefixes(rows), pad_token_id=base.pad_token_id, **options
            )

        def zipf() -> list[str]:
            return [names[next(upcoming)] for _ in range(batch)]

        rows = zipf()
        (alone,) = generate(
            base.model, prompts[:1], bank.prefixes(rows[:1]), pad_token_id=base.pad_token_id,
            **options,
        )  # fmt: skip
        if answer(rows)[0] != alone:
            raise ParityError("a row of the traffic's batch differs from its solo run")
        timings = interleaved(
            {"one": lambda: answer([busiest] * batch), "zipf": lambda: answer(zipf())},
            rounds=rounds,
        )
    finally:
        shutil.rmtree(scratch)
    relative = ratio(timings["one"], timings["zipf"])
    micro = np.array(seconds) * 1e6
    return BenchResult(
        "traffic",
        {
            "model": model, "adapters": adapters, "budget_adapters": budget_adapters,
            "virtual_tokens": virtual_tokens, "requests": requests, "zipf_exponent": exponent,
            "batch": batch, "new_tokens": new_tokens, "rounds": rounds,
        },
        "the first row's tokens equal its solo run's",
        [
            Figure(f"register {adapters:,} adapters", registering, "s", at_most=10.0),
            Figure("requests that found their adapter resident", hit_rate * 100, "%"),
            Figure("fetch, median", float(np.quantile(micro, 0.5)), "us"),
            Figure("fetch, 99th percentile", float(np.quantile(micro, 0.99)), "us"),
            Figure("resident bytes", bank.resident_bytes, "bytes", at_most=one * budget_adapters),
            Figure("throughput, Zipf traffic / one adapter", relative[0], "x", *relative[1:],
                   at_least=0.9),
        ],
    )  # fmt: skip


def bytes_per_token(layout: KVLayout, dtype: torch.dtype) -> int:
    """Bytes of one virtual token's keys and values in all layers."""
    return dtype.itemsize * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in layout)


def _require_space(folder: Path, needed: int) -> None:
    """Raise UserError unless `folder` has room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed * 1.05 > free:
        raise UserError(
            f"the adapters take {in_bytes(needed)}, {folder} has {in_bytes(free)} free; "
            "lower --adapters or give another --folder"
        )
