"""Running the server: sockets, signals and a shutdown that loses nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from ptkit.errors import UserError
from ptkit.extras import extra
from ptkit.serve.engine import Engine

with extra("serve", "`ptkit serve`"):
    import uvicorn
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_SHORTEST_KEY = 8


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one per line; empty lines and those beginning with `#` do not count.

    Raises UserError when there is none, or one is too short or not plain text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path} holds no key")
    if any(len(key) < _SHORTEST_KEY or not key.isprintable() or " " in key for key in keys):
        raise UserError(
            f"--api-key-file {path}: a key has at least {_SHORTEST_KEY} characters and no spaces"
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Server(uvicorn.Server):
    """uvicorn, shutting down without losing an answer.

    At the first SIGTERM or SIGINT new requests get 503, running ones are finished, for at most
    `drain_seconds`; then the process ends with 0. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn. Its list of signals to raise again afterwards stays empty: exit code 0."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        logger.warning("%s: finishing what is under way", signal.Signals(sig).name)
        self._engine.drain()
        self._draining = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        while not self._engine.idle and self._engine.alive and loop.time() < end:
            await asyncio.sleep(0.05)
        # Responses whose last bytes are on their way; idle connections are closed by uvicorn.
        while self.server_state.tasks and loop.time() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


def run_server(
    app: FastAPI, engine: Engine, host: str, port: int, *, drain_seconds: float, log_level: str
) -> None:
    """Serve `app` until a signal. Raises UserError when the port cannot be had."""
    _raise_file_limit()
    options: dict[str, Any] = {
        "host": host, "port": port, "log_level": log_level, "access_log": log_level == "debug",
        "timeout_keep_alive": 30, "backlog": 4096, "server_header": False,
        "h11_max_incomplete_event_size": 65_536, "timeout_graceful_shutdown": 5,
    }  # fmt: skip
    server = Server(uvicorn.Config(app, **options), engine, drain_seconds)
    try:
        server.run()
    except SystemExit as error:  # uvicorn's way of saying that it could not begin
        if error.code:
            raise UserError(
                f"cannot listen on {host}:{port}; is another server there? (--port)"
            ) from error


def _raise_file_limit() -> None:
    """A connection is an open file; the usual 1,024 are few for a server."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
