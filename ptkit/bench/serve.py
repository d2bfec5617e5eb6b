"""`ptkit bench serve`: a server under load, beside what people run today."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import aiohttp
import numpy as np

from ptkit.bank import AdapterBank
from ptkit.bench.bases import ParityError, random_prefixes
from ptkit.bench.result import BenchResult, Figure, times
from ptkit.bench.timing import Timing, ratio
from ptkit.data.sources import BUILTIN
from ptkit.errors import UserError
from ptkit.extras import require
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN, TINY_EN_FOLDER
from ptkit.serve.engines import free_port

#: Who else is put under the same load.
PEERS = ("peft", "transformers")
#: Of so many requests one is streamed, which tells when its first token came.
STREAMED = 4
#: Seconds before a round counts, in which the clients get going.
RAMP = 1.0
#: What the mixed load is compared with is run for so much shorter.
_SHORTER = 3


@dataclass(frozen=True)
class Request:
    """A completion to ask for, and the greedy answer it must get; tokens: what it is long."""

    model: str
    prompt: str
    expected: str
    tokens: int


@dataclass
class Load:
    """What a round of load found. Seconds."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second: some adapters' answers are longer than others'."""
        return self.tokens / self.seconds


def bench_serve(
    model: str = TINY_EN,
    *,
    adapters: int = 32,
    clients: int = 64,
    seconds: float = 180.0,
    new_tokens: int = 24,
    virtual_tokens: int = 10,
    rounds: int = 6,
    against: Collection[str] = PEERS,
) -> BenchResult:
    """`clients` at once over `adapters` for `seconds` in all, in `rounds`. Between them run the
    same requests one at a time, and the same load on the base alone. The peers get the same load:
    PEFT + `set_adapter` behind FastAPI, and `transformers serve` for the base.

    Every answer is compared with its solo greedy run.
    """
    require("serve", "`ptkit bench serve`")
    base = load_base(model)
    scratch = Path(tempfile.mkdtemp())
    folder = str(TINY_EN_FOLDER) if model == TINY_EN else model
    try:
        random_prefixes(base, scratch, adapters, virtual_tokens)
        mixed, plain = _requests(base, scratch, model, new_tokens)
        with ExitStack() as servers:

            def started(*command: str) -> int:
                port = free_port()
                whole = [word.replace("PORT", str(port)) for word in command]
                servers.enter_context(_running(whole, port))
                return port

            ours = started(
                sys.executable, "-m", "ptkit", "serve", "--model", model, "--adapters",
                str(scratch), "--port", "PORT", "--log-level", "warning", "--read-only",
            )  # fmt: skip
            candidates = {
                "mixed": (ours, mixed, clients),
                "one": (ours, mixed, 1),
                "base": (ours, plain, clients),
            }
            if "peft" in against:
                peer = [sys.executable, "-m", "ptkit.bench.serve_peer", folder, str(scratch)]
                candidates["peft"] = started(*peer, "PORT"), mixed, clients
            if "transformers" in against:
                theirs = [replace(request, model=folder) for request in plain]
                program = str(Path(sys.executable).parent / "transformers")
                peer = [program, "serve", folder, "--dtype", "float32", "--port", "PORT"]
                candidates["transformers"] = started(*peer), theirs, clients
                candidates["paged"] = started(*peer, "--continuous-batching"), theirs, clients
            for port, requests, _ in candidates.values():  # read adapters, allocate caches
                asyncio.run(_load(port, requests, 8, 3.0, new_tokens))
            found: dict[str, list[Load]] = {name: [] for name in candidates}
            for _ in range(rounds):
                for name, (port, requests, at_once) in candidates.items():
                    lasting = seconds / rounds / (1 if name == "mixed" else _SHORTER)
                    load = asyncio.run(_load(port, requests, at_once, lasting, new_tokens))
                    found[name].append(load)
    finally:
        shutil.rmtree(scratch)
    failed = [f for name in ("mixed", "one", "base") for load in found[name] for f in load.failures]
    wrong = [f for loads in found.values() for load in loads for f in load.failures]
    if failed:
        raise ParityError(f"{len(failed)} answers failed or differ; the first: {failed[0]}")
    _require_answers(found)
    return BenchResult(
        "serve",
        {"model": model, "adapters": adapters, "clients": clients, "seconds": seconds,
         "new_tokens": new_tokens, "virtual_tokens": virtual_tokens, "rounds": rounds},
        f"all {sum(load.answers for load in found['mixed']):,} answers of the mixed load, and all "
        f"others, equal their solo greedy runs ({len(wrong)} of the peers' differ)",
        _figures(found, clients),
    )  # fmt: skip


def _require_answers(found: dict[str, list[Load]]) -> None:
    """Raise UserError where a server was not given the time for one answer."""
    for name, loads in found.items():
        if not all(load.tokens for load in loads):
            raise UserError(
                f"`{name}` had no answer in one of its rounds; give more time (--seconds) or fewer "
                "clients (--clients)"
            )


