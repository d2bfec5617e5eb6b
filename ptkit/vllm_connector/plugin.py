"""The endpoint plugin of vLLM's API server: adapters for its routes, and routes for adapters.

vLLM finds it by the entry point `ptkit` of `vllm.endpoint_plugins`, where `VLLM_PLUGINS` names it.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import shutil
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, UploadFile
from fastapi.responses import HTMLResponse
from prometheus_client import REGISTRY
from vllm import __version__ as vllm_version
from vllm.exceptions import VLLMNotFoundError
from vllm.logger import init_logger

from ptkit.errors import PtkitError, UserError
from ptkit.playground import HEADERS, page
from ptkit.vllm_connector.chats import AdapterPrompts
from ptkit.vllm_connector.files import ABOUT, TENSORS
from ptkit.vllm_connector.library import (
    SPOOL,
    NotAllowedError,
    PrefixLibrary,
    UnknownAdapterError,
    spool_of,
)
from ptkit.vllm_connector.loads import LibraryMetrics
from ptkit.vllm_connector.names import tell_known_names
from ptkit.vllm_connector.requests import PrefixRequest, PrefixRequests, as_vllm_error
from ptkit.vllm_connector.running import RunningBase, require_runs

logger = init_logger("vllm.ptkit")

#: Bytes of a request about adapters, and of an upload.
MAX_BODY, MAX_UPLOAD = 1_000_000, 512_000_000
#: Of an upload: those that an adapter consists of, and some too many, which are then named.
MAX_FILES = 16
#: Versions of vLLM whose server was compared with ptkit.
TRIED = ("0.32",)


class PtkitAdapters:
    """See vLLM's `EndpointPlugin`."""

    name = "ptkit"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._served: ServedAdapters | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes of `docs/engines.md`."""
        app.add_api_route("/", self._page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/v1/adapters", self._list, methods=["GET"])
        app.add_api_route("/v1/adapters/{name}", self._upload, methods=["PUT"])
        for change, answer in (
            ("load", self._load), ("swap", self._swap), ("unload", self._unload),
        ):  # fmt: skip
            app.add_api_route(f"/v1/{change}_adapter", answer, methods=["POST"])
        app.add_api_route("/v1/load_lora_adapter", self._load, methods=["POST"])
        app.add_api_route("/v1/unload_lora_adapter", self._unload, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Know the adapters. Raises UserError for an engine that cannot serve them."""
        config = engine_client.vllm_config
        require_runs(config)
        if config.lora_config is not None:
            raise UserError("ptkit's adapters beside vLLM's LoRA were not tried; no --enable-lora")
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise UserError("ptkit's adapters need one API server process: --api-server-count 1")
        transfer = config.kv_transfer_config
        extra = transfer.kv_connector_extra_config
        names = [path.name for path in state.openai_serving_models.base_model_paths]
        running = await asyncio.to_thread(RunningBase.of, config, names[0])
        if not vllm_version.startswith(TRIED):
            logger.warning("ptkit: tried with vLLM %s, not with %s", TRIED[-1], vllm_version)
        if running.identity is None:
            logger.warning("ptkit: no safetensors of %s here: adapters by shape only", running.name)
        spool = spool_of(transfer)
        spool.mkdir(mode=0o700, parents=True, exist_ok=False)
        atexit.register(shutil.rmtree, spool, ignore_errors=True)
        library = PrefixLibrary(
            Path(extra["adapters"]),
            spool,
            running,
            budget=int(extra.get("spool_bytes", SPOOL)),
            read_only=bool(extra.get("read_only")),
            allow_hub=bool(extra.get("hub")),
        )
        faults = await asyncio.to_thread(library.register_all)
        models = state.openai_serving_models
        self._served = ServedAdapters(
            engine_client, library, models, set(names), state.online_renderer
        )
        REGISTRY.register(LibraryMetrics(library))
        for fault in faults:
            logger.warning("ptkit: left out: %s", fault)
        logger.info("ptkit: %s with %d adapters", running.name, len(library.names()))

    @property
    def served(self) -> ServedAdapters:
        """The adapters of the running server."""
        assert self._served is not None
        return self._served

    async def _page(self) -> HTMLResponse:
        """The playground."""
        return HTMLResponse(page(), headers=HEADERS)

    async def _list(
        self,
        search: Annotated[str, Query(max_length=200)] = "",
        offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> dict[str, Any]:
        """What the adapters are whose names hold `search`, a page at a time; `fault`: why the files
        of one cannot be served."""
        return await asyncio.to_thread(self.served.cards, search, offset, limit)

    async def _load(self, request: Request) -> dict[str, str]:
        """Serve one more adapter: `{"name": ..., "path": FOLDER}`, or `"hub": "user/repo"`."""
        told = await _texts(request, ("name", "path"), ("name", "hub"))
        await self.served.load(**told, replace=False)
        name = told["name"]
        return {"name": name, "change": "loaded"}

    async def _swap(self, request: Request) -> dict[str, str]:
        """Replace an adapter by another under the same name; running answers keep the old."""
        told = await _texts(request, ("name", "path"), ("name", "hub"))
        await self.served.load(**told, replace=True)
        name = told["name"]
        return {"name": name, "change": "swapped"}

    async def _unload(self, request: Request) -> dict[str, str]:
        """Serve an adapter no longer: `{"name": ...}`; running answers are finished."""
        name = (await _texts(request, ("name",)))["name"]
        await self.served.unload(name)
        return {"name": name, "change": "unloaded"}

    async def _upload(self, name: str, files: list[UploadFile], request: Request) -> dict[str, str]:
        """Send the two files of an adapter, and serve it in place of what had the name."""
        _require_size(request, MAX_UPLOAD)
        if len(files) > MAX_FILES:
            raise as_vllm_error(
                UserError(f"{len(files)} files; expected two, {ABOUT} and {TENSORS}")
            )
        sent = {str(file.filename): await file.read() for file in files}
        new = await self.served.upload(name, sent)
        return {"name": name, "change": "uploaded" if new else "swapped"}


class ServedAdapters:
    """A library, and vLLM's list of what is served.

    taken: names of the base; renderer: of the server's routes that take messages
    """

    def __init__(
        self,
        engine_client: Any,
        library: PrefixLibrary,
        models: Any,
        taken: set[str],
        renderer: Any,
    ) -> None:
        self.library = library
        self._listed, self._taken = models.lora_requests, taken
        self._requests = PrefixRequests(engine_client, library, models.lora_requests)
        AdapterPrompts(renderer, self._requests)
        tell_known_names(models, VLLMNotFoundError)

    def cards(self, search: str, offset: int, limit: int) -> dict[str, Any]:
        """Adapters, as `GET /v1/adapters` tells them."""
        names = [name for name in self.library.names() if search.lower() in name.lower()]
        data = []
        for name in names[offset : offset + limit]:
            with suppress(UnknownAdapterError):  # unloaded since
                data.append(self.library.card(name))
        return {
            "base": self.library.running.name,
            "total": len(names),
            "files": [ABOUT, TENSORS],
            "data": data,
        }

    async def load(
        self, name: str, path: str | None = None, hub: str | None = None, *, replace: bool
    ) -> None:
        """See `PrefixLibrary.load`."""
        self._require_free(name)
        await self._told(lambda: self.library.load(name, path, hub, replace=replace))
        self._requests.enter(name)

    async def unload(self, name: str) -> None:
        """Serve `name` no longer."""
        await self._told(lambda: self.library.unload(name))
        self._requests.strike(name)

    async def upload(self, name: str, files: dict[str, bytes]) -> bool:
        """Keep and serve `files` as `name`; whether the name is new."""
        self._require_free(name)
        new = name not in self.library.names()
        await self._told(lambda: self.library.upload(name, files))
        self._requests.enter(name)
        return new

    def _require_free(self, name: str) -> None:
        other = self._listed.get(name)
        if name in self._taken or (other is not None and not isinstance(other, PrefixRequest)):
            raise as_vllm_error(UserError(f"`{name}` is the name of another model here"))

    async def _told(self, work: Any) -> Any:
        try:
            return await asyncio.to_thread(work)
        except NotAllowedError as error:
            raise HTTPException(403, str(error)) from error
        except PtkitError as error:
            raise as_vllm_error(error) from error


async def _texts(request: Request, *forms: tuple[str, ...]) -> dict[str, str]:
    """The texts of a JSON body that has exactly the keys of one of `forms`, or vLLM's with `lora_`
    before them."""
    _require_size(request, MAX_BODY)
    body = await request.body()
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise as_vllm_error(UserError(f"the body is not JSON: {error}")) from None
    told = {k.removeprefix("lora_"): v for k, v in found.items()} if isinstance(found, dict) else {}
    fits = any(told.keys() == {*form} for form in forms)
    if not fits or not all(isinstance(v, str) and v for v in told.values()):
        keys = ", or with ".join(" and ".join(f"`{key}`" for key in form) for form in forms)
        raise as_vllm_error(UserError(f"expected an object with {keys}, each a text"))
    return told


def _require_size(request: Request, most: int) -> None:
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > most:
        raise HTTPException(413, f"the request must say its length, at most {most:,} bytes")
