"""The streams that are open, by the token that opened them: counted, ended when the token is taken back.

A stream (events, WebSocket) makes a `Session` of its claims and enters it for as long as it is open. It is told of a
revocation through `Session.on_end`, or waits for `Session.ended`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import trio
from starlette.requests import Request
from starlette.responses import Response

from gateway import sse
from gateway.reading import Refusal, asks_for, on_refusal
from taskkit.tokens import Claims

#: Milliseconds until a client that is one too many comes back, at least and at most: streams live ten minutes, so
#: places do not become free quickly.
BUSY_RETRY: Final = (5_000, 15_000)


class TooManyStreams(Refusal):
    """The token has as many streams open as it may."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            "too-many-streams",
            f"the token has {limit} streams open, as many as LIMITS.streams_per_token allows; close one of them",
            headers={"Retry-After": str(BUSY_RETRY[0] // 1000)},
            retry_after=BUSY_RETRY[0] / 1000,
        )
        self.limit = limit


class Session:
    """One open stream of a token; a context manager, entered once.

    Attributes:
      claims: of its token.
      ended: set when the token was revoked: the stream ends now.
    """

    def __init__(self, sessions: Sessions, claims: Claims) -> None:
        self.claims = claims
        self.ended = trio.Event()
        self._sessions = sessions
        self._on_end: Callable[[], None] | None = None

    @classmethod
    def of_nobody(cls) -> Session:
        """Return a session that counts for nobody, as of a stream that needs no token."""
        return Sessions(1).new(Claims("", float("inf"), "", frozenset(), frozenset(), ()))

    def __enter__(self) -> Self:
        """Count it.

        Raises:
          TooManyStreams: the token has LIMITS.streams_per_token already; nothing has changed.
        """
        self._sessions.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sessions.remove(self)

    def on_end(self, notice: Callable[[], None]) -> None:
        """Have `notice` called when the token is revoked; at once if it was. It must not wait or raise."""
        self._on_end = notice
        if self.ended.is_set():
            notice()

    def change(self, claims: Claims) -> None:
        """Go on with another token.

        Raises:
          TooManyStreams: that one has as many as it may; nothing has changed.
        """
        self._sessions.change(self, claims)

    def end(self) -> None:
        """Tell the stream to end."""
        self.ended.set()
        if self._on_end is not None:
            self._on_end()


class Sessions:
    """Every open stream of this gateway.

    Args:
      limit: streams at once per token.
      is_revoked: whether a token was taken back. Asked once more when a stream begins: it may have been since the
        request was let in.
    """

    def __init__(self, limit: int, is_revoked: Callable[[Claims], bool] = lambda _: False) -> None:
        self._limit = limit
        self._is_revoked = is_revoked
        self._open: dict[str, set[Session]] = {}

    def __len__(self) -> int:
        """How many are open."""
        return sum(len(sessions) for sessions in self._open.values())

    def new(self, claims: Claims) -> Session:
        """Return a session that counts from when it is entered."""
        return Session(self, claims)

    def add(self, session: Session) -> None:
        """Count a session. Raises TooManyStreams."""
        self._check_room(session.claims)
        self._open.setdefault(_key(session.claims), set()).add(session)
        if self._is_revoked(session.claims):
            session.end()

    def change(self, session: Session, claims: Claims) -> None:
        """Count a session for another token. Raises TooManyStreams."""
        if _key(claims) != _key(session.claims):
            self._check_room(claims)
            self.remove(session)
            self._open.setdefault(_key(claims), set()).add(session)
        session.claims = claims

    def has_room(self, claims: Claims) -> bool:
        """Whether one more of this token may be opened."""
        return len(self._open.get(_key(claims), ())) < self._limit

    def _check_room(self, claims: Claims) -> None:
        if not self.has_room(claims):
            raise TooManyStreams(self._limit)

    def remove(self, session: Session) -> None:
        """Count it no longer."""
        key = _key(session.claims)
        self._open[key].discard(session)
        if not self._open[key]:
            del self._open[key]

    def end_revoked(self) -> int:
        """End the streams whose tokens have been taken back; return how many those are."""
        streams = [one for sessions in self._open.values() for one in sessions]
        found = [one for one in streams if not one.ended.is_set() and self._is_revoked(one.claims)]
        for session in found:
            session.end()
        return len(found)


def _key(claims: Claims) -> str:
    """Return what is counted together: one token, or without a `jti` all of a subject."""
    return f"jti {claims.id}" if claims.id else f"sub {claims.subject}"


async def on_too_many_streams(request: Request, error: Exception) -> Response:
    """Answer a stream too many: EventSource gives up for good on any status but 200, so its clients get a stream that
    only says when to come back (CONTRACT §2.3); 429 for the rest."""
    assert isinstance(error, TooManyStreams)
    if not asks_for(request.headers.get("accept"), sse.EVENT_STREAM):
        return await on_refusal(request, error)
    data = b'{"reason":"streams_per_token","limit":%d}' % error.limit
    body = sse.retry(random.randint(*BUSY_RETRY)) + sse.event_bytes(None, "stream.busy", data)
    headers = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
    return Response(body, 200, headers, media_type=sse.EVENT_STREAM)
