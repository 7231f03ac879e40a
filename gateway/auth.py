"""Who asks: the token of a request, the host it was sent to.

Rule: nothing here logs a token or puts one into an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from gateway.problems import problem
from taskkit import tokens
from taskkit.errors import Forbidden
from taskkit.settings import is_loopback
from taskkit.tokens import Claims, TokenError

#: Cookie of browsers, whose EventSource cannot send a header.
COOKIE: Final = "bulkhead_token"

#: A cookie comes along with requests that another site's page started, so it must not change anything.
_COOKIE_METHODS: Final = frozenset({"GET", "HEAD"})

#: A host as it may stand in a Host header, lower case: name, IPv4, or IPv6 in brackets; then perhaps a port.
#: Source: RFC 9110 §7.2, without the escapes of RFC 3986 that no browser sends.
_HOST = re.compile(r"(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


class Authenticator:
    """Turns requests into claims.

    Args:
      key: what tokens are signed with.
      allowed_hosts: accepted names of this host besides loopback ones; patterns as in Django's ALLOWED_HOSTS.
      cors_origins: origins whose pages may use a cookie here.
    """

    def __init__(self, key: bytes, allowed_hosts: list[str], cors_origins: Iterable[str] = ()) -> None:
        self.key = key
        self.allowed_hosts = allowed_hosts
        self.cors_origins = frozenset(cors_origins)

    def claims(self, request: HTTPConnection) -> Claims:
        """Return what the request's token says: `Authorization: Bearer`, else the cookie of a GET or HEAD.

        Raises:
          TokenError: there is none, or it is not valid.
        """
        headers = request.headers.getlist("authorization")
        if headers:
            return tokens.verify(self.key, _bearer(headers))
        token = request.cookies.get(COOKIE, "")
        if token and (reason := self._against_cookie(request)):
            raise TokenError("missing", reason)
        return tokens.verify(self.key, token)

    def require(self, request: HTTPConnection, action: str) -> Claims:
        """Return the claims of a request that needs `action`.

        Raises:
          TokenError: there is no valid token.
          Forbidden: there is one, without `action`.
        """
        claims = self.claims(request)
        if not claims.may(action):
            raise Forbidden(f"the token does not allow {action!r}")
        return claims

    def _against_cookie(self, request: HTTPConnection) -> str:
        """Return why a cookie does not count here, with the remedy; "" when it does."""
        if request.scope.get("method") not in _COOKIE_METHODS:
            return "a cookie counts for GET and HEAD only; send a Bearer token"
        origin = request.headers.get("origin")
        # Absent on same-origin GETs and on navigation, which shows its result to nobody else.
        if origin is None or origin in self.cors_origins:
            return ""
        if origin.partition("://")[2].lower() == request.headers.get("host", "").lower():
            return ""
        return f"origin {origin[:200]!r} is not in CORS_ORIGINS; add it, or send a Bearer token"


def require_sight_of_all(claims: Claims) -> None:
    """Refuse a token of single runs: processes and counts tell about everybody's.

    Raises:
      Forbidden: it has neither `operate` nor `read` of every run.
    """
    if not (claims.may("operate") or (claims.may("read") and claims.runs == "*")):
        raise Forbidden("the token needs 'operate', or 'read' of every run")


def _bearer(headers: list[str]) -> str:
    """Return the token of the Authorization header (RFC 6750 §2.1; the scheme in any letter case)."""
    scheme, _, token = headers[0].strip().partition(" ")
    if len(headers) != 1 or scheme.lower() != "bearer":
        raise TokenError("malformed", "the Authorization header must be `Bearer` and one token")
    return token.strip()


def host_of(header: str) -> str | None:
    """Return a Host header's host in lower case, without port or final dot; None when it is malformed."""
    match = _HOST.fullmatch(header.strip().lower())
    return match["host"].removesuffix(".") if match else None


def is_allowed_host(host: str, allowed: Iterable[str]) -> bool:
    """Whether `host`, as from `host_of`, is a loopback name or fits one of the patterns.

    Patterns are those of Django's ALLOWED_HOSTS: an exact name, `.example.com` for it with all below it, `*`.
    `.localhost` never leaves the machine (RFC 6761 §6.3).
    """
    if is_loopback_host(host):
        return True
    for pattern in (entry.lower() for entry in allowed):
        if pattern in ("*", host):
            return True
        if pattern.startswith(".") and (host.endswith(pattern) or host == pattern[1:]):
            return True
    return False


def is_loopback_host(host: str) -> bool:
    """Whether a Host header's host can only mean this machine."""
    if host.startswith("127."):
        # A name such as 127.evil.example belongs to somebody: only digits make it an address.
        return re.fullmatch(r"127(\.[0-9]{1,3}){3}", host) is not None
    return host.endswith(".localhost") or is_loopback(host.removeprefix("[").removesuffix("]"))


class HostGuard:
    """Refuses requests sent to a name that is not ours, the mark of DNS rebinding.

    A page of evil.example whose name suddenly resolves to 127.0.0.1 is "same origin" with us for the browser;
    only the Host header tells. A request without one is let through: browsers always send it, and health
    probes of HTTP/1.0 do not. 421 for a strange name, 400 for an unreadable one.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str]) -> None:
        self.app = app
        self.allowed_hosts = tuple(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        await (self.app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = [value for name, value in scope["headers"] if name == b"host"]
        if not headers:
            return None
        host = host_of(headers[0].decode("latin-1")) if len(headers) == 1 else None
        if host is not None and is_allowed_host(host, self.allowed_hosts):
            return None
        if scope["type"] == "websocket":
            return WebSocketClose(1008)
        if host is None:
            return problem(None, "bad-host", "the Host header is malformed", instance=scope["path"])
        return problem(
            None, "wrong-host", f"{host} is not served here; add it to ALLOWED_HOSTS", instance=scope["path"]
        )
