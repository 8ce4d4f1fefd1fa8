# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""Which requests the page answers: its own, of a bounded size, and of who knows the token where there is one."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.core.errors import BundleError

MOST_BYTES = 64 * 1024
LONGEST_ADDRESS = 2048
COOKIE = "token"
LEAST_TOKEN = 16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
OWN_SITE = ("same-origin", "none")
POLICY = "Content-Security-Policy"
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    POLICY: (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}
"""Headers of every answer: a browser runs the page's own scripts alone, and asks no other address for anything."""


def is_loopback(host: str) -> bool:
    """Whether what listens on an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None) -> None:
    """Refuse to listen to other machines without a token that cannot be guessed.

    Raises:
        BundleError: saying what to give.
    """
    if token is not None and len(token) < LEAST_TOKEN:
        raise BundleError(f"--token must have at least {LEAST_TOKEN} characters")
    if token is None and not is_loopback(host):
        raise BundleError(
            f"--host {host} can be reached from other machines: give a --token of {LEAST_TOKEN} characters or more, "
            "which whoever opens the page has to know"
        )


class TooLargeError(Exception):
    """The body of a request is larger than any that the page sends."""


class Guard:
    """Refuses what is not the page's own, before anything else sees it.

    A page of another site, open in the same browser, can send requests to this machine: its `Origin` or
    `Sec-Fetch-Site` tells. A name that its owner points to this machine (DNS rebinding) is told by `Host`. With a
    token, whoever has given it once, as `?token=`, has a cookie.

    Args:
        app: what answers.
        hosts: names by which this machine may be called; empty takes any, for servers with a token.
        token: None asks for none.
        most_bytes: of a request's body.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], token: str | None, most_bytes: int = MOST_BYTES) -> None:
        self.app, self.hosts, self.token, self.most_bytes = app, hosts, token, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else _close(send))
            return
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers) or self._entrance(scope, headers)
        if refused is not None:
            await refused(scope, receive, _with_headers(send))
            return
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most_bytes:
                raise TooLargeError
            return message

        try:
            await self.app(scope, bounded, _with_headers(send))
        except ClientDisconnect:
            return
        except TooLargeError:
            await _refuse(413, "that is too large")(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or (self.hosts and _name(hosts[0]) not in self.hosts):
            return _refuse(421, "this is not the page of that host")
        if any(urlsplit(origin).netloc != hosts[0] for origin in origins):
            return _refuse(403, "pages of other sites get no answer")
        navigates = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in OWN_SITE and not navigates:
            return _refuse(403, "pages of other sites get no answer")
        if len(scope.get("raw_path", b"")) + len(scope.get("query_string", b"")) > LONGEST_ADDRESS:
            return _refuse(414, "that is too long")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > self.most_bytes:
            return _refuse(413, "that is too large")
        return None

    def _entrance(self, scope: Scope, headers: Headers) -> Response | None:
        if self.token is None or _is_same(_cookies(headers).get(COOKIE), self.token):
            return None
        if _is_same(headers.get("authorization"), f"Bearer {self.token}"):
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get(COOKIE, [""])[0]
        if not _is_same(given, self.token):
            return _refuse(401, "open the address that the server has printed, with its token")
        response = RedirectResponse(scope["path"], status_code=303)
        response.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        return response


def _name(host: str) -> str:
    """A `Host` without its port."""
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


def _is_same(given: str | None, wanted: str) -> bool:
    return hmac.compare_digest((given or "").encode(), wanted.encode())


def _cookies(headers: Headers) -> Mapping[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _refuse(status: int, said: str) -> Response:
    return PlainTextResponse(said + "\n", status_code=status)


async def _close(send: Send) -> None:
    await send({"type": "websocket.close", "code": 1008})


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name for name, _ in message.get("headers", [])}
            more = [(name.lower().encode(), value.encode()) for name, value in SAFE.items()]
            message = {**message, "headers": [*message.get("headers", []), *(h for h in more if h[0] not in there)]}
        await send(message)

    return sending
