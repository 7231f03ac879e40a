"""Types of the JSON documents that tell of anything but a run: their keys leave the process, they are for ever."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import msgspec

from gateway.snapshot import BatchOutcome, Task, Time


class BatchAnswer(TypedDict):
    """What became of a batch; an outcome that is no run is a problem document with the item's `index`."""

    accepted: int
    replayed: int
    refused: int
    runs: list[BatchOutcome | msgspec.Raw]


class StreamEvent(TypedDict):
    """An event of a stream; `id` is the cursor behind it."""

    id: str
    type: str
    data: msgspec.Raw


class EventPage(TypedDict):
    """A page of a stream; `next` is the cursor of the page that follows, `ended` says that none will."""

    events: list[StreamEvent]
    next: str
    ended: bool


class Runner(TypedDict):
    """A runner process; `rss` in bytes, `cpu` and `age` in seconds, `runs` are ids of the runs open on it."""

    id: str
    pid: int
    pool: str
    role: str
    state: str
    runs: tuple[str, ...]
    rss: int | None
    cpu: float | None
    started_at: Time | None
    age: float
    runs_done: int
    last_ending: str | None


class Runners(TypedDict):
    """All runner processes."""

    runners: list[Runner]


class Tasks(TypedDict):
    """The tasks of the catalogue that the token reaches."""

    tasks: list[Task]


class Pool(TypedDict):
    """A pool now: how many runs at once, how many wait, its processes, those of them with a run."""

    size: int
    queued: int
    runners: int
    busy: int


class Held(TypedDict):
    """A task that is held back; `remaining` in seconds, `trial` is the run that is tried."""

    task: str
    remaining: float
    crashes: int
    cause: str
    trial: str | None


class Quarantined(TypedDict):
    """A run that has killed too many runners."""

    run: str
    task: str
    at: Time


class CasualtyList(TypedDict):
    """What is held back, what is in quarantine (the newest first)."""

    held: list[Held]
    quarantined: list[Quarantined]


class Picture(CasualtyList):
    """The engine now; `uptime` in seconds, `courier` whether one is linked, `restarts` by kind of process.

    `tickets` that were used, and `revocations`, are those that have to be remembered still. `deserted` runs will be
    cancelled because their last subscriber has gone.
    """

    queued: int
    queues: dict[str, int]
    pools: dict[str, Pool]
    running: int
    runners: int
    untold: int
    rounds: int
    uptime: float
    store_error: str
    courier: bool
    draining: bool
    restarts: dict[str, int]
    tickets: int
    revocations: int
    deserted: int


class Kept(TypedDict):
    """What the store takes of the disk, and what retention has removed."""

    store: dict[str, Any]
    retention: dict[str, Any]


class Stats(Picture, Kept):
    """Counts of everything."""

    runs: dict[str, int]
    subscribers: int
    streams: dict[str, int]


class Ready(TypedDict):
    """Whether each part is there."""

    ready: bool
    parts: dict[str, bool]


class Ordered(TypedDict):
    """What was ordered of a runner."""

    id: str
    ordered: str


class Told(TypedDict):
    """What a run was told: the input's name, and its number among all that the run was told."""

    id: str
    name: str
    number: int


class Reset(TypedDict):
    """A task whose runs may go; `was_held` says whether they could not before."""

    task: str
    was_held: bool


class Granted(TypedDict):
    """A ticket: until when it can be used, and how long the cookie lasts that it becomes."""

    ticket: str
    expires_at: Time | None
    session_expires_at: Time | None


class Revoked(TypedDict):
    """What was taken back, as it was named; `at` is the newest `iat` that it hits."""

    jti: NotRequired[str]
    sub: NotRequired[str]
    at: Time | None
    ended_streams: int


class Vacuumed(TypedDict):
    """What giving free pages back came to, bytes and seconds; `free_bytes` are left to do."""

    freed_bytes: int
    free_bytes: int
    file_bytes: int
    incremental: bool
    seconds: float
