"""A real `ptkit serve` in a process of its own, for the tests of the server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import forked
import httpx2


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Serving:
    """`ptkit serve` with `options`, until the context ends."""

    def __init__(
        self, folder: Path | None, log: Path, *options: str, env: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        adapters = [] if folder is None else ["--adapters", str(folder)]
        # Tests of other engines look for them among its children.
        started = subprocess.Popen if "--engine" in options else forked.Popen
        with log.open("w") as output:
            self.process = started(
                [sys.executable, "-m", "ptkit", "serve", "--port", str(self.port), *adapters,
                 *options],
                stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            )  # fmt: skip

    def __enter__(self) -> Self:
        for _ in range(600):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended:\n{self.log.read_text()}")
            try:
                if httpx2.get(f"{self.url}/ready", timeout=1).status_code == 200:
                    return self
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after a minute:\n{self.log.read_text()}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=60, **options)

    def completion(self, model: str, prompt: str, tokens: int = 12, **more: Any) -> str:
        """The greedy answer to the prompt as it is."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                "template": False, **more}  # fmt: skip
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def counter(self, name: str) -> float:
        """The value of a metric (with its labels, if it has any)."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)
