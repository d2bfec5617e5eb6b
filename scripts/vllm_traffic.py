"""Thousands of adapters on vLLM's server, memory for few, requests with Zipf's frequencies.

python scripts/vllm_traffic.py --engine-python .venv/vllm/bin/python --adapters 10000 --budget 500

It writes random prefixes, starts vLLM's server with them, and sends requests while it counts what
the workers read from disk and keep. Then it times first tokens of an adapter that is in memory,
in turn with the base's. It prints a JSON object; `failures` lists what did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
from safetensors.torch import save

from ptkit.bench.timing import Timing, ratio
from ptkit.formats import atomic
from ptkit.hub.engine_runs.vllm import running
from ptkit.hub.engines.vllm import ADAPTERS, CODE, record_of, write_connector
from ptkit.hub.vllm_server import VLLMServer, require_vllm
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base, load_base
from ptkit.serve.engines import free_port
from ptkit.vllm_connector.files import ABOUT, TENSORS

#: Requests of the base and of the adapter before first tokens are timed.
_WARM_UP = 5
#: The most that the time to an adapter's first token may be, of the base's.
_SLOWEST = 1.1
#: What is read from vLLM's `/metrics`.
COUNTS = (
    "ptkit:prefix_loads_total", "ptkit:prefix_fetches_total", "ptkit:prefix_fetch_seconds_total",
    "ptkit:prefix_kept_bytes", "ptkit:adapter_reads_total", "ptkit:spool_bytes", "ptkit:adapters",
)  # fmt: skip


def write_prefixes(base: Base, folder: Path, count: int, virtual_tokens: int) -> int:
    """Write `count` random prefixes below `folder`; the bytes of one's keys and values."""
    shape = base.layout.widest
    size = (shape.kv_heads, virtual_tokens, shape.key_dim)
    layers = len(base.layout)
    zeros = (torch.zeros(size),) * layers
    record = record_of(KVPrefix(zeros, zeros), base)
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        drawn = 0.3 * torch.randn((2, layers, *size), generator=generator)
        tensors = {
            f"{part}.{layer}": states[layer].contiguous()
            for part, states in zip(("keys", "values"), drawn, strict=True)
            for layer in range(layers)
        }
        data = save(tensors)
        own = replace(record, sha256=hashlib.sha256(data).hexdigest())
        place = folder / f"adapter-{number:05d}"
        place.mkdir(parents=True)
        (place / TENSORS).write_bytes(data)
        (place / ABOUT).write_text(json.dumps(own.as_json()), encoding="utf-8")
    return record.nbytes


def zipf(count: int, requests: int, exponent: float, seed: int = 0) -> list[int]:
    """Numbers below `count`, drawn with frequencies rank ** -exponent; ranks are shuffled."""
    generator = np.random.default_rng(seed)
    weights = np.arange(1, count + 1, dtype=float) ** -exponent
    drawn = generator.choice(count, size=requests, p=weights / weights.sum())
    return [int(n) for n in generator.permutation(count)[drawn]]


