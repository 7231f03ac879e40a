"""Who asks: the token, cookie or ticket of a request, the host it was sent to.

Rule: nothing here logs a token or puts one into an error.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import cookies
from gateway.failures import Failures, address_of
from gateway.problems import problem
from gateway.reading import TICKET, Refusal
from gateway.sessions import Sessions
from taskkit import background, tokens
from taskkit.errors import Forbidden
from taskkit.settings import LimitSettings, is_loopback
from taskkit.tokens import Claims, Ticket, TokenError, Use

#: Where the seeds' WebSocket clients put their token.
TOKEN: Final = "token"

#: Where `TicketCookies` finds what `Authenticator.admit` wants a browser to keep.
_SCOPE_KEY: Final = "bulkhead.cookies"

#: A cookie comes along with requests that another site's page started, so it must not change anything.
_COOKIE_METHODS: Final = frozenset({"GET", "HEAD"})

#: A host as it may stand in a Host header, lower case: name, IPv4, or IPv6 in brackets; then perhaps a port.
#: Source: RFC 9110 §7.2, without the escapes of RFC 3986 that no browser sends.
_HOST = re.compile(r"(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


#: Tokens remembered, those verified most recently, and the longest of them in characters: 7 MB at most. Verifying one
#: takes 0.2 ms, finding it again 1 µs.
MAX_KNOWN: Final = 2_000
MAX_KNOWN_TEXT: Final = 2_000


class Desk(Protocol):
    """Where it is remembered which tickets were used, and which tokens taken back."""

    async def redeem(self, ticket: Ticket) -> bool:
        """Use a ticket up; return, when that is on disk, whether this was the first time. Raises NotWritable."""

    def is_used(self, ticket: Ticket) -> bool:
        """Whether a ticket was used."""

    def is_revoked(self, claims: Claims) -> bool:
        """Whether a token with these claims was taken back."""


class TooManyFailures(Refusal):
    """An address has presented so many tokens that were not valid that it is told to wait."""

    def __init__(self, wait: float) -> None:
        super().__init__(
            "too-many-failures",
            "too many tokens from this address were not valid; wait, then come with a valid one",
            headers={"Retry-After": str(math.ceil(wait))},
            retry_after=math.ceil(wait),
        )


@dataclass(frozen=True, slots=True)
class Admission:
    """Who was let in. `cookies`: values of `Set-Cookie` for the answer, which `TicketCookies` puts there."""

    claims: Claims
    cookies: tuple[str, ...] = ()


class Authenticator:
    """Turns requests into claims.

    Args:
      key: what tokens are signed with.
      allowed_hosts: accepted names of this host besides loopback ones; patterns as in Django's ALLOWED_HOSTS.
      cors_origins: origins whose pages may use a cookie here.
      channels: whether the name of a channel admits a client without credentials (taskkit.background).
      clock: returns monotonic seconds, by which failures age.

    Attributes:
      sessions: the open streams, by token.
      bad_tokens: how many requests were turned away for want of a valid token, by what was wrong.
    """

    def __init__(
        self,
        key: bytes,
        allowed_hosts: list[str],
        cors_origins: Iterable[str] = (),
        *,
        desk: Desk,
        limits: LimitSettings | None = None,
        channels: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = LimitSettings() if limits is None else limits
        self.key = key
        self.allowed_hosts = allowed_hosts
        self.cors_origins = frozenset(cors_origins)
        self.sessions = Sessions(limits.streams_per_token, desk.is_revoked)
        self._desk = desk
        self.bad_tokens: Counter[str] = Counter()
        self._failures = Failures(limits.auth_failures)
        self._known: OrderedDict[str, Claims] = OrderedDict()
        self._channels = channels
        self._clock = clock

    def claims(self, request: HTTPConnection) -> Claims:
        """Return what the request's token says: `Authorization: Bearer`, else the cookie of a GET or HEAD.

        Raises:
          TokenError: there is none, or it is not valid.
          TooManyFailures: it is not valid, and too many from this address were not.
        """
        with self._counting(request):
            return self._presented(request)

    def require(self, request: HTTPConnection, action: str) -> Claims:
        """Return the claims of a request that needs `action`. Raises as `claims` does, or Forbidden."""
        return _allowing(self.claims(request), action)

    def recheck(self, claims: Claims) -> None:
        """Look once more, behind a wait: what was let in may have expired, or been revoked. Raises TokenError."""
        self._refuse_revoked(claims)
        if claims.expires_at <= time.time():
            raise TokenError("expired", "the token has expired")

    def verify(self, connection: HTTPConnection, text: str) -> Claims:
        """Return the claims of a token that came in a message. Raises as `claims` does."""
        with self._counting(connection):
            return self._verified(text)

    async def admit(
        self, connection: HTTPConnection, action: str | None = None, *, query_token: bool = False
    ) -> Admission:
        """Let a GET or a WebSocket in: by `Authorization`, else `?ticket=`, else a cookie.

        A ticket is used up, which is committed before this returns, and becomes the cookie of a session. One that was
        used already, or is over, stands back behind the cookie it was swapped for: so EventSource, which knows no other
        URL, can come back. Cancelled meanwhile, the ticket may or may not have been used.

        Args:
          action: what the claims have to allow.
          query_token: whether `?token=` counts as well, for the seeds' WebSocket clients.

        Raises:
          TokenError, TooManyFailures: nobody is let in by what there is.
          Forbidden: the claims do not allow `action`.
          NotWritable: the ticket cannot be used up now, because the store does not take it.
        """
        with self._counting(connection):
            admission = await self._admitted(connection, query_token)
        connection.scope.get(_SCOPE_KEY, []).extend(admission.cookies)
        if action is not None:
            _allowing(admission.claims, action)
        return admission

    async def _admitted(self, connection: HTTPConnection, query_token: bool) -> Admission:
        query = connection.query_params
        if "authorization" not in connection.headers and _method(connection) in _COOKIE_METHODS:
            if TICKET in query:
                return await self._redeemed(connection, _once(query.getlist(TICKET)))
            if query_token and TOKEN in query:
                return Admission(self._verified(_once(query.getlist(TOKEN))))
        return Admission(self._presented(connection))

    async def _redeemed(self, connection: HTTPConnection, text: str) -> Admission:
        ticket = tokens.read_ticket(self.key, text)
        self._refuse_revoked(ticket.claims)
        now = time.time()
        in_time = now < ticket.valid_until
        if in_time and not self._desk.is_used(ticket) and await self._desk.redeem(ticket):
            value = tokens.session_of(self.key, ticket.claims, now)
            made = cookies.session_cookies(connection, ticket.claims, value, now)
            return Admission(ticket.claims, tuple(made))
        values = cookies.values_in(connection, first=cookies.name_of(ticket.claims))
        if values:
            return Admission(self._from_cookies(connection, values))
        if in_time:
            raise TokenError(
                "spent", "the ticket was used, and its session's cookie is not here; get another one"
            )
        raise TokenError("expired", "the ticket has expired; get another one")

    def _presented(self, connection: HTTPConnection) -> Claims:
        headers = connection.headers.getlist("authorization")
        if headers:
            return self._verified(_bearer(headers))
        return self._from_cookies(connection, cookies.values_in(connection))

    def _from_cookies(self, connection: HTTPConnection, values: list[str]) -> Claims:
        """Return the claims of the first cookie that is valid; browsers keep what is over, or of another path."""
        failure = TokenError("missing", "a token is needed")
        if values and (reason := self._against_cookie(connection)):
            raise TokenError("missing", reason)
        for value in values:
            try:
                return self._verified(value, ("token", "cookie"))
            except TokenError as error:
                failure = error if failure.code == "missing" else failure
        raise failure

    def _verified(self, text: str, uses: tuple[Use, ...] = ("token",)) -> Claims:
        claims = self.known(text)
        if claims is None and self._channels and background.is_channel(text) and "token" in uses:
            claims = background.channel_claims(text)
            self._refuse_revoked(claims)
        elif claims is None:
            claims = tokens.verify(self.key, text, uses=uses)
            self._refuse_revoked(claims)
            if uses == ("token",) and len(text) <= MAX_KNOWN_TEXT:
                self._known[text] = claims
                if len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        return claims

    def known(self, text: str) -> Claims | None:
        """Return the claims of a token that was accepted lately, and is still good; None: verify it.

        A signature stays right. What can change is looked at each time: whether it is over, and taken back.
        """
        claims = self._known.get(text)
        if claims is None or claims.expires_at <= time.time() or self._desk.is_revoked(claims):
            return None
        return claims

    def _refuse_revoked(self, claims: Claims) -> None:
        if self._desk.is_revoked(claims):
            raise TokenError("revoked", "the token was revoked")

    @contextmanager
    def _counting(self, connection: HTTPConnection) -> Iterator[None]:
        """Count what is presented in vain, for the address as well; a request without anything tries nothing."""
        try:
            yield
        except TokenError as error:
            self.bad_tokens[error.code] += 1
            if error.code == "missing":
                raise
            wait = self._failures.note(address_of(connection.scope.get("client")), self._clock())
            if wait:
                raise TooManyFailures(wait) from None
            raise

    def knows_origin(self, request: HTTPConnection) -> bool:
        """Whether a page that sends this may have an answer: no page of another site, unless CORS_ORIGINS has it."""
        origin = request.headers.get("origin")
        # Absent on same-origin GETs and on navigation, which shows its result to nobody else. A browser's WebSocket
        # always sends it (RFC 6455 §4.1), and no CORS protects that one: this comparison does.
        if origin is None or _is_same_origin(origin, request):
            return True
        return not self.cors_origins.isdisjoint({origin, "*"})

    def _against_cookie(self, request: HTTPConnection) -> str:
        """Return why a cookie does not count here, with the remedy; "" when it does."""
        if _method(request) not in _COOKIE_METHODS:
            return "a cookie counts for GET and HEAD only; send a Bearer token"
        origin = request.headers.get("origin")
        if origin is None or origin in self.cors_origins or _is_same_origin(origin, request):
            return ""
        return f"origin {origin[:200]!r} is not in CORS_ORIGINS; add it, or send a Bearer token"


def _method(connection: HTTPConnection) -> str:
    """Return the method; a WebSocket begins with a GET, which ASGI does not say."""
    return str(connection.scope.get("method", "GET"))


def _once(values: list[str]) -> str:
    if len(values) != 1:
        raise TokenError("malformed", "there must be one ticket or token in the query")
    return values[0]


def _allowing(claims: Claims, action: str) -> Claims:
    if not claims.may(action):
        raise Forbidden(f"the token does not allow {action!r}")
    return claims


def require_sight_of_all(claims: Claims) -> None:
    """Refuse a token of single runs: processes and counts tell about everybody's.

    Raises:
      Forbidden: it has neither `operate` nor `read` of every run.
    """
    if not (claims.may("operate") or (claims.may("read") and claims.runs == "*")):
        raise Forbidden("the token needs 'operate', or 'read' of every run")


def _is_same_origin(origin: str, request: HTTPConnection) -> bool:
    return origin.partition("://")[2].lower() == cookies.host(request)


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


def seconds_left(claims: Claims) -> float:
    """Return the seconds for which a token is still good."""
    return max(0.0, claims.expires_at - time.time())


class TicketCookies:
    """Gives the answer to a request with a ticket the cookies that it was swapped for, whatever the answer is.

    A ticket that opened the door to a 404 is used up all the same.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if TICKET.encode() not in scope.get("query_string", b""):
            await self.app(scope, receive, send)
            return
        made: list[str] = []

        async def send_with_cookies(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                values = [(b"set-cookie", value.encode("latin-1")) for value in made]
                message = {**message, "headers": [*message.get("headers", ()), *values]}
            await send(message)

        await self.app({**scope, _SCOPE_KEY: made}, receive, send_with_cookies)


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
        if host is None:
            return problem(None, "bad-host", "the Host header is malformed", instance=scope["path"])
        return problem(
            None, "wrong-host", f"{host} is not served here; add it to ALLOWED_HOSTS", instance=scope["path"]
        )
