"""Adapters of all methods on vLLM's server under load, in turn with its plain base.

python scripts/vllm_load.py --engine-python .venv/vllm/bin/python --seconds 180

Three servers run: vLLM with ptkit's connector and adapters, vLLM without either, and `ptkit serve`.
Clients load one of them at a time, with the same prompts. While they load the first, adapters are
loaded, swapped and unloaded, and damaged files are offered. Every answer is compared with ptkit's
own greedy one. It prints a JSON object; `failures` lists what did not hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from one_client import code_of
from vllm_traffic import parser_of, run

from ptkit.bank import AdapterBank
from ptkit.bench.bases import random_prompts
from ptkit.formats.adapter_files import write_adapter
from ptkit.hub.engine_agreement import first_difference
from ptkit.hub.engine_runs.vllm import running
from ptkit.hub.engines.vllm import ADAPTERS as COMPILED
from ptkit.hub.vllm_server import VLLMServer, require_vllm
from ptkit.methods import ADAPTERS, Demonstrations
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.generation import end_ids
from ptkit.serve.engines import free_port
from ptkit.vllm_connector.files import TENSORS

#: What the base is called.
_BASE = "base"
#: The adapter that is swapped all along, and the two that it is in turn.
_MOVING, _VERSIONS = "moving", ("adapter-00", "adapter-07")
#: An adapter of which not all was written.
_HALF = "half-written"
#: Every so many requests is for the moving adapter; it has no factor in common with `--adapters`.
_EVERY = 17
#: The least share of the plain base's tokens per second.
_LEAST = 0.95
#: Two logits nearer than this are a tie, which rounding decides.
_TIE = 1e-3

#: Methods whose adapters compile to a KV prefix.
SECTIONS: tuple[dict[str, Any], ...] = (
    {"kind": "prefix_tuning", "num_virtual_tokens": 20},
    {"kind": "prompt_tuning", "num_virtual_tokens": 20},
    {"kind": "p_tuning", "num_virtual_tokens": 10},
    {"kind": "prefix_tuning", "num_virtual_tokens": 5},
    {"kind": "p_tuning", "num_virtual_tokens": 7, "encoder": "lstm"},
    {"kind": "prefix_tuning", "num_virtual_tokens": 10, "reparameterize": True},
)
_TEXTS = (
    "kind[boat], name[Ashmere], colour[green]\nThe boat Ashmere is green.",
    "My parcel is late and I want a refund.\nThis message is about shipping.",
    "kind[robot], name[Ferro], weight[two kilos]\nThe robot Ferro weighs two kilos.",
)


@dataclass
class Seen:
    """What the clients of one server have seen. wrong: numbers of requests, and the answers"""

    tokens: int = 0
    answers: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[int, list[int] | str]] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """The requests, in order: names, prompts, and the answers that are right."""

    names: Sequence[str]
    prompts: Sequence[list[int]]
    right: Sequence[Sequence[list[int]]]


class Plain(VLLMServer):
    """vLLM without the connector."""

    def command(self, folder: Path) -> list[str]:
        command = super().command(folder)
        at = command.index("--kv-transfer-config")
        return [*command[:at], *command[at + 2 :]]

    def environment(self, folder: Path) -> dict[str, str]:
        found = {**os.environ}
        found.pop("VLLM_PLUGINS", None)
        return found


def make_adapters(base: Base, folder: Path, number: int) -> list[str]:
    """Write `number` untrained adapters of all methods below `folder`; their names."""
    names = []
    for index in range(number):
        given = SECTIONS[index % len(SECTIONS)]
        method = ADAPTERS[given["kind"]]
        start = {} if given["kind"] == "p_tuning" else {"start": "vocabulary"}
        torch.manual_seed(index)
        section = method.section_class(**given, **start)
        adapter = method.create(section, base, Demonstrations(_TEXTS, index))
        names.append(f"adapter-{index:02d}")
        write_adapter(folder / names[-1], adapter.files())
    return names


def work_of(base: Base, bank: AdapterBank, names: Sequence[str], new: int, prompts: int) -> Work:
    """`prompts` requests for each adapter, and some for the one that is swapped."""
    asked = [names[n % len(names)] for n in range(prompts * len(names))]
    asked = [_MOVING if n % _EVERY == _EVERY - 1 else name for n, name in enumerate(asked)]
    lengths = np.random.default_rng(0).integers(12, 41, len(asked)).tolist()
    texts = [random_prompts(base, 1, n, seed)[0] for seed, n in enumerate(lengths)]
    known = {}
    for name in names:
        mine = [n for n, other in enumerate(asked) if other == name
                or (other == _MOVING and name in _VERSIONS)]  # fmt: skip
        answers = bank.generate_ids(
            [texts[n] for n in mine], [name] * len(mine), max_new_tokens=new, do_sample=False
        )
        known |= {(name, n): answer for n, answer in zip(mine, answers, strict=True)}
    right = [
        [known[version, n] for version in (_VERSIONS if name == _MOVING else (name,))]
        for n, name in enumerate(asked)
    ]
    return Work(asked, texts, right)


@dataclass(frozen=True)
class Server:
    """A server to load.

    wrong: an answer to the request of a number where it is not the right one, otherwise None.
        Without it the base answers all requests, and nothing is compared
    options: of its requests
    """

    url: str
    wrong: Callable[[int, dict[str, Any]], list[int] | str | None] | None
    options: dict[str, Any] = field(default_factory=lambda: {"return_token_ids": True})
    turns: Iterator[int] = field(default_factory=count)


def load(server: Server, work: Work, clients: int, seconds: float, new: int) -> tuple[Seen, float]:
    """Ask for `seconds`, `clients` at once; what was seen, and how long it took to the last
    answer."""
    seen, lock = Seen(), threading.Lock()

    def ask(http: httpx2.Client, turn: int) -> None:
        n = turn % len(work.names)
        body = {
            "model": _BASE if server.wrong is None else work.names[n],
            "prompt": work.prompts[n], "max_tokens": new, "temperature": 0,
            "ignore_eos": True, **server.options,
        }  # fmt: skip
        told = http.post("/v1/completions", json=body)
        with lock:
            if told.status_code != 200:
                seen.failed[f"{told.status_code}: {told.text[:200]}"] += 1
                return
            answer = told.json()
            seen.answers += 1
            seen.tokens += answer["usage"]["completion_tokens"]
            if server.wrong is not None:
                found = server.wrong(n, answer["choices"][0])
                if found is not None:
                    seen.wrong.append((n, found))

    return seen, at_once(server.url, server.turns, clients, seconds, ask)


def at_once(
    url: str,
    turns: Iterator[int],
    clients: int,
    seconds: float,
    ask: Callable[[httpx2.Client, int], None],
) -> float:
    """Let `clients` at once `ask` with the next of `turns` for `seconds`; how long it took to the
    last answer."""
    lock = threading.Lock()
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    until = time.monotonic() + seconds
    with httpx2.Client(base_url=url, timeout=600, limits=limits) as http:

        def client(_: int) -> None:
            while time.monotonic() < until:
                with lock:
                    turn = next(turns)
                ask(http, turn)

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        return time.perf_counter() - started


def quartiles(values: np.ndarray) -> dict[str, Any]:
    """The median of `values`, and their quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "quartiles": [low, high]}


