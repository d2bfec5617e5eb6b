"""llama.cpp's server as a process, or at an address, and what is asked of it over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2

from ptkit.errors import PtkitError, UserError
from ptkit.runtime.slot_file import STATE_VERSION, CacheLayout
from ptkit.serve.answer import EngineDiedError
from ptkit.serve.engines import free_port

logger = logging.getLogger(__name__)

#: A server that ends so many times in so many seconds is not started again before they are over.
_DEATHS, _WITHIN = 3, 60.0
_START_SECONDS = 600.0
_LOG_LINES = 8
#: Where `make setup-engines` puts the package, apart from ptkit's own.
_APART = Path(sys.prefix) / "llama-cpp"


@dataclass(frozen=True)
class LlamaCppSettings:
    """How the server is started, or where it is.

    gguf: the file it loads; layout: how it keeps keys and values
    slots: sequences it holds at the same time; context: positions of each
    threads: of its own; None: as it likes, or one for each CPU that this process is held to
    where: the program llama-server, a folder with the package xllamacpp, or the URL of a running
        server. None: what is found, the program first
    slot_folder: of a running server: its `--slot-save-path`
    """

    gguf: Path
    layout: CacheLayout
    slots: int = 4
    context: int = 4096
    threads: int | None = None
    where: str | None = None
    slot_folder: Path | None = None

    @property
    def url(self) -> str | None:
        """The address of a running server; None where one is to be started."""
        is_url = self.where is not None and self.where.startswith(("http://", "https://"))
        return self.where if is_url else None


def found(where: str | None) -> tuple[str | None, str | None]:
    """The program and the folder of the package that `where` stands for; one of them at most.

    Neither: the package is one of this environment. Raises UserError where there is none of it.
    """
    if where is None:
        program = shutil.which("llama-server")
        if program is not None:
            return program, None
        if find_spec("xllamacpp") is not None:
            return None, None
        if (_APART / "xllamacpp").is_dir():
            return None, str(_APART)
        raise UserError(
            "no llama-server on the PATH and no package xllamacpp; install one "
            "(pip install xllamacpp), or name it: --llama-server PROGRAM, FOLDER or URL"
        )
    if (Path(where) / "xllamacpp").is_dir():
        return None, where
    program = shutil.which(where)
    if program is None:
        raise UserError(
            f"--llama-server {where}: neither a program, nor a folder with the package xllamacpp, "
            "nor a URL"
        )
    return program, None


class LlamaServer:
    """llama.cpp's server, started again when it has ended. Used from one event loop.

    generation: how often it was started; what slots held before is gone
    """

    def __init__(self, settings: LlamaCppSettings) -> None:
        """Raises UserError where there is nothing to start, or no folder for slot files."""
        self.settings = settings
        self.generation = 0
        self._deaths: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = asyncio.Lock()
        self._client: httpx2.AsyncClient | None = None
        if settings.url is None:
            self._program, self._library = found(settings.where)
            self._scratch = tempfile.TemporaryDirectory(prefix="ptkit-llama-cpp-")
            self._folder = Path(self._scratch.name)
            self._log = self._folder / "server.log"
        elif settings.slot_folder is None or not settings.slot_folder.is_dir():
            raise UserError(
                "a running server needs --slot-folder DIR: the folder that it was started with as "
                "--slot-save-path, on this machine"
            )
        else:
            self._folder = settings.slot_folder

    async def ready(self) -> int:
        """Start the server unless it runs; returns its generation.

        Raises EngineDiedError when it cannot be started, or has ended too often.
        """
        async with self._starting:
            if self.settings.url is not None:
                if self._client is None:
                    self._client = _client(self.settings.url, os.environ.get("LLAMA_API_KEY"))
                    await self._require_running()
                    self.generation = 1
            elif self._process is None or self._process.poll() is not None:
                await self._start()
            return self.generation

    async def restore(self, slot: int, data: bytes) -> int:
        """Put a slot file into `slot`; returns its tokens. Raises PtkitError when it is refused."""
        name = f"ptkit-{secrets.token_hex(8)}.bin"
        file = self._folder / name
        try:
            await asyncio.to_thread(file.write_bytes, data)
            told = await self._post(f"/slots/{slot}?action=restore", {"filename": name})
        finally:
            file.unlink(missing_ok=True)
        return int(told["n_restored"])

    async def erase(self, slot: int) -> None:
        """Empty `slot`."""
        await self._post(f"/slots/{slot}?action=erase", {})

    async def complete(self, slot: int, ids: Sequence[int], **options: Any) -> dict[str, Any]:
        """The server's whole answer to the prompt `ids`."""
        body = {"prompt": [*ids], "id_slot": slot, "cache_prompt": True, "return_tokens": True}
        return await self._post("/completion", {**body, **options})

    async def stream(
        self, slot: int, ids: Sequence[int], **options: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """The server's events while it answers the prompt `ids`. Who stops listening ends it."""
        body = {
            "prompt": [*ids], "id_slot": slot, "cache_prompt": True, "return_tokens": True,
            "stream": True, "timings_per_token": True, **options,
        }  # fmt: skip
        try:
            async with self._http.stream("POST", "/completion", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    kind, _, data = line.partition(": ")
                    if kind == "error" or (kind == "data" and data.startswith('{"error"')):
                        raise _refusal(500, data.encode())
                    if kind == "data" and data != "[DONE]":
                        yield json.loads(data)
        except httpx2.TransportError as error:
            raise await self._died(error) from error

    async def props(self) -> dict[str, Any]:
        """What the server tells of itself."""
        return await self._get("/props")

    async def model(self) -> dict[str, Any]:
        """What the server tells of its model: `n_vocab`, `n_embd`, `n_params`."""
        return dict((await self._get("/v1/models"))["data"][0].get("meta") or {})

    async def close(self) -> None:
        """End the process."""
        if self._client is not None:
            await self._client.aclose()
        process = self._process
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()  # its host ends with it
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if self.settings.url is None:
            self._scratch.cleanup()

    @property
    def _http(self) -> httpx2.AsyncClient:
        assert self._client is not None, "`ready` comes first"
        return self._client

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = await self._http.post(path, json=body)
        except httpx2.TransportError as error:
            raise await self._died(error) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        return dict(response.json())

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            response = await self._http.get(path)
        except httpx2.TransportError as error:
            raise await self._died(error) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        return dict(response.json())

    async def _died(self, error: Exception) -> EngineDiedError:
        """What is told of a connection that broke."""
        process = self._process
        if process is not None:
            try:  # a process that ends closes its connections first
                await asyncio.to_thread(process.wait, 2)
            except subprocess.TimeoutExpired:
                pass
            else:
                logger.error("llama.cpp's server ended:\n%s", self._last_lines())
                return EngineDiedError(
                    f"llama.cpp's server ended (exit code {process.returncode}) while it worked "
                    "on this request; it is started again for the next one"
                )
        return EngineDiedError(f"llama.cpp's server does not answer: {type(error).__name__}")

    async def _start(self) -> None:
        now = time.monotonic()
        self._deaths = [then for then in self._deaths if now - then < _WITHIN]
        if self._process is not None:
            self._process = None
            self._deaths.append(now)
        if len(self._deaths) >= _DEATHS:
            raise EngineDiedError(
                f"llama.cpp's server ended {len(self._deaths)} times within {_WITHIN:.0f} s; it is "
                f"started again when they are over. Its last lines:\n{self._last_lines()}"
            )
        if self._client is not None:
            await self._client.aclose()
        settings, port, key = self.settings, free_port(), secrets.token_hex(16)
        given = {
            "program": self._program, "library": self._library, "gguf": str(settings.gguf),
            "port": port, "slots": settings.slots, "positions": settings.slots * settings.context,
            "flash_attention": settings.layout.flash_attention,
            "cache": settings.layout.cache_name, "folder": str(self._folder),
            "threads": settings.threads or _held_to(), "api_key": key,
        }  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("host.py"))],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ptkit's: it finishes the answers first
            )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given).encode() + b"\n")
        self._process.stdin.flush()
        self._client = _client(f"http://127.0.0.1:{port}", key)
        await self._until_healthy()
        self.generation += 1

    async def _until_healthy(self) -> None:
        process, end = self._process, time.monotonic() + _START_SECONDS
        assert process is not None
        while time.monotonic() < end:
            if process.poll() is not None:
                raise EngineDiedError(
                    f"llama.cpp's server cannot be started (exit code {process.returncode}); its "
                    f"last lines:\n{self._last_lines()}"
                )
            try:
                if (await self._http.get("/health")).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.05)
        process.kill()
        raise EngineDiedError(
            f"llama.cpp's server was not ready after {_START_SECONDS:.0f} s; its last lines:\n"
            f"{self._last_lines()}"
        )

    async def _require_running(self) -> None:
        """Raise UserError when the server at the URL is not as it is said to be."""
        url, settings = self.settings.url, self.settings
        try:
            props, model = await self.props(), await self.model()
        except EngineDiedError as error:
            raise UserError(f"--llama-server {url}: {error}") from error
        if props.get("total_slots", 0) < settings.slots:
            raise UserError(
                f"the server at {url} has {props.get('total_slots')} slots, --slots says "
                f"{settings.slots}; start it with --parallel {settings.slots} --kv-unified"
            )
        positions = model.get("n_ctx") or props["default_generation_settings"]["n_ctx"]
        if positions < settings.slots * settings.context:
            raise UserError(
                f"the server at {url} has room for {positions} positions in all; {settings.slots} "
                f"slots of {settings.context} need {settings.slots * settings.context}: lower "
                "--context, or start it with a larger --ctx-size"
            )

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])


def refused_restore(error: PtkitError, layout: CacheLayout) -> UserError:
    """What is told when the server takes no slot file."""
    flash = "on" if layout.flash_attention else "off"
    return UserError(
        f"llama.cpp's server refuses slot files of version {STATE_VERSION}, cache type "
        f"{layout.cache_name}, flash attention {flash}: {error}. Its version may be another, or "
        "its options"
    )


def _refusal(status: int, content: bytes) -> PtkitError:
    """The server's error, as ours. 4xx: of the request."""
    try:
        detail = json.loads(content)
        message = str(detail.get("error", detail).get("message", detail))
    except (ValueError, AttributeError):
        message = content[:300].decode(errors="replace")
    kind = UserError if 400 <= status < 500 else PtkitError
    return kind(f"llama.cpp's server answers {status}: {message}")


def _client(url: str, key: str | None) -> httpx2.AsyncClient:
    """Without a limit on how long an answer takes: the engine has its own."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    timeout = httpx2.Timeout(30.0, read=None)
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=False
    )


def _held_to() -> int | None:
    """How many CPUs this process may use; None: all. More threads than that wait for each other."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return None
    held = len(os.sched_getaffinity(0))
    return held if held < (os.cpu_count() or held) else None
