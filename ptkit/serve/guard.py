"""What a request must pass before it is looked at: its size, its speed and its key."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Sequence

from ptkit.extras import extra

with extra("serve", "`ptkit serve`"):
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Open to everybody: the page (which asks for a key itself) and the probes.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
#: Prefix of the paths adapters' files are sent to.
UPLOADS = "/v1/adapters/"


def error_body(message: str, type: str, code: str | None = None, param: str | None = None) -> bytes:
    """An error in OpenAI's form."""
    detail = {"message": message, "type": type, "param": param, "code": code}
    return json.dumps({"error": detail}).encode()


class Guard:
    """ASGI middleware before everything else.

    keys: what a request may present as `Authorization: Bearer KEY`; none: no key is asked for
    max_body, max_upload: bytes of a request, and of one that carries an adapter's files
    body_seconds: in which a request must have arrived
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str] = (),
        max_body: int = 1_000_000,
        max_upload: int = 256_000_000,
        body_seconds: float = 30.0,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body = max_body
        self._max_upload = max_upload
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            message = "a key is needed: Authorization: Bearer KEY"
            body = error_body(message, "authentication_error", "invalid_api_key")
            await _respond(send, 401, body, [(b"www-authenticate", b"Bearer")])
            return
        upload = scope["path"].startswith(UPLOADS)
        limit = self._max_upload if upload else self._max_body
        length = headers.get(b"content-length", b"")
        if length and (not length.isdigit() or int(length) > limit):
            await _too_large(send, limit)
            return
        if upload and length:  # streamed to disk by whoever takes it
            await self._app(scope, receive, send)
            return
        await self._buffered(scope, receive, send, limit)

    async def _buffered(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        """Take the whole body in, then pass it on: a slow sender holds nothing but its line."""
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._body_seconds):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > limit:
                        await _too_large(send, limit)
                        return
        except TimeoutError:
            body = error_body("the request did not arrive in time", "invalid_request_error")
            await _respond(send, 408, body, [(b"connection", b"close")])
            return
        whole: Message | None = {"type": "http.request", "body": b"".join(parts)}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()  # tells of a disconnect
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


async def _too_large(send: Send, limit: int) -> None:
    body = error_body(
        f"the request is larger than {limit:,} bytes", "invalid_request_error", "request_too_large"
    )
    await _respond(send, 413, body, [(b"connection", b"close")])


async def _respond(
    send: Send, status: int, body: bytes, extra: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
