"""Every metric by its name: the names are for ever.

Pure. Counters begin with the gateway, and are shown from its beginning on: a curve that begins with its first event
cannot be told from one that was not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from gateway.tally import Histogram
from taskkit.lifecycle import TERMINAL, Ending, RunStatus

Kind = Literal["counter", "gauge", "histogram"]

#: A value, or values by label, or by a tuple of labels.
Values = float | Mapping[Any, float]

#: Values of every metric by its name; None leaves it out.
Figures = Mapping[str, Values | Histogram | None]

#: What metrics can be written as, the default first; each with its parameters.
PLAIN: Final = "text/plain"
OPENMETRICS: Final = "application/openmetrics-text"
CONTENT_TYPES: Final[Mapping[str, str]] = {
    PLAIN: f"{PLAIN}; version=0.0.4; charset=utf-8",
    OPENMETRICS: f"{OPENMETRICS}; version=1.0.0; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
      name: as it is queried. A counter ends in `_total`; another one's unit is its last word, if it has one.
      labels: names of its labels.
      known: values of its only label that are always shown.
    """

    name: str
    kind: Kind
    doc: str
    labels: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


_STATUSES: Final = tuple(status.value for status in RunStatus)
_ENDED: Final = tuple(status.value for status in RunStatus if status in TERMINAL)
_ENDINGS: Final = tuple(ending.value for ending in Ending)
_RESETS: Final = ("trimmed", "epoch", "ahead")
_PARTS: Final = ("file", "wal", "free", "events", "blobs")
_TOKENS: Final = (
    *("missing", "malformed", "signature", "expired", "audience", "claims", "use", "spent", "revoked"),
)

FAMILIES: Final = (
    Family("bulkhead_build_info", "gauge", "Versions; always 1.", ("version", "python", "django")),
    Family("bulkhead_uptime_seconds", "gauge", "Since this gateway began; counters begin with it."),
    # runs
    Family("bulkhead_runs", "gauge", "Runs in the store.", ("status",), _STATUSES),
    Family("bulkhead_queued_runs", "gauge", "Runs that wait for a runner or for their time.", ("pool",)),
    Family("bulkhead_open_attempts", "gauge", "Attempts given to a runner that have not ended."),
    Family("bulkhead_held_tasks", "gauge", "Tasks held back because they kept crashing."),
    Family("bulkhead_quarantined_runs", "gauge", "Runs in quarantine."),
    Family("bulkhead_untold_runs", "gauge", "Runs whose newest state Django has not been told."),
    Family("bulkhead_runs_accepted_total", "counter", "Runs accepted.", ("origin",), ("http", "outbox")),
    Family("bulkhead_runs_ended_total", "counter", "Runs ended.", ("status",), _ENDED),
    Family("bulkhead_attempts_ended_total", "counter", "Attempts ended.", ("ending",), _ENDINGS),
    # processes
    Family("bulkhead_runners", "gauge", "Runner processes.", ("pool", "state")),
    Family("bulkhead_runner_resident_bytes", "gauge", "Memory of the living runners, added up.", ("pool",)),
    Family("bulkhead_runner_cpu_seconds", "gauge", "CPU of the living runners, added up.", ("pool",)),
    Family(
        "bulkhead_runner_exits_total",
        "counter",
        "Runners that have gone, by cause; `left` had nothing more to do.",
        ("cause",),
        ("left",),
    ),
    Family("bulkhead_courier_up", "gauge", "Whether a courier is linked."),
    Family("bulkhead_courier_restarts_total", "counter", "Couriers that took another's place."),
    # streams
    Family("bulkhead_subscribers", "gauge", "Streams that are open."),
    Family("bulkhead_sessions", "gauge", "Streams and WebSockets that are open."),
    Family("bulkhead_ring_bytes", "gauge", "Memory for events that are still to be sent."),
    Family("bulkhead_deliveries_total", "counter", "Events and lines sent to subscribers."),
    Family(
        "bulkhead_stream_resets_total", "counter", "Streams told that events are gone.", ("reason",), _RESETS
    ),
    Family("bulkhead_stream_lags_total", "counter", "Streams told that progress was left out."),
    # the door
    Family("bulkhead_connections", "gauge", "Connections that are open."),
    Family("bulkhead_connections_accepted_total", "counter", "Connections accepted."),
    Family("bulkhead_connections_refused_total", "counter", "Connections refused for want of room."),
    Family("bulkhead_bad_tokens_total", "counter", "Requests without a valid token.", ("reason",), _TOKENS),
    # the store
    Family("bulkhead_rounds_total", "counter", "Rounds of looking, deciding, committing."),
    Family("bulkhead_events_stored_total", "counter", "Events committed."),
    Family("bulkhead_lines_stored_total", "counter", "Lines of output committed."),
    Family("bulkhead_commit_seconds", "histogram", "Time of a commit."),
    Family("bulkhead_commit_failures_total", "counter", "Commits that the disk did not take."),
    Family("bulkhead_store_writable", "gauge", "Whether the last commit succeeded."),
    Family(
        "bulkhead_store_bytes",
        "gauge",
        "What the store takes of the disk; `free` and `events` lie in `file`.",
        ("part",),
        _PARTS,
    ),
)
