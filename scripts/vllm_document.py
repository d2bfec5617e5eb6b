r"""A document in front of every request on vLLM, and its distilled prefix in its place.

ptkit distill handbook.txt --model smollm2-135m --tokens 256 --out runs/handbook
python scripts/vllm_document.py --document handbook.txt --adapter runs/handbook \
    --model smollm2-135m --engine-python .venv/vllm/bin/python -- --max-model-len 2304

Both are asked the same new questions, in turn: with vLLM's prefix cache emptied before, and with
the document's or the prefix's blocks in it. It prints times to the first token, and how much of the
cache a running request takes, as a JSON object; `failures` lists what did not hold.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from vllm_traffic import first_token, parser_of, run

from ptkit.bench.timing import Timing, ratio
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engine_runs.vllm import running
from ptkit.hub.engines.vllm import ADAPTERS, CODE, write_connector, write_prefix
from ptkit.hub.vllm_server import VLLMServer, require_vllm
from ptkit.runtime.base_model import Base, load_base
from ptkit.serve.engines import free_port

_BASE, _ADAPTER = "base", "distilled"
#: Tokens of a question, and of an answer while the cache is looked at.
_QUESTION, _ANSWER = 32, 24
#: Lets the server empty its prefix cache when it is asked to.
_DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}
WAYS = ("document", "prefix")


def bytes_per_position(base: Base) -> int:
    """Bytes of float32 keys and values of one position, in all layers."""
    return sum(4 * s.kv_heads * (s.key_dim + s.value_dim) for s in base.layout)


class Asker:
    """Sends questions to the server, behind the document or to the adapter."""

    def __init__(self, client: httpx2.Client, document: list[int], vocabulary: int) -> None:
        self.client, self.document = client, document
        self._draw, self._words = np.random.default_rng(0), vocabulary

    def question(self) -> list[int]:
        """Words that were not asked before."""
        return [int(word) for word in self._draw.integers(5, self._words, _QUESTION)]

    def request(self, way: str, question: list[int]) -> tuple[str, list[int]]:
        """The name of the model, and the prompt."""
        if way == "document":
            return _BASE, [*self.document, *question]
        return _ADAPTER, question

    def emptied(self) -> None:
        """Empty the prefix cache."""
        self.client.post("/reset_prefix_cache").raise_for_status()

    def seconds(self, way: str, question: list[int]) -> float:
        """Until the first token."""
        return first_token(self.client, *self.request(way, question))

    def share_of_cache(self, way: str) -> float:
        """Of vLLM's blocks, how many a request takes while its answer is written."""
        name, prompt = self.request(way, self.question())
        body = {"model": name, "prompt": prompt, "max_tokens": _ANSWER, "temperature": 0,
                "ignore_eos": True, "stream": True}  # fmt: skip
        most = 0.0
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    most = max(most, self._metric("vllm:kv_cache_usage_perc"))
        return most

    def cache_positions(self) -> int:
        """Positions that vLLM's cache has room for."""
        text = self._metrics()
        blocks, size = (
            int(re.search(rf'vllm:cache_config_info{{[^}}]*{key}="(\d+)"', text)[1])  # type: ignore[index]
            for key in ("num_gpu_blocks", "block_size")
        )
        return blocks * size

    def _metric(self, name: str) -> float:
        lines = self._metrics().splitlines()
        return max(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def _metrics(self) -> str:
        return str(self.client.get("/metrics").text)


def timed(asker: Asker, rounds: int) -> dict[tuple[str, str], Timing]:
    """Times to the first token by way and state of the prefix cache, taken in turn."""
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            asker.emptied()
            for state in ("cold", "warm"):
                seconds = asker.seconds(way, asker.question())
                if turn:  # the first round warms the server up
                    times.setdefault((way, state), []).append(seconds)
    return {key: Timing(tuple(values)) for key, values in times.items()}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, on a server of its own."""
    require_vllm(given.engine_python)
    os.environ.update(_DEVELOPMENT)
    base = load_base(given.model, device="cpu")
    document = list(base.tokenizer(given.document.read_text(encoding="utf-8")).input_ids)
    with tempfile.TemporaryDirectory(prefix="ptkit-vllm-") as scratch:
        folder = Path(scratch)
        write_connector(folder / CODE)
        virtual_tokens = 0
        for read, adapter in engine_adapters([given.adapter], base):
            prefix = engine_prefix(read, adapter)
            virtual_tokens = prefix.virtual_tokens
            write_prefix(read, prefix, base, folder / ADAPTERS / _ADAPTER)
        server = VLLMServer(
            base, None, given.engine_python, "127.0.0.1", free_port(), "float32", _BASE, 4,
            options=tuple(given.options),
        )  # fmt: skip
        with (
            running(server, folder) as (url, _),
            httpx2.Client(base_url=url, timeout=900) as client,
        ):
            asker = Asker(client, document, base.embedding.num_embeddings)
            times = timed(asker, given.rounds)
            positions = asker.cache_positions()
            taken = {}
            for way in WAYS:
                asker.emptied()
                taken[way] = asker.share_of_cache(way) * positions
    return report(given, bytes_per_position(base), len(document), virtual_tokens, times, taken)


def report(
    given: argparse.Namespace,
    bytes_each: int,
    document: int,
    virtual_tokens: int,
    times: dict[tuple[str, str], Timing],
    taken: dict[str, float],
) -> dict[str, Any]:
    """The figures, and what did not hold."""
    faster = {
        state: ratio(times["document", state], times["prefix", state]) for state in ("cold", "warm")
    }
    failures = []
    if taken["prefix"] >= taken["document"]:
        failures.append("a request with the prefix takes no less of the cache")
    if faster["cold"][0] <= 1:
        failures.append("the first token comes no sooner with the prefix")
    return {
        "model": given.model, "document_tokens": document, "virtual_tokens": virtual_tokens,
        "rounds": given.rounds, "question_tokens": _QUESTION,
        "first_token_ms": {
            f"{way}, {state}": round(1000 * timing.median, 1)
            for (way, state), timing in times.items()
        },
        "document / prefix": {
            state: {"ratio": middle, "low": low, "high": high}
            for state, (middle, low, high) in faster.items()
        },
        "cache_of_a_request": {
            way: {"positions": round(count), "bytes": round(count * bytes_each)}
            for way, count in taken.items()
        },
        "failures": failures,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(str(__doc__), rounds=9)
    parser.add_argument("--document", type=Path, required=True, help="the text, UTF-8")
    parser.add_argument("--adapter", type=Path, required=True, help="what was distilled from it")
    return parser


if __name__ == "__main__":
    sys.exit(run(measure, _parser().parse_args()))
