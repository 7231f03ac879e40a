"""GET /metrics: what this gateway counts.

Everything is gathered when somebody asks, nothing runs in between. A store that does not answer takes its own figures
out of the answer, and no others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Authenticator, require_sight_of_all
from gateway.describing import SIGHT_OF_ALL, Description, Reply
from gateway.documents import Picture, Runner
from gateway.face import Engine
from gateway.families import CONTENT_TYPES, Figures, Values
from gateway.reading import Parameters, Refusal, negotiate
from gateway.resource import Resource
from gateway.retention import Retention
from gateway.roster import measure
from gateway.store.protocol import StoreError
from gateway.tally import DoorTally, Histogram

#: Seconds for the store's figures. Prometheus gives a target 10 s.
STORE_SECONDS: Final = 2.0

#: What retention's figures of the store are called here.
_PARTS: Final = {
    "file": "file_bytes",
    "wal": "wal_bytes",
    "free": "free_bytes",
    "events": "event_bytes",
    "blobs": "blob_bytes",
}


@dataclass(frozen=True, slots=True)
class Gathered:
    """All figures of one moment; `runs` and `parts` are None when the store did not answer."""

    engine: Engine
    door: DoorTally
    authenticator: Authenticator
    now: Picture
    runners: list[Runner]
    runs: Mapping[str, int] | None
    parts: Mapping[str, int] | None

    def figures(self) -> Figures:
        """Return the values of every metric by its name, as they are now: whoever counts goes on counting."""
        found = {**self._runs(), **self._processes(), **self._streams(), **self._door(), **self._store()}
        return {name: _copied(values) for name, values in found.items()}

    def _runs(self) -> dict[str, Values | None]:
        tally = self.engine.run_tally
        return {
            "bulkhead_runs": self.runs,
            "bulkhead_queued_runs": {name: pool["queued"] for name, pool in self.now["pools"].items()},
            "bulkhead_open_attempts": self.now["running"],
            "bulkhead_held_tasks": len(self.now["held"]),
            "bulkhead_quarantined_runs": len(self.now["quarantined"]),
            "bulkhead_untold_runs": self.now["untold"],
            "bulkhead_runs_accepted_total": tally.accepted,
            "bulkhead_runs_ended_total": tally.ended,
            "bulkhead_attempts_ended_total": tally.attempts,
        }

    def _processes(self) -> dict[str, Values]:
        versions = self.engine.versions
        states = Counter((runner["pool"], runner["state"]) for runner in self.runners)
        memory, cpu = (dict.fromkeys(self.now["pools"], 0.0) for _ in range(2))
        for runner in self.runners:
            memory[runner["pool"]] = memory.get(runner["pool"], 0.0) + (runner["rss"] or 0)
            cpu[runner["pool"]] = cpu.get(runner["pool"], 0.0) + (runner["cpu"] or 0.0)
        return {
            "bulkhead_build_info": {
                tuple(versions.get(name, "") for name in ("bulkhead", "python", "django")): 1
            },
            "bulkhead_uptime_seconds": self.now["uptime"],
            "bulkhead_runners": states,
            "bulkhead_runner_resident_bytes": memory,
            "bulkhead_runner_cpu_seconds": cpu,
            "bulkhead_runner_exits_total": self.engine.run_tally.exits,
            "bulkhead_courier_up": self.now["courier"],
            "bulkhead_courier_restarts_total": self.now["restarts"]["courier"],
        }

    def _streams(self) -> dict[str, Values]:
        hub, tally = self.engine.hub.statistics(), self.engine.hub.tally
        fast = self.engine.hub.broadcast.events  # what did not pass by a stream's own task
        return {
            "bulkhead_subscribers": hub["subscribers"],
            "bulkhead_sessions": len(self.authenticator.sessions),
            "bulkhead_ring_bytes": hub["ring_bytes"],
            "bulkhead_deliveries_total": tally.delivered + fast,
            "bulkhead_stream_resets_total": tally.resets,
            "bulkhead_stream_lags_total": tally.lags,
        }

    def _door(self) -> dict[str, Values]:
        return {
            "bulkhead_connections": self.door.open,
            "bulkhead_connections_accepted_total": self.door.accepted,
            "bulkhead_connections_refused_total": self.door.refused,
            "bulkhead_bad_tokens_total": self.authenticator.bad_tokens,
        }

    def _store(self) -> dict[str, Values | Histogram | None]:
        tally = self.engine.store_tally
        return {
            "bulkhead_rounds_total": self.now["rounds"],
            "bulkhead_events_stored_total": tally.events,
            "bulkhead_lines_stored_total": tally.lines,
            "bulkhead_commit_seconds": tally.commits,
            "bulkhead_commit_failures_total": tally.failures,
            "bulkhead_store_writable": not self.now["store_error"],
            "bulkhead_store_bytes": self.parts,
        }


def _copied(values: Values | Histogram | None) -> Values | Histogram | None:
    if isinstance(values, Histogram):
        return values.copy()
    return dict(values) if isinstance(values, Mapping) else values


def _render(figures: Figures, media: str) -> bytes:
    from gateway import exposition  # at the first scrape, see there

    return exposition.render(figures, media)


class Metrics:
    """Serves GET /metrics over one engine."""

    def __init__(
        self, engine: Engine, authenticator: Authenticator, retention: Retention, door: DoorTally
    ) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._retention = retention
        self._door = door

    def route(self) -> Route:
        """Return its route, for Starlette."""
        return Route("/metrics", Resource(get=self.show))

    @Description(
        needs=SIGHT_OF_ALL,
        answers={200: Reply("The metrics.", dict.fromkeys(CONTENT_TYPES, str))},
        problems=("not-acceptable",),
    )
    async def show(self, request: Request) -> Response:
        """Serve metrics for Prometheus, or as OpenMetrics."""
        require_sight_of_all((await self._authenticator.admit(request)).claims)
        Parameters(request, ())
        media = negotiate(request.headers.get("accept"), tuple(CONTENT_TYPES))
        if media is None:
            raise Refusal("not-acceptable", f"metrics come as {' or '.join(CONTENT_TYPES)}")
        runs, parts = await self._ask_store()
        runners = await trio.to_thread.run_sync(measure, self._engine.runners())
        now = self._engine.statistics()
        gathered = Gathered(self._engine, self._door, self._authenticator, now, runners, runs, parts)
        figures = gathered.figures()
        body = await trio.to_thread.run_sync(_render, figures, media)
        return Response(body, headers={"Cache-Control": "no-store", "Content-Type": CONTENT_TYPES[media]})

    async def _ask_store(self) -> tuple[Mapping[str, int] | None, Mapping[str, int] | None]:
        with trio.move_on_after(STORE_SECONDS):
            try:
                counts = await self._engine.store.counts()
                kept = (await self._retention.statistics())["store"]
            except StoreError:
                return None, None
            return counts, {part: kept[key] for part, key in _PARTS.items() if kept[key] is not None}
        return None, None
