"""What a client is told of an error: a status, and a body in OpenAI's form."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ptkit.errors import AdapterError, HubError, PtkitError, UserError
from ptkit.extras import extra
from ptkit.serve.answer import (
    DrainingError,
    EngineDiedError,
    InUseError,
    NoMemoryError,
    QueueFullError,
    TimedOutError,
    TooLongError,
)
from ptkit.serve.guard import error_body
from ptkit.serve.library import NotAllowedError, UnknownModelError
from ptkit.serve.protocol import ChatRequest, CompletionRequest

with extra("serve", "`ptkit serve`"):
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

# Status, OpenAI's type and code of each error; the first that fits.
_STATUS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (NotAllowedError, 403, "permission_error", "not_allowed"),
    (InUseError, 409, "invalid_request_error", "adapter_in_use"),
    (TooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (DrainingError, 503, "server_error", "draining"),
    (NoMemoryError, 503, "server_error", "no_memory"),
    (EngineDiedError, 503, "server_error", "engine_died"),
    (TimedOutError, 504, "server_error", "timeout"),
    (HubError, 502, "server_error", "hub_failed"),
    (AdapterError, 422, "invalid_request_error", "adapter_refused"),
    (UserError, 400, "invalid_request_error", None),
    (PtkitError, 500, "server_error", None),
)
#: Seconds after which a refused request may be sent again.
_RETRY_AFTER = {429: "1", 503: "10"}
#: What to ask in place of what OpenAI has and this server has not.
_INSTEAD = {
    "/v1/responses": "send the conversation as `messages` to POST /v1/chat/completions",
    "/v1/embeddings": "it makes no embeddings",
    "/v1/moderations": "an adapter that labels texts answers at POST /v1/classify",
    "/docs": "the description of the interface is at GET /openapi.json, the playground at GET /",
}
_JSON = "send a JSON object with the header `content-type: application/json`"
#: Paths whose requests name a `model`.
_WITH_MODEL = ("/completions", "/classify")
#: Parameters that messages may begin with.
_PARAMETERS = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
#: A name of a field in a place of pydantic's; other texts there name an alternative of a type.
_FIELD = re.compile(r"[a-z_][a-z0-9_]*")
_TYPES = {"str", "int", "float", "bool", "dict"}


def classified(error: Exception) -> tuple[int, str, str | None]:
    """The status of `error`, and OpenAI's type and code."""
    for kind, status, type, code in _STATUS:
        if isinstance(error, kind):
            return status, type, code
    return 500, "server_error", None


def answer_errors(app: FastAPI) -> None:
    """Let `app` answer every error in OpenAI's form."""

    def respond(
        status: int, message: str, type: str, code: str | None = None, param: str | None = None
    ) -> Response:
        retry = _RETRY_AFTER.get(status)
        return Response(
            error_body(message, type, code, param),
            status_code=status,
            media_type="application/json",
            headers=None if retry is None else {"retry-after": retry},
        )

    @app.exception_handler(PtkitError)
    async def refused(request: Request, error: PtkitError) -> Response:
        status, type, code = classified(error)
        message = app.state.library.public(str(error))
        param = _first_word(message)
        param = param if param in _PARAMETERS else None
        if code == "model_not_found" and request.url.path.endswith(_WITH_MODEL):
            param = "model"
        return respond(status, message, type, code, param)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        message, param = what_is_malformed(error.errors())
        return respond(400, message, "invalid_request_error", param=param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        asked = f"{request.method} {request.url.path}"
        message, code = f"{asked}: {error.detail}", None
        if error.status_code == 404:
            message, code = _not_served(asked, request.url.path, app), "unknown_url"
        elif error.status_code == 405:
            own = {name.lower(): value for name, value in (error.headers or {}).items()}
            message = f"{asked} is not served here; this path takes {own.get('allow', '')}"
        elif error.status_code == 400 and "parsing the body" in str(error.detail):
            message = f"the request's body cannot be read as JSON; {_JSON}"
        answer = respond(error.status_code, message, "invalid_request_error", code)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return respond(500, f"{type(error).__name__}; see the server's log", "server_error")


def _first_word(message: str) -> str | None:
    """The name in backticks that `message` begins with, if it does."""
    named = re.match(r"`(\w+)`", message)
    return None if named is None else named[1]


def _not_served(asked: str, path: str, app: FastAPI) -> str:
    """What is said of a path that there is not."""
    if path in _INSTEAD:
        return f"{asked} is not served here; {_INSTEAD[path]}"
    paths: Mapping[str, Mapping[str, Any]] = app.openapi()["paths"]
    for served in paths:
        if path in (served.removeprefix("/v1"), f"/v1{served}"):
            return f"{asked} is not served here; did you mean {served}?"
    known = ", ".join(f"{method.upper()} {p}" for p, own in paths.items() for method in own)
    return f"{asked} is not served here; known: {known}"


def what_is_malformed(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """What is wrong with a request, and with which parameter, from pydantic's errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "it cannot be read")
        return f"the request's body is no JSON: {reason}, at character {first['loc'][-1]}", None
    if tuple(first["loc"]) == ("body",):
        if first["type"] == "missing":
            return f"the request has no body; {_JSON}", None
        if first["type"].startswith(("model_attributes", "model_type", "dict_type")):
            found = first.get("input")
            what = "is not sent as JSON" if isinstance(found, bytes) else "is no JSON object"
            return f"the request's body {what}; {_JSON}", None
    # A value that fits no alternative of a type has an error for each; those that got furthest
    # into it tell what was meant.
    places = [_place(error) for error in errors]
    same = [
        (place, error)
        for place, error in zip(places, errors, strict=True)
        if place[:1] == places[0][:1]
    ]
    deepest = max(len(place) for place, _ in same)
    place, furthest = next(pair for pair in same if len(pair[0]) == deepest)
    where = ".".join(map(str, place))
    if furthest["type"] == "extra_forbidden":
        return f"`{where}` is not known to this server", where
    told = dict.fromkeys(
        str(error["msg"]).removeprefix("Value error, ") for p, error in same if p == place
    )
    message = "; or ".join(told)
    if where and f"`{where}`" not in message:
        return f"`{where}`: {message}", where
    return message, where or _first_word(message)


def _place(error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Pydantic's place of an error without what a request does not have: where it came from, and
    the names of a type's alternatives."""
    inside = error["loc"][1:]
    own = len(inside) - 1 if error["type"] == "extra_forbidden" else None  # the client's own word
    return tuple(
        part
        for number, part in enumerate(inside)
        if number == own
        or isinstance(part, int)
        or (_FIELD.fullmatch(part) is not None and part not in _TYPES)
    )
