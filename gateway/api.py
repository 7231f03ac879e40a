"""The routes under /api/v1, plus the two probes /health, /ready."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import psutil
import trio
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway import snapshot, sse
from gateway.auth import Authenticator
from gateway.batch import Batching
from gateway.face import Engine, RunnerView
from gateway.fields import Field, parse_time, read, seconds
from gateway.following import wait_for_end
from gateway.keeping import Keeping
from gateway.leaving import watched
from gateway.operating import Operating
from gateway.reading import (
    Parameters,
    Refusal,
    negotiate,
    page_cursor,
    parse_page_cursor,
    preferred_wait,
    read_object,
)
from gateway.resource import Resource, answer
from gateway.retention import Retention
from gateway.store.protocol import Store, StoreError
from gateway.store.rows import AttemptRow, OutputRow, RunFilter, RunRow
from gateway.stream import RENDERINGS, RunStream, Wish, is_over, read_page
from gateway.submitting import Submitting
from taskkit.errors import Forbidden, InvalidArguments, UnknownTask
from taskkit.identifiers import parse_run_id
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
            Route(f"{base}/runners", Resource(get=self.list_runners)),
            Route(f"{base}/runners/{{id}}/kill", Resource(post=self._operating.kill_runner)),
            Route(f"{base}/runners/{{id}}/drain", Resource(post=self._operating.drain_runner)),
            Route(f"{base}/tasks", Resource(get=self.list_tasks)),
            Route(f"{base}/tasks/{{name}}", Resource(get=self.show_task)),
            Route(f"{base}/tasks/{{name}}/reset", Resource(post=self._operating.reset_task)),
            Route(f"{base}/stats", Resource(get=self.statistics)),
            Route(f"{base}/vacuum", Resource(post=self._keeping.vacuum)),
            Route("/health", Resource(get=health)),
            Route("/ready", Resource(get=self.ready)),
        ]

    # --- runs -----------------------------------------------------------------------------------------------

    async def list_runs(self, request: Request) -> Response:
        """Serve the page of runs that the token may see, newest first."""
        claims = self._authenticator.require(request, "read")
        which = self._filter(request)
        limit, which.limit = which.limit, which.limit + 1
        if claims.runs != "*":
            which.ids, which.tasks = tuple(sorted(claims.runs)), claims.tasks
        nothing = which.ids == () and which.tasks == ()
        runs = [] if nothing else await self._engine.store.runs(which)
        following = page_cursor(runs[limit - 1].no) if len(runs) > limit else None
        return answer({"runs": [snapshot.summary(run) for run in runs[:limit]], "next": following})

    def _filter(self, request: Request) -> RunFilter:
        query = Parameters(request, ("status", "task", "tag", "since", "until", "cursor", "limit"))
        status = query.choice("status", [status.value for status in RunStatus])
        task = query.text("task")
        return RunFilter(
            status=None if status is None else RunStatus(status),
            task=None if task is None else self._canonical(task),
            tag=query.text("tag"),
            since=_moment(query, "since"),
            until=_moment(query, "until"),
            before=_page(query),
            limit=query.number("limit", 1, 200, 50),
        )

    def _canonical(self, name: str) -> str:
        """Return a task's name for its dotted path; runs of a task that has gone keep their old name."""
        try:
            return self._engine.catalogue.find(name).name
        except UnknownTask:
            return name

    async def show_run(self, request: Request) -> Response:
        """Serve the snapshot of one run."""
        claims = self._authenticator.require(request, "read")
        Parameters(request, ())
        run = await self._visible(request, claims)
        return answer(await self._snapshot(run, claims))

    async def show_result(self, request: Request) -> Response:
        """Serve how a run ended, 202 while it has not; `Prefer: wait=N` waits for it. 410 behind RESULT_TTL."""
        claims = self._authenticator.require(request, "read")
        Parameters(request, ())
        run = await self._visible(request, claims)
        wait = preferred_wait(request.headers.get("prefer", ""))
        headers = {} if wait is None else {"Preference-Applied": f"wait={wait:.0f}"}
        if wait and not run.status.is_terminal and request.method != "HEAD":
            async with watched(request.receive) as client:
                run = await wait_for_end(self._engine.store, self._engine.hub, run, client, wait)
        if run.result_expired:
            raise Refusal(
                "result-expired",
                "the run has ended well; its result was removed when it was older than RESULT_TTL",
                run=run.id,
            )
        value = await result_of(self._engine.store, run)
        status = 200 if run.status.is_terminal else 202
        return answer(snapshot.result(run, value), status, headers)

    async def follow_run(self, request: Request) -> ASGIApp:
        """Serve the stream of one run, in the rendering that the client accepts."""
        claims = self._authenticator.require(request, "read")
        rendering = negotiate(request.headers.get("accept"), RENDERINGS)
        if rendering is None:
            raise Refusal("not-acceptable", f"a stream comes as {', '.join(RENDERINGS)}")
        paging = ("wait", "limit") if rendering == sse.JSON else ()
        query = Parameters(request, (*sse.CURSOR_PARAMETERS, "include", *paging))
        cursor = read_cursor(request)
        output = query.choice("include", ["log"]) is not None
        if output and not claims.may("logs"):
            raise Forbidden("the token does not allow 'logs'")
        run = await self._visible(request, claims)
        if rendering == sse.JSON:
            return await self._page(request, run, cursor, query, output)
        if is_over(run, cursor):
            return Response(None, 204, {"Cache-Control": "no-store"})
        wish = Wish(
            rendering=rendering,
            cursor=cursor,
            output=output or (rendering == sse.PLAIN and claims.may("logs")),
            expires_in=claims.expires_at - time.time(),
        )
        return RunStream(self._engine.store, self._engine.hub, run, wish)

    async def _page(
        self, request: Request, run: RunRow, cursor: sse.Cursor, query: Parameters, output: bool
    ) -> Response:
        limit, wait = query.number("limit", 1, 1000, 100), query.seconds("wait")
        async with watched(request.receive) as client:
            page = await read_page(
                self._engine.store,
                self._engine.hub,
                run,
                cursor,
                client,
                output=output,
                limit=limit,
                wait=0.0 if request.method == "HEAD" else wait,
            )
        return answer(page)

    async def cancel_run(self, request: Request) -> Response:
        """Ask a run to stop: 202 with the snapshot, 409 when it has finished."""
        claims = self._authenticator.require(request, "cancel")
        Parameters(request, ())
        grace = _grace(await read_object(request, self._engine.settings.limits.body_bytes))
        run = await self._visible(request, claims)
        run = await self._engine.cancel(run, grace)
        return answer(await self._snapshot(run, claims), 202)

    async def _visible(self, request: Request, claims: Claims) -> RunRow:
        """Return the run in the path; one beyond the token's reach is as unknown as one that is not there."""
        id = parse_run_id(request.path_params["id"])
        run = None if id is None else await self._engine.store.run(id)
        if run is None or not claims.sees_run(run.id, run.task):
            raise Refusal("unknown-run", "there is no such run, or the token does not reach it")
        return run

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

    async def list_runners(self, request: Request) -> Response:
        """Serve the runner processes, with what the kernel says of them."""
        self._require_sight_of_all(request)
        views = self._engine.runners()
        return answer({"runners": await trio.to_thread.run_sync(measure, views)})

    async def list_tasks(self, request: Request) -> Response:
        """Serve the tasks that the token reaches."""
        claims = self._authenticator.claims(request)
        Parameters(request, ())
        tasks = [task for task in self._engine.catalogue.all() if _sees_task(claims, task.name)]
        return answer({"tasks": [snapshot.task(task) for task in tasks]})

    async def show_task(self, request: Request) -> Response:
        """Serve one task."""
        claims = self._authenticator.claims(request)
        Parameters(request, ())
        name = request.path_params["name"]
        task = self._engine.catalogue.find(name)
        if not _sees_task(claims, task.name):
            raise UnknownTask(f"there is no task {name[:200]!r}; GET /api/v1/tasks lists them")
        return answer(snapshot.task(task))

    async def statistics(self, request: Request) -> Response:
        """Serve counts of runs by state, of subscribers, the engine's own, what the store takes of the disk."""
        self._require_sight_of_all(request)
        hub = self._engine.hub.statistics()
        counts = await self._engine.store.counts()
        return answer(
            {
                **self._engine.statistics(),
                "runs": counts,
                "subscribers": hub["subscribers"],
                "streams": hub,
                **await self._retention.statistics(),
            }
        )

    async def ready(self, request: Request) -> Response:
        """Serve which parts are there: 503 when one is away. Public, so it reads no more than one row."""
        now = self._engine.statistics()
        parts = {
            "store": not now.get("store_error") and await _answers(self._engine.store),
            "courier": bool(now.get("courier")),
            "runners": bool(now.get("runners")),
        }
        ready = all(parts.values())
        return answer({"ready": ready, "parts": parts}, 200 if ready else 503)

    def _require_sight_of_all(self, request: Request) -> None:
        """Refuse a token of single runs: processes and counts tell about everybody's."""
        claims = self._authenticator.claims(request)
        Parameters(request, ())
        if not (claims.may("operate") or (claims.may("read") and claims.runs == "*")):
            raise Forbidden("the token needs 'operate', or 'read' of every run")


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


