"""The routes of django-streaming-coordinator: a task row's stream, or what became of it."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway import queries, snapshot, sse
from gateway.api import read_cursor, result_of
from gateway.auth import Authenticator
from gateway.describing import Description, Reply, choice
from gateway.face import Engine
from gateway.following import is_over, wait_for_end
from gateway.leaving import watched
from gateway.reading import Refusal, asks_for
from gateway.resource import Resource, answer
from gateway.store.rows import RunRow
from gateway.stream import BUSY, HEADERS, RunStream, Wish
from gateway.submission import row_submission
from taskkit.errors import NotWritable
from taskkit.lifecycle import RunStatus
from taskkit.tokens import Claims
from taskkit.wire.messages import Answer, Row

#: Seconds to wait for the outcome of a run that has said `complete`. The seed closes its streams at that
#: event, and its clients ask for the result right behind it.
OUTCOME_SECONDS: Final = 1.0

#: Newest events among which `complete` is looked for: lifecycle events may follow it.
_NEWEST: Final = 3

#: The seed's words for how a run ended.
_WORDS: Final = {
    RunStatus.SUCCESSFUL: "completed",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "cancelled",
}

_REFUSALS: Final = ("unknown-row", "bad-primary-key", "ambiguous-model", "not-started")

REPLAY: Final = choice("replay", ["all", "latest"], "Where a client without a cursor begins.")


class SeedRoutes:
    """Serves /stream/{app}/{model}/{pk} and /stream/{model}/{pk} over one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator

    def routes(self) -> list[Route]:
        """Return the routes, for Starlette."""
        resource = Resource(get=self.show)
        return [
            Route("/stream/{app}/{model}/{pk}", resource),
            Route("/stream/{model}/{pk}", resource),
        ]

    @Description(
        needs="read",
        query=(REPLAY, *queries.BEGIN),
        headers=(queries.LAST_EVENT_ID,),
        answers={
            200: Reply(
                f"The stream, or the outcome. {BUSY}", {sse.EVENT_STREAM: bytes, sse.JSON: dict[str, Any]}
            ),
            204: Reply("The run has ended, and the client has all of it."),
        },
        problems=(*_REFUSALS, "bad-cursor", "queue-full", "too-many-streams"),
    )
    async def show(self, request: Request) -> ASGIApp:
        """Serve the stream of a task row, or its outcome to a client that asks for no event stream."""
        claims = (await self._authenticator.admit(request, "read")).claims
        cursor = _cursor(request)
        streams = asks_for(request.headers.get("accept"), sse.EVENT_STREAM)
        found = await self._ask(request)
        row = _row(found)
        run = await self._engine.store.run_of_row(row.key)
        id, subject = ("", "") if run is None else (run.id, run.subject)
        if not claims.sees_run(id, found.task, subject):
            raise _unknown()
        if run is None:
            return await self._without_run(request, claims, found, row, cursor, streams)
        if not streams and not run.status.is_terminal and await self._is_about_to_end(found, run):
            async with watched(request.receive) as client:
                run = await wait_for_end(self._engine.store, self._engine.hub, run, client, OUTCOME_SECONDS)
            found = await self._ask(request)
        if run.status.is_terminal and not streams:
            return answer(await self._outcome(found, run))
        if is_over(run, cursor):
            return Response(None, 204, {"Cache-Control": "no-store"})
        return self._stream(run, cursor, claims)

    async def _ask(self, request: Request) -> Answer:
        parts = request.path_params
        return await self._engine.ask(parts.get("app", ""), parts["model"], parts["pk"])

    def _stream(self, run: RunRow, cursor: sse.Cursor, claims: Claims) -> RunStream:
        # No end of life: the seed's clients do not reconnect.
        wish = Wish(
            rendering=sse.EVENT_STREAM,
            cursor=cursor,
            session=self._authenticator.sessions.new(claims),
            life=None,
            expires_in=claims.expires_at - time.time(),
        )
        return RunStream(self._engine.store, self._engine.hub, run, wish)

    async def _is_about_to_end(self, found: Answer, run: RunRow) -> bool:
        if found.completed_at is not None:
            return True
        newest = await self._engine.store.events(run.no, max(0, run.tail - _NEWEST), _NEWEST, 65536)
        return any(event.type == "complete" for event in newest)

    async def _outcome(self, found: Answer, run: RunRow) -> dict[str, Any]:
        """Return what became of the row: the row's own word if it says it is completed, else the run's."""
        if found.completed_at is not None:
            return _completed(found)
        word = _WORDS[run.status]
        if run.status is not RunStatus.SUCCESSFUL:
            return {"status": word, "error": snapshot.raw(run.error)}
        return {
            "status": word,
            "final_value": await result_of(self._engine.store, run),
            "completed_at": snapshot.rfc3339(run.finished_at),
        }

    async def _without_run(
        self,
        request: Request,
        claims: Claims,
        found: Answer,
        row: Row,
        cursor: sse.Cursor,
        streams: bool,
    ) -> ASGIApp:
        """Serve a row of which the store has no run: completed elsewhere or long ago, or never started."""
        if found.completed_at is not None:
            return _replayed_end(found, cursor) if streams else answer(_completed(found))
        if not (self._engine.settings.start_on_connect and claims.may_submit(found.task)):
            raise Refusal(
                "not-started",
                "this row was never started: submit it (with START_ON_CONNECT a GET may, given the action submit)",
            )
        if request.method == "HEAD":
            return _event_stream(b"")
        task = self._engine.catalogue.find(found.task)
        submission = row_submission(task, row, subject=claims.subject, pools=self._engine.settings.all_pools)
        run, _ = await self._engine.submit(submission)
        return self._stream(run, cursor, claims)


