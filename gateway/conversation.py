"""One WebSocket client that is told of runs: a snapshot, every change, the events of those that it follows.

Rule: whoever is told waits for nobody but itself. What waits for a client is a bounded watch (gateway.changes) and
positions in streams; while it is behind, only the newest state of each run is told.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final

import trio
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gateway import dialects, sse
from gateway.dialects import Complaint, Filter, Ping, Renew, Said, Subscribe, Updates
from gateway.face import Engine
from gateway.fanout import Entry
from gateway.following import Follower, Piece, Reset
from gateway.reach import limit_to_reach, reaches
from gateway.sessions import Session, TooManyStreams
from gateway.store.protocol import StoreError
from gateway.store.rows import RunFilter, RunRow
from taskkit.identifiers import parse_run_id
from taskkit.lifecycle import RunStatus
from taskkit.tokens import Claims, TokenError

logger = logging.getLogger(__name__)

#: Changes taken at once above which a client counts as behind. A client that keeps up takes a few at a time, and
#: shall see each state of a run, however short.
BEHIND: Final = 64

#: Filters of one connection; each is asked about every change of any run.
MAX_FILTERS: Final = 16

#: Runs that one connection follows. Precedents: Centrifugo 128, Supabase 100, Nchan 255.
MAX_FOLLOWED: Final = 128

#: Runs of a snapshot that are read at once. Each may have 1 MiB of arguments, held until a slow client has taken it.
PAGE: Final = 25

#: Ended runs of each state in a snapshot, the newest; GET /api/v1/runs has the others.
MAX_ENDED: Final = 1_000

#: Changes that are looked at in a row, before others have their turn.
TURN: Final = 50

#: Seconds for which a change may still be published that a snapshot has shown. It takes milliseconds from a commit.
SETTLE_SECONDS: Final = 10.0

#: Seconds before a store that does not answer is asked again.
STORE_PAUSE: Final = 1.0

#: Close codes (RFC 6455 §7.4.1). bazis's clients come back after any but POLICY.
GOING_AWAY: Final = 1001
NOT_TEXT: Final = 1003
POLICY: Final = 1008
INTERNAL: Final = 1011


class _Shown:
    """What a snapshot has shown, so that a change published behind it takes nothing back."""

    def __init__(self) -> None:
        self._versions: dict[int, int] = {}
        self._until = 0.0

    def note(self, run: RunRow) -> None:
        self._versions[run.no] = run.version
        self._until = trio.current_time() + SETTLE_SECONDS

    def precedes(self, run: RunRow) -> bool:
        """Whether this change is newer than what was shown."""
        if self._versions and trio.current_time() > self._until:
            self._versions.clear()
        return run.version > self._versions.get(run.no, 0)


class Conversation:
    """What one client is told, and what it says.

    Args:
      session: its place among the streams of its token; entered by the caller.
      verify: turns a token that the client sends into claims; raises TokenError.
      channel: whether it is told of its own runs in bazis's frames; then of others by `subscribe` only.
    """

    def __init__(
        self,
        socket: WebSocket,
        engine: Engine,
        updates: Updates,
        session: Session,
        verify: Callable[[str], Awaitable[Claims]],
        *,
        channel: bool,
    ) -> None:
        self._socket = socket
        self._engine = engine
        self._updates = updates
        self._verify = verify
        self._session = session
        self._believe(session.claims)
        self._channel = channel
        self._filters: list[Filter] = []
        self._has_asked = False
        self._follows: dict[str, trio.CancelScope] = {}
        self._shown = _Shown()
        self._shown_on_channel = _Shown()
        self._watch = engine.changes.watch()
        self._telling = trio.Lock()
        self._renewed = trio.Event()
        self._ending: tuple[int, str] | None = None
        self._last_word = ""
        self._nursery: trio.Nursery

    def _believe(self, claims: Claims) -> None:
        self._claims = claims
        # A wall clock that steps later does not matter (as for streams).
        self._expires_at = trio.current_time() + claims.expires_at - time.time()

    async def run(self) -> None:
        """Talk until the client leaves, its token expires, or the gateway shuts down; close the WebSocket."""
        with self._watch:
            async with trio.open_nursery() as self._nursery:
                self._session.on_end(self._revoked)
                for task in (self._listen, self._tell, self._expire, self._await_shutdown):
                    self._nursery.start_soon(self._guarded, task)
        if self._ending is not None:
            await self._say_goodbye(*self._ending)

    async def _guarded(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run one task of the conversation, which is over for all of them when it fails."""
        try:
            await task()
        except WebSocketDisconnect:
            self._nursery.cancel_scope.cancel()
        except Exception:
            logger.exception("a conversation on %s failed", self._socket.scope["path"])
            self._end(INTERNAL, "internal_error", "something went wrong here; come back")

    def _end(self, code: int, reason: str, detail: str = "") -> None:
        """Close with `code`; on the channel, `detail` is told in bazis's words first."""
        if self._ending is None:
            self._ending = code, reason
            self._last_word = dialects.error_message(reason, detail) if detail and self._channel else ""
        self._nursery.cancel_scope.cancel()

    async def _say_goodbye(self, code: int, reason: str) -> None:
        try:
            if self._last_word:
                await self._say(self._last_word)
            await self._socket.close(code, reason)
        except WebSocketDisconnect:
            pass  # it has left meanwhile

    async def _say(self, text: str) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()  # the write below is shielded
        if self._socket.application_state is not WebSocketState.CONNECTED:
            raise WebSocketDisconnect(1006)  # another task has noticed already
        await self._socket.send_text(text)

    # --- how it ends ------------------------------------------------------------------------------------------

    def _revoked(self) -> None:
        self._end(POLICY, "invalid_token", "the token was revoked")

    async def _expire(self) -> None:
        over = False
        while not over:
            self._renewed = trio.Event()
            with trio.move_on_at(self._expires_at) as scope:
                await self._renewed.wait()
            over = scope.cancelled_caught
        self._end(POLICY, "expired_token", "the token has expired; connect with another one")

    async def _await_shutdown(self) -> None:
        await self._engine.hub.wait_closing()
        await self._tell_news()  # what was committed last
        self._end(GOING_AWAY, "the gateway shuts down; come back")

    # --- what it says -----------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        await self._greet()
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                self._nursery.cancel_scope.cancel()
                return
            text = message.get("text")
            if text is None:
                self._end(NOT_TEXT, "messages are text")
                return
            try:
                await self._act(dialects.parse(text))
            except Complaint as error:
                await self._say(dialects.error_message(error.code, str(error)))

    async def _greet(self) -> None:
        if self._channel:
            async with self._telling:
                await self._show_channel()
            await self._say(dialects.SUBSCRIBED)
        else:
            self._filters.append(Filter())
            async with self._telling:
                await self._show(Filter())

    async def _act(self, said: Said) -> None:
        if isinstance(said, Ping):
            await self._say(dialects.PONG)
        elif isinstance(said, Renew):
            await self._renew(said.token)
        elif isinstance(said, Subscribe):
            await self._subscribe(said)
        else:
            self._forget_wishes()

    async def _renew(self, token: str) -> None:
        try:
            claims = await self._verify(token)
        except TokenError as error:
            reason = "expired_token" if error.code == "expired" else "invalid_token"
            self._end(POLICY, reason, str(error))
            return
        if not claims.may("read"):
            self._end(POLICY, "invalid_token", "the token does not allow 'read'")
            return
        try:
            self._session.change(claims)
        except TooManyStreams as error:
            self._end(POLICY, "invalid_token", str(error))
            return
        self._believe(claims)
        self._renewed.set()
        await self._say(dialects.SUBSCRIBED)

    async def _subscribe(self, said: Subscribe) -> None:
        if len(self._filters) >= MAX_FILTERS:
            raise Complaint("too-many", f"a connection has {MAX_FILTERS} filters at most; unsubscribe first")
        if said.cursor is not None:
            await self._start_following(said.run, said.cursor)
        if not self._has_asked:
            self._forget_wishes(follows=False)
        self._filters.append(said.filter)
        async with self._telling:
            await self._show(said.filter, said.since)
        await self._say(dialects.SUBSCRIBED)

    def _forget_wishes(self, *, follows: bool = True) -> None:
        self._has_asked = True
        self._filters.clear()
        for scope in self._follows.values() if follows else ():
            scope.cancel()

    # --- runs -------------------------------------------------------------------------------------------------

    async def _tell(self) -> None:
        while True:
            await self._watch.wait()
            await self._tell_news()

    async def _tell_news(self) -> None:
        async with self._telling:
            runs, missed = self._watch.take()
            if missed:
                await self._start_over()
            for number, run in enumerate(runs if len(runs) <= BEHIND else _newest_states(runs), 1):
                await self._tell_of(run)
                if number % TURN == 0:
                    await trio.lowlevel.checkpoint()

    async def _tell_of(self, run: RunRow) -> None:
        if not reaches(self._claims, run):
            return
        if self._shown.precedes(run) and any(one.matches(run) for one in self._filters):
            await self._say(self._updates.of(run))
        if self._is_on_channel(run) and self._shown_on_channel.precedes(run):
            await self._say(dialects.channel_frame(run))

    def _is_on_channel(self, run: RunRow) -> bool:
        return self._channel and run.subject != "" and run.subject == self._claims.subject

    async def _start_over(self) -> None:
        """Changes were dropped, the ends of runs perhaps among them: tell what is open now."""
        await self._say(dialects.LAGGED)
        await self._show_channel()
        for one in tuple(self._filters):
            await self._show(one)

    async def _show(self, one: Filter, since: float | None = None) -> None:
        """Tell of every open run that a filter selects, and of ended ones made since `since`."""
        async with aclosing(self._runs(one, since)) as runs:
            async for run in runs:
                self._shown.note(run)
                await self._say(self._updates.of(run))

    async def _show_channel(self) -> None:
        if not (self._channel and self._claims.subject):
            return
        async with aclosing(self._runs(Filter(users=frozenset({self._claims.subject})))) as runs:
            async for run in runs:
                self._shown_on_channel.note(run)
                await self._say(dialects.channel_frame(run))

    async def _runs(self, one: Filter, since: float | None = None) -> AsyncGenerator[RunRow, None]:
        for status in RunStatus:
            if status.is_terminal and since is None:
                continue
            which = self._selection(one)
            which.status, which.since = status, since if status.is_terminal else None
            left = MAX_ENDED if status.is_terminal else math.inf
            page = await self._read(which)
            while page:
                for run in page:
                    if one.matches(run) and reaches(self._claims, run):
                        yield run
                which.before = page[-1].no
                left -= len(page)
                page = await self._read(which) if len(page) == PAGE and left > 0 else []

    def _selection(self, one: Filter) -> RunFilter:
        """Return what the store has to look through: no less than what the filter and the claims select."""
        which = RunFilter(limit=PAGE)
        if one.users is not None and len(one.users) == 1:
            (which.subject,) = one.users
        if one.runs is not None:
            which.ids = tuple(sorted(one.runs))
        else:
            limit_to_reach(which, self._claims)
        return which

    async def _read(self, which: RunFilter) -> list[RunRow]:
        while True:
            try:
                return await self._engine.store.runs(which)
            except StoreError as error:
                logger.warning("a WebSocket waits for the store: %s", error)
            await trio.sleep(STORE_PAUSE)

    # --- events -----------------------------------------------------------------------------------------------

    async def _start_following(self, id: str, cursor: sse.Cursor) -> None:
        canonical = parse_run_id(id)
        try:
            run = None if canonical is None else await self._engine.store.run(canonical)
        except StoreError as error:
            raise Complaint("not-writable", f"the store does not answer, subscribe again: {error}") from error
        if run is None or not reaches(self._claims, run):
            raise Complaint("unknown-run", "there is no such run, or the token does not reach it")
        if (before := self._follows.pop(run.id, None)) is not None:
            before.cancel()
        if len(self._follows) >= MAX_FOLLOWED:
            raise Complaint(
                "too-many", f"a connection follows {MAX_FOLLOWED} runs at most; unsubscribe first"
            )
        scope = self._follows[run.id] = trio.CancelScope()

        async def follow() -> None:
            with scope:
                await self._follow(run, cursor)
            if self._follows.get(run.id) is scope:
                del self._follows[run.id]

        self._nursery.start_soon(self._guarded, follow)

    async def _follow(self, run: RunRow, cursor: sse.Cursor) -> None:
        """Tell the events of a run to its end, or as long as the claims reach it."""
        with self._engine.hub.attach(run.no, run.epoch) as subscription:
            follower = Follower(self._engine.store, subscription, run, cursor)
            while reaches(self._claims, run) and not subscription.closing:
                try:
                    told = await self._tell_events(run, follower)
                except StoreError as error:
                    logger.warning("a WebSocket waits for the store: %s", error)
                    await trio.sleep(STORE_PAUSE)
                    continue
                if follower.done:
                    return
                if not told:
                    await follower.wait()

    async def _tell_events(self, run: RunRow, follower: Follower) -> bool:
        """Tell what is there; return whether it was anything. One batch at a time is held for a client, not 128."""
        async with self._telling:
            pieces = await follower.read()
            for piece in pieces:
                await self._say(_event(run.id, piece))
                self._engine.hub.tally.delivered += 1
        return bool(pieces)


def _newest_states(runs: Sequence[RunRow]) -> list[RunRow]:
    """Return the newest picture of each run, in the order of their changes."""
    newest = {run.no: run for run in runs}
    return [run for run in runs if newest[run.no] is run]


def _event(run: str, piece: Piece) -> str:
    if isinstance(piece, Entry):
        return dialects.event_message(run, piece.id, piece.row.type, piece.row.data)
    assert isinstance(piece, Reset), "output lines were not asked for"
    return dialects.event_message(run, piece.id, "stream.reset", sse.reset_data(piece.start, piece.reason))
