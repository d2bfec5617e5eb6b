r"""One client at a time: `ptkit serve` beside llama.cpp's server, and beside another checkout.

ptkit models get smollm2-135m
python scripts/one_client.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --beside ../ptkit-before

llama.cpp's server reads the file as it is (Q4_1), ptkit its values in float32. Each is asked for
`--new` tokens after `--read` random words, in turn, on one thread. It prints a JSON object: tokens
per second, the time to the first token, and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from ptkit.bench.timing import Timing, ratio
from ptkit.serve.engines import free_port
from ptkit.serve.engines.llama_cpp import host
from ptkit.serve.engines.llama_cpp.server import found

#: Seconds until a server must be ready.
_START = 120.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@contextmanager
def served(url: str, words: list[str], told: bytes = b"", **environment: str) -> Iterator[str]:
    """`url` of a server that `words` start, ready; `told`: what it reads first."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=log, stderr=log,
            env={**os.environ, **_ONE_THREAD, **environment},
        )  # fmt: skip
        assert process.stdin is not None
        try:
            if told:
                process.stdin.write(told)
                process.stdin.flush()
            end = time.monotonic() + _START
            while not _ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    sys.exit(f"{words} is not ready:\n{log.read()[-2000:].decode()}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def code_of(checkout: Path) -> dict[str, str]:
    """The variables with which `python -m ptkit` runs the code in `checkout`, wherever it is."""
    return {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}


def ptkit_server(model: str, checkout: Path | None = None) -> Any:
    """`ptkit serve` of this code, or of the one in `checkout`."""
    port = free_port()
    own = {} if checkout is None else code_of(checkout)
    words = [sys.executable, "-m", "ptkit", "serve", "--model", model, "--port", str(port)]
    return served(f"http://127.0.0.1:{port}", words, **own)


def llama_server(gguf: Path, where: str | None, scratch: str, positions: int) -> Any:
    """llama.cpp's server with `gguf`, one slot and one thread."""
    port, (program, library) = free_port(), found(where)
    given = {
        "program": program, "library": library, "gguf": str(gguf), "port": port, "slots": 1,
        "positions": positions, "flash_attention": True, "cache": "f16", "folder": scratch,
        "threads": 1, "api_key": "none",
    }  # fmt: skip
    words = [sys.executable, str(host.__file__)]
    return served(f"http://127.0.0.1:{port}", words, json.dumps(given).encode() + b"\n")


@dataclass(frozen=True)
class Streamed:
    """An answer that was streamed: its tokens, and the seconds to the first and to the end.

    error: what stands in its place; empty: nothing
    """

    status: int
    tokens: int
    first: float
    whole: float
    error: str = ""


def streamed(http: httpx2.Client, body: Mapping[str, Any]) -> Streamed:
    """The answer to `body`, as a stream that ends with its usage."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    begun, first, used = time.perf_counter(), 0.0, 0
    with http.stream("POST", "/v1/completions", json=asked) as response:
        if response.status_code != 200:
            return Streamed(response.status_code, 0, 0.0, 0.0, response.read()[:500].decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("choices") and not first:
                first = time.perf_counter() - begun
            used = (event.get("usage") or {}).get("completion_tokens", used)
    return Streamed(200, used, first, time.perf_counter() - begun)


def answered(url: str, model: str, words: list[int], new: int) -> tuple[float, float]:
    """Seconds to the first token and to the last of `new` after the prompt `words`."""
    body = {
        "model": model, "prompt": words, "max_tokens": new, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    headers = {"Authorization": "Bearer none"}
    with httpx2.Client(base_url=url, headers=headers, timeout=600) as http:
        found = streamed(http, body)
    if found.error:
        sys.exit(f"{url}: {found.error}")
    if found.tokens != new:
        sys.exit(f"{url} wrote {found.tokens} tokens, {new} were asked for")
    return found.first, found.whole


def main() -> None:
    """Read the arguments, start the servers, ask, print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gguf", type=Path, required=True, help="of the same model")
    parser.add_argument("--llama-server", help="see ptkit serve; default: what is found")
    parser.add_argument("--beside", type=Path, help="a checkout of ptkit to compare with")
    parser.add_argument("--read", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        start = running.enter_context
        servers = {
            "ptkit": start(ptkit_server(given.model)),
            "llama.cpp": start(
                llama_server(given.gguf, given.llama_server, scratch, given.read + given.new + 8)
            ),
        }
        if given.beside is not None:
            servers["before"] = start(ptkit_server(given.model, given.beside.resolve()))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for number in range(given.rounds + 1):  # the first warms up
            words = [int(word) for word in draw.integers(5, 40_000, given.read)]
            for name, url in servers.items():
                taken = answered(url, given.model, words, given.new)
                if number:
                    times[name].append(taken)
    whole = {name: Timing([all_ for _, all_ in own]) for name, own in times.items()}
    first = {name: Timing([one for one, _ in own]) for name, own in times.items()}
    after = {name: Timing([all_ - one for one, all_ in own]) for name, own in times.items()}
    result: dict[str, Any] = {
        "tokens_per_second": {n: round(given.new / t.median, 2) for n, t in whole.items()},
        "first_token_seconds": {n: round(t.median, 3) for n, t in first.items()},
        "decoding_tokens_per_second": {
            n: round((given.new - 1) / t.median, 2) for n, t in after.items()
        },
    }
    for name in servers.keys() - {"ptkit"}:
        result[f"ptkit / {name}"] = {
            "whole": [round(x, 3) for x in ratio(whole[name], whole["ptkit"])],
            "first token": [round(x, 3) for x in ratio(first[name], first["ptkit"])],
            "decoding": [round(x, 3) for x in ratio(after[name], after["ptkit"])],
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
