"""The route /api/v1/events: many runs on one connection.

An id is the position of an event in the store: one short cursor, with which any choice of runs continues behind it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway import queries, sse
from gateway.auth import Authenticator
from gateway.describing import Description, Reply, names
from gateway.face import Engine
from gateway.fanout import Entry
from gateway.fields import Field, array, body_schema
from gateway.lagging import Lag
from gateway.merging import Merger, MixedPiece, merging, stale
from gateway.reach import limit_to_reach, reaches
from gateway.reading import Parameters, Refusal, negotiate, read_object
from gateway.selection import check_types
from gateway.sse import Cursor, Origin
from gateway.store.rows import Mix, RunFilter, RunRow
from gateway.stream import BUSY, EventStream, Wish
from gateway.submission import MAX_TAG
from taskkit.errors import InvalidArguments
from taskkit.identifiers import parse_run_id
from taskkit.tokens import Claims

_T = TypeVar("_T")

#: What a stream of many runs can be rendered as, the default first.
RENDERINGS: Final = (sse.EVENT_STREAM, sse.NDJSON)

#: Fields of a POST, as the parameters of a GET but for the plural. Items of a list are checked by `_of_body`.
FIELDS: Final = {
    "runs": array().about("Ids of runs."),
    "tags": array().about("Every run with one of these tags, now or later."),
    "types": array().about("Only events of these types; `stream.*` always."),
    "after": Field(
        lambda value: isinstance(value, str | int) and not isinstance(value, bool),
        "must be the id of an event, latest or now",
        {"type": ["string", "integer"]},
        "Where to begin: an id of this stream, `latest` or `now`.",
    ),
    "until": Field(
        lambda value: value == "done",
        "must be done",
        {"type": "string", "enum": ["done"]},
        "`done` ends the stream when all of `runs` have ended.",
    ),
}

_ANSWERS: Final = {
    200: Reply(f"The stream. {BUSY}", dict.fromkeys(RENDERINGS, bytes)),
    204: Reply("All of `run` have ended, and the client has all of them (with `until`)."),
}
_PROBLEMS: Final = ("unknown-run", "bad-cursor", "not-acceptable", "too-many-runs", "too-many-streams")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a request names: ids of runs, tags, types of events, where to begin, whether the runs' end is the end."""

    runs: tuple[str, ...]
    tags: tuple[str, ...]
    types: frozenset[str] | None
    cursor: Cursor
    until_done: bool