def ids_of(base: Base, work: Work) -> Callable[[int, dict[str, Any]], list[int] | None]:
    """Of a choice: its token ids up to the end of the text where they are wrong."""
    ends = set(end_ids(base.model))

    def wrong(n: int, choice: dict[str, Any]) -> list[int] | None:
        ids: list[int] = choice["token_ids"]
        ids = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
        return None if ids in work.right[n] else ids

    return wrong


def make_half(root: Path, name: str) -> None:
    """Write an adapter below `root` that is `name`, cut short."""
    (root / _HALF).mkdir(exist_ok=True)
    for file in (root / name).iterdir():
        data = file.read_bytes()
        (root / _HALF / file.name).write_bytes(data[:500] if file.name == TENSORS else data)


@contextmanager
def changing(url: str, changes: Counter[str]) -> Iterator[None]:
    """Meanwhile adapters are swapped, loaded and unloaded, and a damaged one is offered."""
    stop = threading.Event()

    def change() -> None:
        with httpx2.Client(base_url=f"{url}/v1", timeout=600) as http:

            def post(what: str, wanted: int, **body: str) -> None:
                status = http.post(what, json=body).status_code
                changes[what if status == wanted else f"{what} answered {status}"] += 1

            for turn in count():
                if stop.is_set():
                    return
                post("swap_adapter", 200, name=_MOVING, path=_VERSIONS[turn % 2])
                post("load_adapter", 200, name="passing", path=f"adapter-{turn % 8:02d}")
                post("unload_adapter", 200, name="passing")
                post("load_adapter", 422, name="broken", path=_HALF)
                stop.wait(2.0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def own_server(
    given: argparse.Namespace, adapters: Path, log: Path, checkout: Path | None = None
) -> Iterator[str]:
    """`ptkit serve` of this code, or of the one in `checkout`, with the adapters; its address."""
    port = free_port()
    command = [
        sys.executable, "-m", "ptkit", "serve", "--model", given.model, "--adapters", adapters,
        "--port", str(port), "--max-batch", str(given.batch),
    ]  # fmt: skip
    with log.open("wb") as file:
        code = {} if checkout is None else code_of(checkout)
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **code}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(log.read_text(errors="replace")[-2000:])
            try:
                httpx2.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx2.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, on servers of its own."""
    require_vllm(given.engine_python)
    base = load_base(given.model, device="cpu")
    with tempfile.TemporaryDirectory(prefix="ptkit-load-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        names = make_adapters(base, folder / "made", given.adapters)
        bank = AdapterBank(base)
        for name in names:
            bank.load(folder / "made" / name)
        work = work_of(base, bank, names, given.new_tokens, given.prompts)
        with_adapters = VLLMServer(
            base, folder / "made", given.engine_python, "127.0.0.1", free_port(), "float32", _BASE,
            given.batch, options=tuple(given.options),
        )  # fmt: skip
        places = {kind: folder / kind for kind in ("vllm", "plain")}
        for place in places.values():
            place.mkdir()
        written = with_adapters.write(places["vllm"])
        assert written == names, written
        make_half(places["vllm"] / COMPILED, names[0])
        plain = Plain(**{**vars(with_adapters), "adapters": None, "port": free_port()})
        url, _ = stack.enter_context(running(with_adapters, places["vllm"]))
        plain_url, _ = stack.enter_context(running(plain, places["plain"]))
        own_url = stack.enter_context(own_server(given, folder / "made", folder / "own.log"))
        for address in (url, own_url):
            body = {"name": _MOVING, "path": _VERSIONS[0]}
            httpx2.post(f"{address}/v1/load_adapter", json=body, timeout=600).raise_for_status()
        changes: Counter[str] = Counter()
        results: dict[str, list[tuple[Seen, float]]] = {"vllm": [], "plain": [], "ptkit": []}
        each = given.seconds / given.rounds

        def wrong_text(n: int, choice: dict[str, Any]) -> str | None:
            texts = (base.tokenizer.decode(ids) for ids in work.right[n])
            return None if choice["text"].startswith(tuple(texts)) else choice["text"]

        servers = {
            "vllm": Server(url, ids_of(base, work)),
            "plain": Server(plain_url, None),
            "ptkit": Server(own_url, wrong_text, {}),
        }
        for server in servers.values():  # what compiles at first is no part of it
            load(server, work, given.clients, min(each, 10.0), given.new_tokens)
        for turn in range(given.rounds):
            for kind in sorted(results, reverse=bool(turn % 2)):
                changed = (
                    changing(url, changes)
                    if kind == "vllm" else nullcontext()
                )  # fmt: skip
                with changed:
                    results[kind].append(
                        load(servers[kind], work, given.clients, each, given.new_tokens)
                    )
        alive = httpx2.get(f"{url}/health", timeout=60).status_code == 200
        return report(given, base, bank, work, results, changes, alive)


def report(
    given: argparse.Namespace,
    base: Base,
    bank: AdapterBank,
    work: Work,
    results: dict[str, list[tuple[Seen, float]]],
    changes: Counter[str],
    alive: bool,
) -> dict[str, Any]:
    """The figures, and what did not hold."""
    speeds = {k: np.array([s.tokens / t for s, t in found]) for k, found in results.items()}
    found: dict[str, Any] = {
        "adapters": given.adapters, "clients": given.clients, "rounds": given.rounds,
        "seconds": given.seconds, "changes": dict(changes),
    }  # fmt: skip
    failures = [] if alive else ["vLLM's server is not healthy any more"]
    for kind, other in (("vllm", "plain"), ("vllm", "ptkit")):
        found[f"{kind} / {other}"] = quartiles(speeds[kind] / speeds[other])
    if found["vllm / plain"]["median"] < _LEAST:
        failures.append(f"slower than {_LEAST} of the plain base")
    failures += [f"{what}: {n} times" for what, n in changes.items() if " answered " in what]
    for kind, rounds in results.items():
        wrong = [gap(base, bank, work, n, told) for seen, _ in rounds for n, told in seen.wrong]
        failed = sum((seen.failed for seen, _ in rounds), Counter[str]())
        found[kind] = {
            "tokens_per_second": float(np.median(speeds[kind])),
            "answers": sum(seen.answers for seen, _ in rounds),
            "failed": dict(failed),
            "different": len(wrong),
            "largest_gap_where_different": max(wrong, default=0.0),
        }
        if failed:
            failures.append(f"{kind}: requests failed")
        if any(g > _TIE for g in wrong):
            failures.append(f"{kind}: answers differ where no tie is")
    return found | {"failures": failures}


def gap(base: Base, bank: AdapterBank, work: Work, number: int, told: list[int] | str) -> float:
    """Between ptkit's two likeliest logits where the answer `told` first differs; of the nearest
    version of the adapter. Of a text it is the smallest in the answer."""
    name, prompt = work.names[number], work.prompts[number]
    versions = _VERSIONS if name == _MOVING else (name,)
    return min(
        first_difference(base, bank.prefix(version), number, prompt, right, other).gap
        for version, right in zip(versions, work.right[number], strict=True)
        for other in (
            [told] if isinstance(told, list) else [right[:n] for n in range(len(right))]
        )
    )  # fmt: skip


def load_parser(about: str, rounds: int, clients: int) -> argparse.ArgumentParser:
    """The options of a measurement under load; rounds, clients: the defaults."""
    parser = parser_of(about, rounds)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--clients", type=int, default=clients)
    parser.add_argument("--batch", type=int, default=32, help="sequences at a time, of each server")
    parser.add_argument("--new-tokens", type=int, default=24)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = load_parser(str(__doc__), rounds=6, clients=64)
    parser.add_argument("--seconds", type=float, default=180, help="of load on each server")
    parser.add_argument("--prompts", type=int, default=16, help="for each adapter")
    return parser


if __name__ == "__main__":
    sys.exit(run(measure, _parser().parse_args()))