def _cursor(request: Request) -> sse.Cursor:
    """Return where to begin; `?replay=latest` is the seed's way: a late client gets the newest event."""
    replay = request.query_params.get("replay", "all")
    if replay not in ("all", "latest"):
        raise Refusal("bad-parameter", "replay: must be all or latest", parameter="replay")
    cursor = read_cursor(request)
    joins = not request.headers.get("last-event-id") and cursor == sse.Cursor()
    return sse.Cursor(origin=sse.Origin.LATEST) if joins and replay == "latest" else cursor


def _row(found: Answer) -> Row:
    """Return the row that the courier found.

    Raises:
      Refusal: 404, 400 or 409; the caller's fault.
      NotWritable: the database is away.
    """
    if found.status == "found" and found.row is not None:
        return found.row
    if found.status == "bad_pk":
        raise Refusal("bad-primary-key", found.detail or "the primary key cannot be read")
    if found.status == "ambiguous":
        raise Refusal(
            "ambiguous-model",
            found.detail or "several apps have such a model: use /stream/{app}/{model}/{pk}",
        )
    if found.status == "away":
        raise NotWritable(found.detail or "the database does not answer", retry_after=OUTCOME_SECONDS)
    raise _unknown()


def _unknown() -> Refusal:
    return Refusal("unknown-row", "there is no such task row, or the token does not reach it")


def _completed(found: Answer) -> dict[str, Any]:
    return {
        "status": "completed",
        "final_value": msgspec.Raw(found.final_value or b"null"),
        "completed_at": found.completed_at,
    }


def _replayed_end(found: Answer, cursor: sse.Cursor) -> Response:
    """Return a stream of nothing but its end; its id stops an EventSource that comes back."""
    if cursor.resolve(1) >= 1:
        return Response(None, 204, {"Cache-Control": "no-store"})
    end = {"status": RunStatus.SUCCESSFUL, "result": msgspec.Raw(found.final_value or b"null")}
    return _event_stream(sse.HEARTBEAT + sse.event_bytes(1, sse.STREAM_END, msgspec.json.encode(end)))


def _event_stream(body: bytes) -> Response:
    headers = {name.decode(): value.decode() for name, value in HEADERS}
    return Response(body, 200, headers, media_type=sse.EVENT_STREAM)