def counts(url: str) -> dict[str, float]:
    """The values of `COUNTS` now."""
    lines = httpx2.get(f"{url}/metrics", timeout=300).text.splitlines()
    found = {}
    for name in COUNTS:
        values = [line.split()[-1] for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        found[name] = sum(map(float, values))
    return found


def memory(pid: int) -> int:
    """Resident bytes of a process and those that it started."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in processes if process.is_running())


def ask_all(
    url: str, names: Sequence[str], prompts: Sequence[list[int]], at_once: int, tokens: int = 4
) -> Counter[int]:
    """Send a request for each of `names`, `at_once` at a time; how often each status came."""
    limits = httpx2.Limits(max_connections=at_once)
    with (
        httpx2.Client(base_url=url, timeout=600, limits=limits) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):

        def ask(name: str, prompt: list[int]) -> int:
            body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            return client.post("/v1/completions", json=body).status_code

        return Counter(pool.map(ask, names, prompts))


def first_token(client: httpx2.Client, name: str, prompt: list[int]) -> float:
    """Seconds until the first token of a streamed answer."""
    body = {"model": name, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                return time.perf_counter() - started
    raise SystemExit(f"`{name}` was not answered: {response.status_code}")


def first_tokens(
    url: str, base: str, adapter: str, rounds: int, length: int, vocabulary: int
) -> tuple[Timing, Timing]:
    """Times to first tokens of the adapter and of the base, in turn, for prompts that are new."""
    draw = np.random.default_rng(1)
    times: dict[str, list[float]] = {adapter: [], base: []}
    with httpx2.Client(base_url=url, timeout=600) as client:
        for turn in range(_WARM_UP + rounds):
            order = [adapter, base] if turn % 2 else [base, adapter]
            for name in order:
                prompt = draw.integers(5, vocabulary, length).tolist()
                seconds = first_token(client, name, prompt)
                if turn >= _WARM_UP:
                    times[name].append(seconds)
    return Timing(tuple(times[adapter])), Timing(tuple(times[base]))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, on a server of its own."""
    require_vllm(given.engine_python)
    base = load_base(given.model, device="cpu")
    vocabulary = base.embedding.num_embeddings
    with tempfile.TemporaryDirectory(prefix="ptkit-vllm-", dir=given.folder) as scratch:
        folder = Path(scratch)
        write_connector(folder / CODE)
        one = write_prefixes(base, folder / ADAPTERS, given.adapters, given.virtual_tokens)
        budget = one * given.budget
        settings = {"worker_bytes": budget, "spool_bytes": budget, "spool": str(folder)}
        server = VLLMServer(
            base, None, given.engine_python, "127.0.0.1", free_port(), "float32", "base",
            given.at_once, options=tuple(given.options), settings=settings,
        )  # fmt: skip
        started = time.perf_counter()
        with running(server, folder) as (url, pid):
            ready = time.perf_counter() - started
            names = [f"adapter-{n:05d}" for n in zipf(given.adapters, given.requests, given.zipf)]
            draw = np.random.default_rng(2)
            prompts = [draw.integers(5, vocabulary, 16).tolist() for _ in names]
            half = len(names) // 2
            statuses, seconds, seen = Counter[int](), [], [(memory(pid), counts(url))]
            for part in (slice(0, half), slice(half, None)):
                began = time.perf_counter()
                statuses += ask_all(url, names[part], prompts[part], given.at_once)
                seconds.append(time.perf_counter() - began)
                seen.append((memory(pid), counts(url)))
            resident = Counter(names[half:]).most_common(1)[0][0]
            timings = first_tokens(
                url, "base", resident, given.rounds, given.prompt_tokens, vocabulary
            )
    return report(given, one, ready, statuses, seconds, seen, timings)


def report(
    given: argparse.Namespace,
    one: int,
    ready: float,
    statuses: Counter[int],
    seconds: list[float],
    seen: list[tuple[int, dict[str, float]]],
    timings: tuple[Timing, Timing],
) -> dict[str, Any]:
    """The figures, and what did not hold."""
    (_, middle), (bytes_after, last) = seen[1], seen[2]
    second = {name: last[name] - middle[name] for name in COUNTS}
    loads, fetches = second["ptkit:prefix_loads_total"], second["ptkit:prefix_fetches_total"]
    slower, low, high = ratio(*timings)
    kept = max(found["ptkit:prefix_kept_bytes"] for _, found in seen)
    failures = []
    if set(statuses) != {200}:
        failures.append(f"statuses: {dict(statuses)}")
    if kept > one * given.budget:
        failures.append(f"workers kept {kept:,.0f} bytes, budget {one * given.budget:,}")
    if slower > _SLOWEST:
        failures.append(f"an adapter's first token takes {slower:.2f} of the base's time")
    return {
        "adapters": given.adapters, "budget": given.budget, "requests": given.requests,
        "zipf_exponent": given.zipf, "virtual_tokens": given.virtual_tokens, "bytes_of_one": one,
        "seconds_until_ready": ready, "requests_per_second": given.requests / sum(seconds),
        "second_half": {
            "loads": loads, "fetches_from_spool": fetches,
            "share_in_memory": 1 - fetches / loads if loads else None,
            "milliseconds_per_fetch": (
                1000 * second["ptkit:prefix_fetch_seconds_total"] / fetches if fetches else None
            ),
            "reads_of_adapter_folders": second["ptkit:adapter_reads_total"],
        },
        "kept_bytes": kept, "spool_bytes": max(found["ptkit:spool_bytes"] for _, found in seen),
        "resident_memory": {
            "before": seen[0][0], "after_half": seen[1][0], "after_all": bytes_after,
        },
        "first_token": {
            "adapter_ms": 1000 * timings[0].median, "base_ms": 1000 * timings[1].median,
            "ratio": slower, "low": low, "high": high, "rounds": given.rounds,
        },
        "failures": failures,
    }  # fmt: skip


def parser_of(about: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a measurement on vLLM's server; rounds: the default."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--model", default="tiny-en")
    parser.add_argument("--rounds", type=int, default=rounds, help="of what is timed in turn")
    parser.add_argument("--out", type=Path, help="a file for the result")
    parser.add_argument("options", nargs="*", help="vLLM's own, after --")
    return parser


def run(measured: Callable[[argparse.Namespace], dict[str, Any]], given: argparse.Namespace) -> int:
    """Print what `measured` finds, and write it to `--out`; the exit code, 1 with `failures`."""
    result = measured(given)
    print(json.dumps(result, indent=1))
    if given.out is not None:
        atomic.write_json(given.out, result)
    return 1 if result["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(str(__doc__), rounds=100)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--budget", type=int, default=500, help="adapters that memory holds")
    parser.add_argument("--virtual-tokens", type=int, default=10)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the frequencies")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of those requests")
    parser.add_argument("--folder", type=Path, help="where adapters and spool lie for the time")
    return parser


if __name__ == "__main__":
    sys.exit(run(measure, _parser().parse_args()))
