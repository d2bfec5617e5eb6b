"""The HTTP interface: OpenAI's, vLLM's for adapters, and the playground."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from ptkit.errors import PtkitError, UserError
from ptkit.extras import extra
from ptkit.playground import HEADERS, page
from ptkit.serve.adapter_protocol import (
    AdapterCard,
    AdapterCards,
    Changed,
    LoadRequest,
    UnloadRequest,
)
from ptkit.serve.answer import (
    DrainingError,
)
from ptkit.serve.answers import CompletionStream, RequestLimits
from ptkit.serve.engine import Engine
from ptkit.serve.guard import Guard, error_body
from ptkit.serve.http_errors import answer_errors, classified
from ptkit.serve.labels import Classification, ClassifyRequest, labelled
from ptkit.serve.library import NAME, SENT_FILES, Library, UnknownModelError
from ptkit.serve.metrics import Metrics
from ptkit.serve.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelList,
    ServedModel,
)

with extra("serve", "`ptkit serve`"):
    from fastapi import FastAPI, Path, Query, Request, UploadFile
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware.trustedhost import TrustedHostMiddleware

logger = logging.getLogger(__name__)

#: Most files of an upload: those an adapter consists of, and one too many, which is then named.
MAX_FILES = 16
_LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "[::1]"]


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


# Events hold what the JSON response does, piece by piece; OpenAPI has no schema for a stream.
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_ANSWERING = _STREAM | _documented(400, 401, 404, 408, 409, 413, 422, 429, 500, 503, 504)
_LABELLING = _documented(400, 401, 404, 408, 413, 422, 500, 503)
_CHANGING = _documented(400, 401, 403, 404, 408, 409, 413, 422, 500, 502)


def create_app(
    library: Library,
    metrics: Metrics,
    limits: RequestLimits | None = None,
    *,
    keys: tuple[str, ...] = (),
    max_body: int = 1_000_000,
    max_upload: int = 256_000_000,
    loopback_only: bool = False,
) -> FastAPI:
    """The application that serves `library`.

    keys: what requests may present as `Authorization: Bearer KEY`; none: nothing is asked
    max_body, max_upload: bytes of a request, and of an upload
    loopback_only: answer requests for this machine's own names only, so that no page of another
        site reaches the server by a name that leads here
    """
    app = FastAPI(
        title="ptkit",
        description="One frozen model, many adapters: `model` picks one per request.",
        openapi_url="/openapi.json",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.library, app.state.metrics = library, metrics
    app.state.limits = limits or RequestLimits()
    _answers(app, library)
    _adapters(app, library, metrics)
    _probes(app, library.engine, metrics)
    answer_errors(app)
    if loopback_only:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_HOSTS)
    app.add_middleware(Guard, keys=keys, max_body=max_body, max_upload=max_upload)
    app.add_middleware(_Counting, metrics=metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await run_in_threadpool(app.state.library.engine.close)


# Answers


def _answers(app: FastAPI, library: Library) -> None:
    began = int(time.time())

    @app.post("/v1/completions", responses=_ANSWERING, response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Continue a text."""
        return await _answer(body, request)

    @app.post("/v1/chat/completions", responses=_ANSWERING, response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation, in the model's chat template."""
        return await _answer(body, request)

    @app.post("/classify", responses=_LABELLING, include_in_schema=False)
    @app.post("/v1/classify", responses=_LABELLING)
    async def classify(body: ClassifyRequest) -> Classification:
        """Label texts with an adapter that was trained to."""
        if library.engine.draining:
            raise DrainingError("the server is shutting down")
        return await run_in_threadpool(labelled, library, body)

    @app.get("/v1/models", responses=_documented(401))
    def models() -> ModelList:
        """The base and every adapter."""
        names = [library.base_name, *library.names()]
        return ModelList(data=[_model(library, name, began) for name in names])

    @app.get("/v1/models/{model:path}", responses=_documented(401, 404))
    def model(model: str) -> ServedModel:
        """One of them."""
        if not library.is_base(model):
            library.path(model)
        return _model(library, model, began)


def _model(library: Library, name: str, began: int) -> ServedModel:
    """began: seconds since 1970 at which the server did"""
    parent = None if library.is_base(name) else library.base_name
    return ServedModel(id=name, created=began, parent=parent, max_model_len=library.engine.longest)


async def _answer(body: CompletionRequest | ChatRequest, request: Request) -> Any:
    state = request.app.state
    if state.library.engine.draining:
        raise DrainingError("the server is shutting down")
    loop = asyncio.get_running_loop()
    # In a worker: it reads texts, and maybe an adapter from disk.
    stream = await run_in_threadpool(CompletionStream, state.library, state.limits, body, loop)
    stream.submit()
    if body.stream:
        events = _server_sent(stream, state.library)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    answered = asyncio.ensure_future(stream.whole())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            return answered.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        for task in (answered, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, PtkitError):
                await task
        stream.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _server_sent(stream: CompletionStream, library: Library) -> AsyncIterator[bytes]:
    """The events as Server-Sent Events; an error is the last event. However it ends, a client
    that is gone included, the answers are given up."""
    try:
        async for event in stream.events():
            yield b"data: " + stream.as_json(event).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
    except PtkitError as error:
        _, kind, code = classified(error)
        yield b"data: " + error_body(library.public(str(error)), kind, code) + b"\n\n"
    except Exception as error:  # the status is sent already; a stream that just ends looks whole
        logger.exception("a stream failed")
        message = f"{type(error).__name__}; see the server's log"
        yield b"data: " + error_body(message, "server_error", None) + b"\n\n"
    finally:
        stream.cancel()


# Adapters


def _adapters(app: FastAPI, library: Library, metrics: Metrics) -> None:
    async def change(kind: str, work: Callable[[], Any]) -> Any:
        with metrics.change(kind):
            return await run_in_threadpool(work)

    @app.get("/v1/adapters", responses=_documented(400, 401))
    def adapters(
        search: Annotated[str, Query(max_length=200)] = "",
        offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> AdapterCards:
        """What is known of the adapters whose names hold `search`, a page at a time."""
        names = [name for name in library.names() if search.lower() in name.lower()]
        cards = []
        for name in names[offset : offset + limit]:
            with suppress(UnknownModelError):  # unloaded since
                cards.append(AdapterCard.model_validate(library.card(name)))
        return AdapterCards(
            base=library.base_name, total=len(names), files=list(SENT_FILES), data=cards
        )

    @app.post("/v1/load_adapter", responses=_CHANGING)
    @app.post("/v1/load_lora_adapter", responses=_CHANGING)
    async def load_adapter(body: LoadRequest) -> Changed:
        """Serve one more adapter; with `load_inplace` in place of what has its name, if any."""
        if body.load_inplace and body.name in library.names():
            return await swap_adapter(body)
        await change(
            "load", lambda: library.load(body.name, path=body.path, hub=body.hub, replace=False)
        )
        return Changed(name=body.name, change="loaded")

    @app.post("/v1/swap_adapter", responses=_CHANGING)
    async def swap_adapter(body: LoadRequest) -> Changed:
        """Replace an adapter by another under the same name; running answers keep the old."""
        await change(
            "swap", lambda: library.load(body.name, path=body.path, hub=body.hub, replace=True)
        )
        return Changed(name=body.name, change="swapped")

    @app.post("/v1/unload_adapter", responses=_CHANGING)
    @app.post("/v1/unload_lora_adapter", responses=_CHANGING)
    async def unload_adapter(body: UnloadRequest) -> Changed:
        """Serve an adapter no longer; running answers are finished, its files stay."""
        await change("unload", lambda: library.unload(body.name))
        return Changed(name=body.name, change="unloaded")

    @app.put("/v1/adapters/{name}", responses=_CHANGING)
    async def upload_adapter(
        name: Annotated[str, Path(pattern=f"^{NAME}$")], files: list[UploadFile]
    ) -> Changed:
        """Send an adapter's files (adapter_config.json, adapter_model.safetensors, ptkit.json)
        and serve it under this name, in place of what had it."""
        if len(files) > MAX_FILES:
            raise UserError(f"{len(files)} files, an adapter has at most {MAX_FILES}")
        contents = {str(file.filename): await file.read() for file in files}
        new = await change("upload", lambda: library.upload(name, contents))
        return Changed(name=name, change="uploaded" if new else "swapped")


# Probes and the page


def _probes(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    shown = page()

    @app.get("/health", responses={503: {"model": Health}}, response_model=Health)
    def health() -> JSONResponse:
        """Whether the server works; 503 when its loop has ended."""
        state = "ok" if engine.alive else "failed"
        return JSONResponse({"status": state}, status_code=200 if engine.alive else 503)

    @app.get("/ready", responses={503: {"model": Health}}, response_model=Health)
    def ready() -> JSONResponse:
        """Whether it takes requests; 503 while it shuts down."""
        taking = engine.alive and not engine.draining
        state = "ok" if taking else "draining"
        return JSONResponse({"status": state}, status_code=200 if taking else 503)

    @app.get("/metrics", responses=_documented(401), response_class=Response)
    def prometheus() -> Response:
        """Counters, for Prometheus."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    def playground() -> HTMLResponse:
        return HTMLResponse(shown, headers=HEADERS)


class _Counting:
    """ASGI middleware that counts responses by status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responded(message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
