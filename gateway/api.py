"""The routes under /api/v1, plus the two probes /health, /ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway import queries, snapshot, sse
from gateway.auth import Authenticator, require_sight_of_all, seconds_left
from gateway.batch import Batching
from gateway.describing import SIGHT_OF_ALL, Description, Reply, document, names
from gateway.documents import EventPage, Ready, Runners, Stats, Tasks
from gateway.face import Engine
from gateway.fields import Field, body_schema, read, seconds
from gateway.finding import find_run
from gateway.following import is_over, wait_for_end
from gateway.granting import Granting
from gateway.keeping import Keeping
from gateway.leaving import watched
from gateway.multiplex import Multiplex
from gateway.operating import Operating
from gateway.pages import read_page
from gateway.reach import limit_to_reach
from gateway.reading import (
    Parameters,
    Refusal,
    negotiate,
    page_cursor,
    preferred_wait,
    read_object,
)
from gateway.resource import Resource, answer
from gateway.retention import Retention
from gateway.roster import measure
from gateway.scheduling import Scheduling
from gateway.selection import wants
from gateway.store.protocol import Store, StoreError
from gateway.store.rows import AttemptRow, OutputRow, RunFilter, RunRow
from gateway.stream import BUSY, RENDERINGS, RunStream, Wish
from gateway.submitting import Submitting
from gateway.telling import Telling
from taskkit.errors import Forbidden, InvalidArguments, UnknownTask
from taskkit.lifecycle import Ending, RunStatus
from taskkit.tokens import Claims

#: Lines of output shown with an attempt that ended badly, and the newest such attempts that get them.
TAIL_LINES: Final = 20
TAIL_ATTEMPTS: Final = 5

MAX_GRACE: Final = 3600.0  # seconds

#: What a cancellation may say.
CANCEL_FIELDS: Final[Mapping[str, Field]] = {
    "grace": seconds(MAX_GRACE).about(
        "Between asking the run to stop and TERM; a later, longer one changes nothing."
    )
}

#: Seconds in which the store has to answer /ready.
READY_SECONDS: Final = 2.0

#: A well-formed run id that no run has: what /ready asks the store for.
_NOBODY: Final = "00000000-0000-7000-8000-000000000000"


class Api:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator, retention: Retention) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._retention = retention
        self._keeping = Keeping(engine, authenticator, retention)
        self._submitting = Submitting(engine, authenticator)
        self._batching = Batching(engine, authenticator, self._submitting)
        self._operating = Operating(engine, authenticator)
        self._granting = Granting(engine, authenticator)
        self._telling = Telling(engine, authenticator)
        self._multiplex = Multiplex(engine, authenticator)
        self._scheduling = Scheduling(engine, authenticator, self._submitting)

    def routes(self) -> list[Route]:
        """Return the routes, for Starlette."""
        base = snapshot.API
        return [
            Route(f"{base}/runs", Resource(get=self.list_runs, post=self._submitting.submit)),
            Route(f"{base}/runs/batch", Resource(post=self._batching.submit)),
            Route(f"{base}/runs/{{id}}", Resource(get=self.show_run)),
            Route(f"{base}/runs/{{id}}/result", Resource(get=self.show_result)),
            Route(f"{base}/runs/{{id}}/events", Resource(get=self.follow_run)),
            Route(f"{base}/runs/{{id}}/cancel", Resource(post=self.cancel_run)),
            Route(f"{base}/runs/{{id}}/replay", Resource(post=self._submitting.replay)),
            Route(f"{base}/runs/{{id}}/input/{{inbox}}", Resource(post=self._telling.tell)),
            Route(f"{base}/events", Resource(get=self._multiplex.follow, post=self._multiplex.follow_listed)),
            Route(f"{base}/runners", Resource(get=self.list_runners)),
            Route(f"{base}/runners/{{id}}/kill", Resource(post=self._operating.kill_runner)),
            Route(f"{base}/runners/{{id}}/drain", Resource(post=self._operating.drain_runner)),
            Route(f"{base}/tasks", Resource(get=self.list_tasks)),
            Route(f"{base}/tasks/{{name}}", Resource(get=self.show_task)),
            Route(f"{base}/tasks/{{name}}/reset", Resource(post=self._operating.reset_task)),
            Route(f"{base}/stats", Resource(get=self.statistics)),
            Route(f"{base}/vacuum", Resource(post=self._keeping.vacuum)),
            *self._granting.routes(),
            *self._scheduling.routes(),
            Route("/health", Resource(get=health)),
            Route("/ready", Resource(get=self.ready)),
        ]

    # --- runs -----------------------------------------------------------------------------------------------

    @Description(
        needs="read",
        query=queries.LIST,
        answers={200: document(snapshot.Page, "A page of runs.")},
    )
    async def list_runs(self, request: Request) -> Response:
        """Serve the page of runs that the token may see, newest first."""
        claims = (await self._authenticator.admit(request, "read")).claims
        which = self._filter(request)
        limit, which.limit = which.limit, which.limit + 1
        limit_to_reach(which, claims)
        nothing = which.owner is None and which.ids == () and which.tasks == ()
        runs = [] if nothing else await self._engine.store.runs(which)
        following = page_cursor(runs[limit - 1].no) if len(runs) > limit else None
        page: snapshot.Page = {"runs": [snapshot.summary(run) for run in runs[:limit]], "next": following}
        return answer(page)

    def _filter(self, request: Request) -> RunFilter:
        query = Parameters(request, names(queries.LIST))
        status, task = queries.STATUS.of(query), queries.TASK.of(query)
        return RunFilter(
            status=None if status is None else RunStatus(status),
            task=None if task is None else self._canonical(task),
            tag=queries.TAG.of(query),
            parent=queries.PARENT.of(query),
            since=queries.SINCE.of(query),
            until=queries.UNTIL.of(query),
            before=queries.CURSOR.of(query),
            limit=queries.LIMIT.of(query),
        )

    def _canonical(self, name: str) -> str:
        """Return a task's name for its dotted path; runs of a task that has gone keep their old name."""
        try:
            return self._engine.catalogue.find(name).name
        except UnknownTask:
            return name

    @Description(
        needs="read",
        answers={200: document(snapshot.Snapshot, "The run as it stands.")},
        problems=("unknown-run",),
    )
    async def show_run(self, request: Request) -> Response:
        """Serve the snapshot of one run."""
        claims = (await self._authenticator.admit(request, "read")).claims
        Parameters(request, ())
        run = await self._visible(request, claims)
        return answer(await self._snapshot(run, claims))

    @Description(
        needs="read",
        headers=(queries.PREFER,),
        answers={
            200: document(
                snapshot.Result, "The run has ended.", Preference_Applied="The wait that was granted."
            ),
            202: document(snapshot.Result, "It has not.", Preference_Applied="The wait that was granted."),
        },
        problems=("unknown-run", "result-expired"),
    )
    async def show_result(self, request: Request) -> Response:
        """Serve how a run ended, 202 while it has not; `Prefer: wait=N` waits for it. 410 behind RESULT_TTL."""
        claims = (await self._authenticator.admit(request, "read")).claims
        Parameters(request, ())
        run = await self._visible(request, claims)
        seconds = preferred_wait(", ".join(request.headers.getlist("prefer")))
        headers = {} if seconds is None else {"Preference-Applied": f"wait={seconds:.0f}"}
        if seconds and not run.status.is_terminal and request.method != "HEAD":
            async with watched(request.receive) as client:
                wait = min(seconds, seconds_left(claims))
                run = await wait_for_end(self._engine.store, self._engine.hub, run, client, wait)
            self._authenticator.recheck(claims)
        if run.result_expired:
            raise Refusal(
                "result-expired",
                "the run has ended well; its result was removed when it was older than RESULT_TTL",
                run=run.id,
            )
        value = await result_of(self._engine.store, run)
        status = 200 if run.status.is_terminal else 202
        return answer(snapshot.result(run, value), status, headers)

    @Description(
        needs="read",
        query=queries.PAGE,
        headers=(queries.LAST_EVENT_ID,),
        answers={
            200: Reply(f"The stream. {BUSY}", dict.fromkeys(RENDERINGS, bytes) | {sse.JSON: EventPage}),
            204: Reply("The run has ended, and the client has all of it."),
        },
        problems=("unknown-run", "bad-cursor", "not-acceptable", "too-many-streams"),
    )
    async def follow_run(self, request: Request) -> ASGIApp:
        """Serve the stream of one run, in the rendering that the client accepts."""
        claims = (await self._authenticator.admit(request, "read")).claims
        rendering = negotiate(request.headers.get("accept"), RENDERINGS)
        if rendering is None:
            raise Refusal("not-acceptable", f"a stream comes as {', '.join(RENDERINGS)}")
        query = Parameters(request, names(queries.PAGE if rendering == sse.JSON else queries.STREAM))
        cursor = read_cursor(request)
        types = queries.TYPES.of(query)
        output = queries.INCLUDE.of(query) is not None
        if output and not claims.may("logs"):
            raise Forbidden("the token does not allow 'logs'")
        if output and types is not None:
            types |= {"log"}
        run = await self._visible(request, claims)
        if rendering == sse.JSON:
            page = await self._page(request, run, cursor, query, output, types, seconds_left(claims))
            self._authenticator.recheck(claims)
            return page
        if is_over(run, cursor):
            return Response(None, 204, {"Cache-Control": "no-store"})
        wish = Wish(
            rendering=rendering,
            cursor=cursor,
            session=self._authenticator.sessions.new(claims),
            output=output or (rendering == sse.PLAIN and claims.may("logs") and wants(types, "log")),
            types=types,
            expires_in=seconds_left(claims),
        )
        return RunStream(self._engine.store, self._engine.hub, run, wish)

    async def _page(
        self,
        request: Request,
        run: RunRow,
        cursor: sse.Cursor,
        query: Parameters,
        output: bool,
        types: frozenset[str] | None,
        left: float,
    ) -> Response:
        limit, seconds = queries.EVENTS.of(query), min(queries.WAIT.of(query), left)
        async with watched(request.receive) as client:
            page = await read_page(
                self._engine.store,
                self._engine.hub,
                run,
                cursor,
                client,
                output=output,
                limit=limit,
                wait=0.0 if request.method == "HEAD" else seconds,
                types=types,
            )
        return answer(page)

    @Description(
        needs="cancel",
        body=body_schema(CANCEL_FIELDS),
        body_optional=True,
        answers={202: document(snapshot.Snapshot, "It was asked to stop; one that only waited has ended.")},
        problems=("unknown-run", "run-finished", "invalid-arguments"),
    )
    async def cancel_run(self, request: Request) -> Response:
        """Ask a run to stop: 202 with the snapshot, 409 when it has finished."""
        claims = self._authenticator.require(request, "cancel")
        Parameters(request, ())
        grace = _grace(await read_object(request, self._engine.settings.limits))
        self._authenticator.recheck(claims)
        run = await self._visible(request, claims)
        run = await self._engine.cancel(run, grace)
        return answer(await self._snapshot(run, claims), 202)

    async def _visible(self, request: Request, claims: Claims) -> RunRow:
        return await find_run(self._engine, request, claims)

    async def _snapshot(self, run: RunRow, claims: Claims) -> snapshot.Snapshot:
        store = self._engine.store
        attempts = await store.attempts(run.no)
        oldest = await store.events(run.no, 0, 1, 1) if run.tail else []
        return snapshot.snapshot(
            run,
            attempts,
            await self._tails(attempts) if claims.may("logs") else {},
            first=oldest[0].offset if oldest else 0,
            subscribers=self._engine.hub.subscribers(run.no),
            result=await result_of(store, run),
        )

    async def _tails(self, attempts: Sequence[AttemptRow]) -> Mapping[int, Sequence[OutputRow]]:
        bad = [row for row in attempts if row.ending not in (None, Ending.RETURNED)][-TAIL_ATTEMPTS:]
        read = self._engine.store.last_outputs
        return {row.number: await read(row.run, row.number, TAIL_LINES) for row in bad}

    # --- the rest -------------------------------------------------------------------------------------------

    @Description(needs=SIGHT_OF_ALL, answers={200: document(Runners, "The runners.")})
    async def list_runners(self, request: Request) -> Response:
        """Serve the runner processes, with what the kernel says of them."""
        await self._require_sight_of_all(request)
        views = self._engine.runners()
        found: Runners = {"runners": await trio.to_thread.run_sync(measure, views)}
        return answer(found)

    @Description(needs="", answers={200: document(Tasks, "The tasks, by name.")})
    async def list_tasks(self, request: Request) -> Response:
        """Serve the tasks that the token reaches."""
        claims = (await self._authenticator.admit(request)).claims
        Parameters(request, ())
        tasks = [task for task in self._engine.catalogue.all() if _sees_task(claims, task.name)]
        found: Tasks = {"tasks": [snapshot.task(task) for task in tasks]}
        return answer(found)

    @Description(needs="", answers={200: document(snapshot.Task, "The task.")}, problems=("unknown-task",))
    async def show_task(self, request: Request) -> Response:
        """Serve one task."""
        claims = (await self._authenticator.admit(request)).claims
        Parameters(request, ())
        name = request.path_params["name"]
        task = self._engine.catalogue.find(name)
        if not _sees_task(claims, task.name):
            raise UnknownTask(f"there is no task {name[:200]!r}; GET /api/v1/tasks lists them")
        return answer(snapshot.task(task))

    @Description(needs=SIGHT_OF_ALL, answers={200: document(Stats, "The counts.")})
    async def statistics(self, request: Request) -> Response:
        """Serve counts of runs by state, of subscribers, the engine's own, what the store takes of the disk."""
        await self._require_sight_of_all(request)
        hub = self._engine.hub.statistics()
        counts = await self._engine.store.counts()
        found: Stats = {
            **self._engine.statistics(),
            "runs": counts,
            "subscribers": hub["subscribers"],
            "streams": hub,
            **await self._retention.statistics(),
        }
        return answer(found)

    @Description(
        needs=None,
        answers={
            200: document(Ready, "Every part is there."),
            503: document(Ready, "A part is away.", Retry_After="Seconds until it may be there."),
        },
    )
    async def ready(self, request: Request) -> Response:
        """Serve which parts are there: 503 when one is away. Public, so it reads no more than one row."""
        now = self._engine.statistics()
        parts = {
            "store": not now["store_error"] and await _answers(self._engine.store),
            "courier": now["courier"],
            "runners": bool(now["runners"]),
        }
        found: Ready = {"ready": all(parts.values()), "parts": parts}
        return (
            answer(found) if found["ready"] else answer(found, 503, {"Retry-After": f"{READY_SECONDS:.0f}"})
        )

    async def _require_sight_of_all(self, request: Request) -> None:
        claims = (await self._authenticator.admit(request)).claims
        Parameters(request, ())
        require_sight_of_all(claims)