class Multiplex:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator

    @Description(
        needs="read",
        query=queries.MANY,
        headers=(queries.LAST_EVENT_ID,),
        answers=_ANSWERS,
        problems=_PROBLEMS,
    )
    async def follow(self, request: Request) -> ASGIApp:
        """Serve the stream of the runs in the query: `?run=…&run=…&tag=…`."""
        claims = (await self._authenticator.admit(request, "read")).claims
        return await self._stream(request, claims, _of_query(request))

    @Description(
        needs="read",
        headers=(queries.LAST_EVENT_ID,),
        body=body_schema(FIELDS),
        answers=_ANSWERS,
        problems=(*_PROBLEMS, "invalid-arguments"),
    )
    async def follow_listed(self, request: Request) -> ASGIApp:
        """Serve the stream of the runs in the body, which has room for more than a URL."""
        claims = self._authenticator.require(request, "read")
        Parameters(request, ())
        body = await read_object(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        return await self._stream(request, claims, _of_body(request, body))

    async def _stream(self, request: Request, claims: Claims, asked: _Asked) -> ASGIApp:
        rendering = negotiate(request.headers.get("accept"), RENDERINGS)
        if rendering is None:
            raise Refusal("not-acceptable", f"a stream of many runs comes as {', '.join(RENDERINGS)}")
        self._check_number(asked)
        runs = await self._visible(asked.runs, claims)
        reach = RunFilter()
        limit_to_reach(reach, claims)
        mix = Mix(
            runs=tuple(run.no for run in runs),
            tags=asked.tags,
            owner=reach.owner,
            ids=reach.ids,
            tasks=reach.tasks,
        )
        if asked.until_done and await self._is_over(mix, asked.cursor):
            return Response(None, 204, {"Cache-Control": "no-store"})
        wish = Wish(
            rendering=rendering,
            cursor=asked.cursor,
            types=asked.types,
            session=self._authenticator.sessions.new(claims),
            expires_in=max(0.0, claims.expires_at - time.time()),
        )
        visible = functools.partial(reaches, claims)
        return MixedStream(self._engine, mix, wish, reaches=visible, until_done=asked.until_done)

    def _check_number(self, asked: _Asked) -> None:
        number, most = len(asked.runs) + len(asked.tags), self._engine.settings.limits.streams_per_connection
        if number > most:
            raise Refusal(
                "too-many-runs",
                f"{number} runs and tags on one connection, LIMITS.streams_per_connection allows {most}: "
                "submit the runs with a tag and follow that, or open another connection",
                max_streams=most,
            )

    async def _visible(self, ids: Sequence[str], claims: Claims) -> list[RunRow]:
        """Return the runs with these ids; one beyond the token's reach is as unknown as one that is not there."""
        which = RunFilter(ids=tuple(ids), limit=len(ids))
        runs = await self._engine.store.runs(which) if ids else []
        seen = [run for run in runs if reaches(claims, run)]
        unknown = set(ids) - {run.id for run in seen}
        if unknown:
            raise Refusal(
                "unknown-run",
                f"there is no run {min(unknown)}, or the token does not reach it; leave it out",
                run=min(unknown),
            )
        return seen

    async def _is_over(self, mix: Mix, cursor: Cursor) -> bool:
        """Whether nothing of the named runs can follow the cursor."""
        hub = self._engine.hub
        if cursor.origin is Origin.LATEST or stale(hub, cursor) is not None:
            return False
        after = hub.horizon if cursor.origin is Origin.NOW else cursor.offset
        places, _ = await self._engine.store.places(Mix(runs=mix.runs), after, 0)
        return not any(place.open or place.next for place in places)


class MixedStream(EventStream[MixedPiece]):
    """One subscriber of many runs. Done when all that are named have ended, if it shall be then."""

    def __init__(
        self, engine: Engine, mix: Mix, wish: Wish, *, reaches: Callable[[RunRow], bool], until_done: bool
    ) -> None:
        super().__init__(engine.hub, wish, f"{len(mix.runs)} runs, {len(mix.tags)} tags")
        self._make = functools.partial(
            merging,
            engine.store,
            engine.hub,
            engine.changes,
            mix,
            wish.cursor,
            reaches=reaches,
            until_done=until_done,
        )
        self._as_sse = wish.rendering == sse.EVENT_STREAM

    @contextmanager
    def _open(self) -> Iterator[Merger]:
        with self._make() as merger:
            yield merger

    def _type_of(self, piece: MixedPiece) -> str:
        return piece.row.type if isinstance(piece, Entry) else "stream.reset"

    def _render(self, piece: MixedPiece | Lag) -> bytes:
        parts = _parts(piece)
        return sse.event_bytes(*parts) if self._as_sse else sse.ndjson_line(*parts)


def _parts(piece: MixedPiece | Lag) -> tuple[int | None, str, bytes]:
    """Return id, type and data of a piece; what concerns one run only leaves the cursor alone."""
    if isinstance(piece, Entry):
        return piece.row.pos, piece.row.type, piece.row.data
    if isinstance(piece, Lag):
        return None, "stream.lag", sse.lag_data(piece.skipped, piece.run)
    id = 0 if piece.run is None else None
    return id, "stream.reset", sse.reset_data(piece.start, piece.reason, piece.run)


def _of_query(request: Request) -> _Asked:
    query = Parameters(request, names(queries.MANY))

    def read(name: str, check: Callable[[Sequence[str]], _T]) -> _T:
        try:
            return check(query.texts(name))
        except ValueError as error:
            raise query.refusal(name, str(error)) from error

    runs, tags, types = read("run", _runs), read("tag", _tags), queries.TYPES.of(query)
    until = queries.DONE.of(query)
    for name, complaint in _wrong_choice("run", runs, tags, until).items():
        raise query.refusal(name, complaint)
    cursor = _cursor(request, request.query_params)
    return _Asked(runs=runs, tags=tags, types=types, cursor=cursor, until_done=until is not None)


def _of_body(request: Request, body: Mapping[str, Any]) -> _Asked:
    errors = {
        str(key)[:100]: f"is no field here; there are {', '.join(FIELDS)}"
        for key in body
        if key not in FIELDS
    }

    def read(name: str, check: Callable[[Sequence[Any]], Any], default: Any) -> Any:
        value = body.get(name)
        if value is None:
            return default
        try:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError("must be a list of texts")
            return check(value)
        except ValueError as error:
            errors[name] = str(error)
            return default

    runs, tags = read("runs", _runs, ()), read("tags", _tags, ())
    types = read("types", check_types, None)
    until, after = body.get("until"), body.get("after")
    for name, value in (("until", until), ("after", after)):
        if value is not None and not FIELDS[name].check(value):
            errors[name] = FIELDS[name].complaint
    errors = errors or _wrong_choice("runs", runs, tags, until)
    if errors:
        shown = "; ".join(f"{name}: {text}" for name, text in list(errors.items())[:5])
        raise InvalidArguments(f"the choice of streams is invalid: {shown}", errors=errors)
    cursor = _cursor(request, {} if after is None else {"after": str(after)})
    return _Asked(runs=runs, tags=tags, types=types, cursor=cursor, until_done=until is not None)


def _cursor(request: Request, parameters: Mapping[str, str]) -> Cursor:
    try:
        return sse.parse_position(request.headers.get("last-event-id"), parameters)
    except ValueError as error:
        raise Refusal("bad-cursor", str(error)) from error


def _runs(texts: Sequence[str]) -> tuple[str, ...]:
    found = [parse_run_id(text) for text in texts]
    if None in found:
        raise ValueError(f"{texts[found.index(None)][:100]!r} is no id of a run")
    return tuple(dict.fromkeys(id for id in found if id is not None))


def _tags(texts: Sequence[str]) -> tuple[str, ...]:
    if not all(0 < len(text) <= MAX_TAG for text in texts):
        raise ValueError(f"must be a text of 1 to {MAX_TAG} characters")
    return tuple(dict.fromkeys(texts))


def _wrong_choice(named: str, runs: Sequence[str], tags: Sequence[str], until: str | None) -> dict[str, str]:
    """Return what is wrong with a choice as a whole, by the name of what is to be changed."""
    if not runs and not tags:
        return {named: "name at least one run or tag"}
    if until and not runs:
        return {"until": "is about the runs that are named, and there is none: a tag has no end"}
    return {}