def _figures(found: dict[str, list[Load]], clients: int) -> list[Figure]:
    def faster(one: str, other: str) -> tuple[float, Any, float, float]:
        per_token = {n: Timing(tuple(1 / load.rate for load in found[n])) for n in (one, other)}
        return times(ratio(per_token[other], per_token[one]))

    def quantile(values: Sequence[float], share: float) -> float:
        return float(np.quantile(values, share)) * 1000

    mixed = found["mixed"]
    latencies = [s for load in mixed for s in load.latencies]
    firsts = [s for load in mixed for s in load.first_tokens]
    answers, tokens, seconds = (
        sum(getattr(load, name) for load in mixed) for name in ("answers", "tokens", "seconds")
    )
    return [
        Figure("answers that failed or differ", 0.0, "", at_most=0.0),
        Figure("answers per second", answers / seconds),
        Figure("tokens per second", tokens / seconds),
        Figure(f"{clients} clients / one", *faster("mixed", "one"), at_least=5.0),
        Figure(
            "mixed / the base alone", *faster("mixed", "base"), at_least=0.9
        ),
        *(
            Figure(what, *faster(one, other))
            for what, one, other in (
                ("over PEFT + set_adapter behind FastAPI", "mixed", "peft"),
                ("base, over transformers serve", "base", "transformers"),
                ("base, over transformers serve --continuous-batching", "base", "paged"),
            )
            if other in found
        ),
        Figure("latency, median", quantile(latencies, 0.5), "ms"),
        Figure("latency, 95th percentile", quantile(latencies, 0.95), "ms"),
        Figure("first token, median", quantile(firsts, 0.5), "ms"),
        Figure("first token, 95th percentile", quantile(firsts, 0.95), "ms"),
    ]  # fmt: skip


def _requests(
    base: Base, adapters: Path, model: str, new_tokens: int
) -> tuple[list[Request], list[Request]]:
    """Requests over all adapters, and the same prompts for the base, with their solo answers."""
    bank = AdapterBank(base)
    names = bank.register_all(adapters)
    rows = (BUILTIN / "facts-to-text" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [f"{json.loads(row)['facts']}\n" for row in rows][: max(64, len(names))]
    mixed: list[Request] = []
    plain: list[Request] = []
    for number, prompt in enumerate(prompts):
        name = names[number % len(names)]
        for row, requests, called in ((name, mixed, name), (None, plain, model)):
            (ids,) = bank.generate_ids(
                base.encode([prompt]), [row], max_new_tokens=new_tokens,
                do_sample=False,
            )  # fmt: skip
            (text,) = base.decode([ids])
            requests.append(Request(called, prompt, text, min(len(ids) + 1, new_tokens)))
    return mixed, plain


async def _load(
    port: int, requests: Sequence[Request], clients: int, seconds: float, new_tokens: int
) -> Load:
    """`clients` ask one after the other, each its next as soon as it is answered."""
    load, numbers = Load(), count()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    started = time.perf_counter() + min(RAMP, seconds / 10)
    end = started + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            number = next(numbers)
            request = requests[number % len(requests)]
            asked = time.perf_counter()
            try:
                text, first = await _ask(session, port, request, new_tokens, number % STREAMED == 0)
            except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
                load.failures.append(f"{type(error).__name__}: {error}")
                continue
            now = time.perf_counter()
            if text != request.expected:
                load.failures.append(f"{request.model}: {text!r} for {request.expected!r}")
            if started <= now <= end:
                load.answers += 1
                load.tokens += request.tokens
                load.latencies.append(now - asked)
                if first is not None:
                    load.first_tokens.append(first - asked)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    load.seconds = seconds
    return load


async def _ask(
    session: aiohttp.ClientSession, port: int, request: Request, new_tokens: int, stream: bool
) -> tuple[str, float | None]:
    """The answer, and when its first token came if it is streamed."""
    body = {
        "model": request.model, "prompt": request.prompt, "max_tokens": new_tokens,
        "temperature": 0, "stream": stream,
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise ValueError(f"status {response.status}: {await response.text()}")
        if response.content_type != "text/event-stream":
            return (await response.json())["choices"][0]["text"], None
        text, first = "", None
        async for line in response.content:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            first = first or time.perf_counter()
            choices = json.loads(data)["choices"]
            text += (choices[0].get("text") or "") if choices else ""
        return text, first


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """A server's process while the context lasts, from when it listens on."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, port, log, command)
            yield
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: IO[str], command: list[str]) -> None:
    """Return when the server on `port` answers. Raises UserError when it ends instead."""
    while True:
        if process.poll() is not None:
            log.seek(0)
            raise UserError(f"{' '.join(command[:4])} ended at once: {log.read()[-500:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
        except urllib.error.HTTPError:
            return  # it answers, if only with 404
        except OSError:
            time.sleep(0.1)
        else:
            return