@Description(needs=None, answers={200: Reply("It turns.", {"text/plain": str})})
async def health(request: Request) -> Response:
    """Say that the loop turns, and look at nothing else."""
    return PlainTextResponse("OK", headers={"Cache-Control": "no-store"})


async def result_of(store: Store, run: RunRow) -> msgspec.Raw | None:
    """Return the result of a run, None when it has none; a large one is read from its file.

    Raises:
      StoreError: the disk does not answer.
    """
    if run.result is not None or run.result_blob is None:
        return snapshot.raw(run.result)
    return msgspec.Raw(await store.blob(run.result_blob))


def read_cursor(request: Request) -> sse.Cursor:
    """Return where the client wants to begin.

    Raises:
      Refusal: the cursor is malformed.
    """
    try:
        return sse.parse_cursor(request.headers.get("last-event-id"), request.query_params)
    except ValueError as error:
        raise Refusal("bad-cursor", str(error)) from error


async def _answers(store: Store) -> bool:
    with trio.move_on_after(READY_SECONDS):
        try:
            await store.run(_NOBODY)
        except StoreError:
            return False
        return True
    return False


def _sees_task(claims: Claims, name: str) -> bool:
    return claims.may_submit(name) or (claims.may("read") and claims.sees_run("", name))


def _grace(body: Mapping[str, Any]) -> float | None:
    errors: dict[str, str] = {}
    grace = read(body, CANCEL_FIELDS, errors).get("grace")
    if errors:
        raise InvalidArguments("the cancellation is invalid", errors=errors)
    return None if grace is None else float(grace)
