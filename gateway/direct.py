"""Opens the stream of a run for a request that has nothing special about it, without the way through the routes.

Rule: here is only said yes. Whatever is missing, refused or new (a token that was not verified lately, a run that
nobody follows yet, a parameter but a cursor) returns None, has changed nothing, and goes the whole way through
gateway.app, whose handlers have all the rules and all the answers. What they would let pass is let pass here: same
host, token, revocation, reach, cursor, number of streams.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Final

from gateway import plain, snapshot, sse
from gateway.auth import Authenticator, host_of, is_allowed_host, seconds_left
from gateway.face import Engine
from gateway.reach import reaches
from gateway.stream import RunStream, Wish

_PATH: Final = re.compile(re.escape(snapshot.API.encode()) + rb"/runs/([0-9a-f-]{36})/events")
_QUERY: Final = re.compile(rb"after=([0-9a-z.-]{1,60})")

#: Hosts remembered: whoever makes them up displaces other such.
_HOSTS: Final = 128


class Direct:
    """The short way to a stream."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._is_ours = lru_cache(_HOSTS)(partial(_is_ours, authenticator.allowed_hosts))

    def stream_of(self, request: plain.Request) -> RunStream | None:
        """Return the stream that is asked for; None: go the whole way."""
        path, query = _PATH.fullmatch(request.path), _QUERY.fullmatch(request.query)
        if path is None or (query is None and request.query):
            return None
        headers = dict(request.headers)
        # One of a kind each, for what a second one means differs from header to header; CORS is for gateway.app alone.
        if len(headers) != len(request.headers) or b"origin" in headers:
            return None
        run = self._engine.hub.followed(path[1].decode())
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if run is None or scheme != b"Bearer" or headers.get(b"accept") != sse.EVENT_STREAM.encode():
            return None
        claims = self._authenticator.known(token.decode())
        if claims is None or not claims.may("read") or not reaches(claims, run):
            return None
        if not self._is_ours(headers[b"host"]) or not self._authenticator.sessions.has_room(claims):
            return None
        try:
            cursor = sse.parse_cursor(
                headers.get(b"last-event-id", b"").decode(),
                {} if query is None else {"after": query[1].decode()},
            )
        except ValueError:
            return None
        wish = Wish(
            rendering=sse.EVENT_STREAM,
            cursor=cursor,
            session=self._authenticator.sessions.new(claims),
            expires_in=seconds_left(claims),
        )
        return RunStream(self._engine.store, self._engine.hub, run, wish)


def _is_ours(allowed: Sequence[str], header: bytes) -> bool:
    host = host_of(header.decode())
    return host is not None and is_allowed_host(host, allowed)
