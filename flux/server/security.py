"""Who may ask the server for what: checked before any route sees the request."""

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from flux.server.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/", "/health")  # paths that need no token; the page asks for it
OPEN_FOLDER = "/page/"
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """An ASGI middleware: host, origin, token, and the size of bodies.

    A page of another site that a user's browser shows cannot use the server: by a name that leads
    here (the host is checked), nor across sites (the origin is).
    """

    def __init__(self, app: Any, settings: Settings):
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal:
            await refuse(send, *refusal)
            return
        await self._bounded(scope, receive, send)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the sentence for a request that goes no farther."""
        host = headers.get("host", "")
        if not self._is_known(host):
            return 400, "the Host header names another server: start this one with --allow-host NAME"
        if "origin" in headers and urlsplit(headers["origin"]).netloc.lower() != host.lower():
            return 400, "the request comes from a page of another origin"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return 400, "the request comes from a page of another site"
        is_open = path in OPEN or path.startswith(OPEN_FOLDER)
        if self._settings.token and not is_open and not self._has_token(headers.get("authorization", "")):
            return 401, "a token is needed: the header `Authorization: Bearer TOKEN`"
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, "the Content-Length is not a number"
        if int(length) > self._settings.max_body:
            return 413, self._limit()
        return None

    def _is_known(self, host: str) -> bool:
        """Whether a Host header may be this server's: an address, never another site's, or a known name."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in ("localhost", self._settings.host, *self._settings.hosts):
            return bool(name)
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_token(self, header: str) -> bool:
        kind, _, token = header.partition(" ")
        given, ours = token.strip().encode(), (self._settings.token or "").encode()
        return kind.lower() == "bearer" and hmac.compare_digest(given, ours)

    def _limit(self) -> str:
        return f"the request is larger than {self._settings.max_body // 2**20} MB"

    async def _bounded(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand the request on; where its body turns out too long, reading it is refused."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._settings.max_body:
                raise HTTPException(413, self._limit())
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self._app(scope, counted, noted)


async def refuse(send: Send, status: int, sentence: str) -> None:
    """Answer with one sentence."""
    body = json.dumps(answer(status, sentence)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def answer(status: int, sentence: str) -> dict[str, Any]:
    """The body of every refusal: one sentence, also where OpenAI's clients look for it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "detail": sentence,
        "error": {"message": sentence, "type": kind, "param": None, "code": str(status)},
    }
