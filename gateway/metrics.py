"""GET /metrics: what this gateway counts, in Prometheus' words.

Everything is gathered when somebody asks: the registry lives for one answer, nothing runs in between. A store that
does not answer takes its own figures out of the answer, and no others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Authenticator, require_sight_of_all
from gateway.describing import SIGHT_OF_ALL, Description, Reply
from gateway.documents import Picture, Runner
from gateway.face import Engine
from gateway.families import FAMILIES, Family
from gateway.reading import Parameters, Refusal, negotiate
from gateway.resource import Resource
from gateway.retention import Retention
from gateway.roster import measure
from gateway.store.protocol import StoreError
from gateway.tally import DoorTally, Histogram

#: Seconds for the store's figures. Prometheus gives a target 10 s.
STORE_SECONDS: Final = 2.0

_PLAIN: Final = "text/plain"
_OPENMETRICS: Final = "application/openmetrics-text"

#: How each media type is written, and what it is called with its parameters.
_WRITERS: Final[Mapping[str, tuple[Callable[[Collector], bytes], str]]] = {
    _PLAIN: (generate_latest, "text/plain; version=0.0.4; charset=utf-8"),
    _OPENMETRICS: (
        openmetrics.generate_latest,
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
    ),
}

#: What retention's figures of the store are called here.
_PARTS: Final = {
    "file": "file_bytes",
    "wal": "wal_bytes",
    "free": "free_bytes",
    "events": "event_bytes",
    "blobs": "blob_bytes",
}

#: A value, or values by label, or by a tuple of labels.
Values = float | Mapping[Any, float]


@dataclass(frozen=True, slots=True)
class Gathered:
    """All figures of one moment; `runs` and `parts` are None when the store did not answer."""

    engine: Engine
    door: DoorTally
    now: Picture
    runners: list[Runner]
    runs: Mapping[str, int] | None
    parts: Mapping[str, int] | None

    def figures(self) -> dict[str, Values | Histogram | None]:
        """Return the values of every metric by its name; None leaves it out."""
        return {**self._runs(), **self._processes(), **self._streams(), **self._door(), **self._store()}

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
        return {
            "bulkhead_subscribers": hub["subscribers"],
            "bulkhead_ring_bytes": hub["ring_bytes"],
            "bulkhead_deliveries_total": tally.delivered,
            "bulkhead_stream_resets_total": tally.resets,
            "bulkhead_stream_lags_total": tally.lags,
        }

    def _door(self) -> dict[str, Values]:
        return {
            "bulkhead_connections": self.door.open,
            "bulkhead_connections_accepted_total": self.door.accepted,
            "bulkhead_connections_refused_total": self.door.refused,
            "bulkhead_bad_tokens_total": self.door.bad_tokens,
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


class _Now(Collector):
    """The metrics of one moment."""

    def __init__(self, gathered: Gathered) -> None:
        self._figures = gathered.figures()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric that there is a value of."""
        for family in FAMILIES:
            values = self._figures[family.name]
            if isinstance(values, Histogram):
                buckets = values.buckets()
                yield HistogramMetricFamily(family.name, family.doc, buckets=buckets, sum_value=values.sum)
            elif values is not None:
                yield _family(family, values)


def _family(family: Family, values: Values) -> Metric:
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    found = make(family.name, family.doc, labels=family.labels)
    by_label: Mapping[Any, float] = values if isinstance(values, Mapping) else {(): values}
    for key, value in {**dict.fromkeys(family.known, 0), **by_label}.items():
        found.add_metric(key if isinstance(key, tuple) else (key,), value)
    return found


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
        answers={200: Reply("The metrics.", dict.fromkeys(_WRITERS, str))},
        problems=("not-acceptable",),
    )
    async def show(self, request: Request) -> Response:
        """Serve metrics for Prometheus, or as OpenMetrics."""
        require_sight_of_all(self._authenticator.claims(request))
        Parameters(request, ())
        media = negotiate(request.headers.get("accept"), tuple(_WRITERS))
        if media is None:
            raise Refusal("not-acceptable", f"metrics come as {' or '.join(_WRITERS)}")
        write, content_type = _WRITERS[media]
        runs, parts = await self._ask_store()
        now, views = self._engine.statistics(), self._engine.runners()

        def render() -> bytes:
            gathered = Gathered(self._engine, self._door, now, measure(views), runs, parts)
            registry = CollectorRegistry(auto_describe=False)
            registry.register(_Now(gathered))
            return write(registry)

        body = await trio.to_thread.run_sync(render)
        return Response(body, headers={"Cache-Control": "no-store", "Content-Type": content_type})

    async def _ask_store(self) -> tuple[Mapping[str, int] | None, Mapping[str, int] | None]:
        with trio.move_on_after(STORE_SECONDS):
            try:
                counts = await self._engine.store.counts()
                kept = (await self._retention.statistics())["store"]
            except StoreError:
                return None, None
            return counts, {part: kept[key] for part, key in _PARTS.items() if kept[key] is not None}
        return None, None