def measure(views: Sequence[RunnerView]) -> list[dict[str, Any]]:
    """Return the runners with RSS in bytes, CPU and age in seconds. Reads /proc: call it in a thread."""
    return [_runner(view) for view in views]


def _runner(view: RunnerView) -> dict[str, Any]:
    rss, cpu = (None, None) if view.state == "EXITED" else _usage(view.pid)
    return {
        "id": view.id,
        "pid": view.pid,
        "pool": view.pool,
        "role": view.role,
        "state": view.state,
        "runs": view.runs,
        "rss": rss,
        "cpu": cpu,
        "started_at": snapshot.rfc3339(view.started_at),
        "age": round(max(0.0, time.time() - view.started_at), 3),
        "runs_done": view.runs_done,
        "last_ending": view.last_ending,
    }


def _usage(pid: int) -> tuple[int | None, float | None]:
    """Return RSS and CPU of a process; nothing of one that has just gone, or is no longer ours to see."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return process.memory_info().rss, round(times.user + times.system, 3)
    except (psutil.Error, ValueError):
        return None, None


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


def _moment(query: Parameters, name: str) -> float | None:
    text = query.text(name)
    moment = None if text is None else parse_time(text)
    if text is not None and moment is None:
        raise query.refusal(name, "must be an RFC 3339 time in UTC, for example 2026-01-31T12:00:00Z")
    return moment


def _page(query: Parameters) -> int | None:
    text = query.text("cursor")
    number = None if text is None else parse_page_cursor(text)
    if text is not None and number is None:
        raise query.refusal("cursor", "must be the `next` of the page before")
    return number
