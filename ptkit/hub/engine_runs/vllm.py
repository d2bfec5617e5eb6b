"""Greedy answers of vLLM's own server, with an adapter in its cache."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from ptkit.errors import PtkitError
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines.vllm import ADAPTERS, CODE, write_connector, write_prefix
from ptkit.hub.vllm_server import VLLMServer, require_vllm
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import end_ids
from ptkit.serve.engines import free_port

#: What the adapter is called there.
_NAME = "verified"
#: Seconds until the server answers, and for an answer.
_READY, _ANSWER = 900, 600


def greedy(
    source: Path,
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    dtype: str = "float32",
    engine_python: Path | None = None,
) -> list[list[int]]:
    """The answers to `prompts`.

    dtype: of vLLM's weights and cache; engine_python: of vLLM's environment, default this one
    """
    python = Path(sys.executable) if engine_python is None else engine_python
    require_vllm(python)
    ends = set(end_ids(base.model))
    with tempfile.TemporaryDirectory(prefix="ptkit-vllm-") as scratch:
        folder = Path(scratch)
        write_connector(folder / CODE)
        for read, adapter in engine_adapters([source], base):
            write_prefix(read, engine_prefix(read, adapter), base, folder / ADAPTERS / _NAME)
        server = VLLMServer(
            base, None, python, "127.0.0.1", free_port(), dtype, "base", len(prompts),
        )  # fmt: skip
        with running(server, folder) as (url, _):
            answers = [_answer(url, prompt, max_new_tokens) for prompt in prompts]
    return [
        answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]
        for answer in answers
    ]


@contextmanager
def running(server: VLLMServer, folder: Path) -> Iterator[tuple[str, int]]:
    """The address of vLLM's server, ready, and its process; it has ended afterwards. Raises
    PtkitError with the end of its log where it does not start."""
    log = folder / "vllm.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            server.command(folder), env=server.environment(folder),
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://{server.host}:{server.port}"
    try:
        _wait_until_ready(process, url, log)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + _READY
    while time.monotonic() < until:
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PtkitError("vLLM's server did not start:\n" + "\n".join(said[-5:]))
        try:
            if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(0.5)
    raise PtkitError(f"vLLM's server did not start within {_READY} seconds")


def _answer(url: str, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    asked: dict[str, Any] = {
        "model": _NAME, "prompt": list(prompt), "max_tokens": max_new_tokens, "temperature": 0,
        "return_token_ids": True,
    }  # fmt: skip
    told = httpx2.post(f"{url}/v1/completions", json=asked, timeout=_ANSWER)
    if told.status_code != 200:
        raise PtkitError(f"vLLM's server answered {told.status_code}: {told.text[:300]}")
    return [int(token) for token in told.json()["choices"][0]["token_ids"]]
