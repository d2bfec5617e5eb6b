"""ptkit's own engine over many adapters, in turn with vLLM's plain base and another checkout.

python scripts/engine_beside_vllm.py --engine-python .venv/vllm/bin/python --beside ../ptkit-before

Three servers run: `ptkit serve` of this code and of the other checkout, each with the adapters, and
vLLM with the base alone. Clients load one of them at a time with the same prompts: greedily, by
sampling, and greedily in streams, whose first tokens are timed. It prints a JSON object of ratios.
`failures` lists requests that failed or were too short.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from one_client import streamed
from vllm_load import Plain, at_once, load_parser, make_adapters, own_server, quartiles
from vllm_traffic import run

from ptkit.bench.bases import random_prompts
from ptkit.hub.engine_runs.vllm import running
from ptkit.hub.vllm_server import require_vllm
from ptkit.runtime.base_model import load_base
from ptkit.serve.engines import free_port

#: What vLLM's base is called.
_BASE = "base"
#: What each way of asking adds to a request.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
    "streamed": {"temperature": 0, "stream": True},
}


@dataclass
class Seen:
    """What the clients of one server have seen in one turn."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    faults: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Server:
    """A server to load. names: what requests call its models, in turn"""

    url: str
    names: Sequence[str]
    turns: Iterator[int] = field(default_factory=count)


def load(
    server: Server, prompts: Sequence[list[int]], clients: int, seconds: float, body: dict[str, Any]
) -> tuple[Seen, float]:
    """Ask for `seconds`, `clients` at once; what was seen, and how long it took to the last
    answer."""
    seen, lock = Seen(), threading.Lock()

    def ask(http: httpx2.Client, turn: int) -> None:
        asked = {
            "model": server.names[turn % len(server.names)],
            "prompt": prompts[turn % len(prompts)], "ignore_eos": True, **body,
        }  # fmt: skip
        if body.get("stream"):
            found = streamed(http, asked)
            status, used, first = found.status, found.tokens, found.first
        else:
            told = http.post("/v1/completions", json=asked)
            status, first = told.status_code, 0.0
            used = told.json()["usage"]["completion_tokens"] if status == 200 else 0
        with lock:
            seen.tokens += used
            seen.first.append(first)
            if status != 200 or used != body["max_tokens"]:
                seen.faults.add(f"status {status}, {used} tokens")

    return seen, at_once(server.url, server.turns, clients, seconds, ask)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, on servers of its own."""
    require_vllm(given.engine_python)
    base = load_base(given.model, device="cpu")
    lengths = np.random.default_rng(0).integers(12, 41, given.prompts).tolist()
    prompts = [random_prompts(base, 1, n, seed)[0] for seed, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory(prefix="ptkit-beside-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        names = make_adapters(base, folder / "made", given.adapters)
        start = stack.enter_context
        servers = {
            "ptkit": Server(start(own_server(given, folder / "made", folder / "own.log")), names)
        }
        if given.beside is not None:
            url = start(
                own_server(given, folder / "made", folder / "before.log", given.beside.resolve())
            )
            servers["before"] = Server(url, names)
        plain = Plain(
            base, None, given.engine_python, "127.0.0.1", free_port(), "float32", _BASE,
            given.batch, options=tuple(given.options),
        )  # fmt: skip
        (folder / "plain").mkdir()
        plain.write(folder / "plain")
        servers["vllm"] = Server(start(running(plain, folder / "plain"))[0], [_BASE])
        speeds: dict[tuple[str, str], list[float]] = {}
        firsts: dict[str, list[float]] = {kind: [] for kind in servers}
        faults: set[str] = set()
        for turn in range(given.rounds + 1):  # the first warms up
            for kind in sorted(servers, reverse=bool(turn % 2)):
                for way, options in WAYS.items():
                    body = {"max_tokens": given.new_tokens, **options}
                    seen, took = load(servers[kind], prompts, given.clients, given.seconds, body)
                    faults |= {f"{kind}, {way}: {fault}" for fault in seen.faults}
                    if turn:
                        speeds.setdefault((kind, way), []).append(seen.tokens / took)
                        if way == "streamed":
                            firsts[kind].append(float(np.quantile(seen.first, 0.95)))
        return report(given, speeds, firsts, faults)


def report(
    given: argparse.Namespace,
    speeds: Mapping[tuple[str, str], Sequence[float]],
    firsts: Mapping[str, Sequence[float]],
    faults: set[str],
) -> dict[str, Any]:
    """The ratios of each round, and what did not hold."""
    found: dict[str, Any] = {
        "model": given.model, "adapters": given.adapters, "clients": given.clients,
        "rounds": given.rounds, "seconds": given.seconds,
        "tokens_per_second": {
            f"{kind}, {way}": round(float(np.median(all_)), 1)
            for (kind, way), all_ in speeds.items()
        },
        "first_token_p95_seconds": {
            kind: round(float(np.median(all_)), 3) for kind, all_ in firsts.items()
        },
        "sampled / greedy": {
            kind: quartiles(np.divide(speeds[kind, "sampled"], speeds[kind, "greedy"]))
            for kind in firsts
        },
    }  # fmt: skip
    for other in firsts.keys() - {"ptkit"}:
        found[f"ptkit / {other}"] = {
            way: quartiles(np.divide(speeds["ptkit", way], speeds[other, way])) for way in WAYS
        } | {"first token, p95": quartiles(np.divide(firsts["ptkit"], firsts[other]))}
    return found | {"failures": sorted(faults)}


def _parser() -> argparse.ArgumentParser:
    parser = load_parser(str(__doc__), rounds=3, clients=32)
    parser.add_argument("--beside", type=Path, help="a checkout of ptkit to compare with")
    parser.add_argument("--seconds", type=float, default=15, help="of each turn")
    parser.add_argument("--prompts", type=int, default=96, help="of 12 to 40 random tokens")
    return parser


if __name__ == "__main__":
    sys.exit(run(measure, _parser().parse_args()))
