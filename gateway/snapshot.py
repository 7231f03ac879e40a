"""What the API shows of runs, attempts, tasks, runners: rows to plain data.

Pure. JSON that a run brought along is embedded as it was rendered (`msgspec.Raw`), never parsed here. The
keys leave the process: they are for ever.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, NotRequired, TypedDict

import msgspec

from gateway import sse
from gateway.store.rows import AttemptRow, OutputRow, RunRow
from taskkit.lifecycle import RunStatus
from taskkit.wire.messages import TaskInfo

API: Final = "/api/v1"

#: RFC 3339 UTC.
Time = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]


class Urls(TypedDict):
    """Where a run can be found, as paths."""

    self: str
    events: str
    result: str
    cancel: str


class Accepted(TypedDict):
    """A submission that is a run now."""

    id: str
    status: RunStatus
    task: str
    urls: Urls
    token: str


class BatchOutcome(Accepted):
    """An item of a batch that is a run now; `replayed`: it was there before."""

    index: int
    replayed: bool


class Children(TypedDict):
    """How many children a run has, and how many of them have ended, well or not."""

    total: int
    ended: int
    failed: int


class Summary(TypedDict):
    """A run as lists show it."""

    id: str
    status: RunStatus
    task: str
    pool: str
    priority: int
    attempt: int
    max_attempts: int
    cancelling: bool
    created_at: Time | None
    run_after: Time | None
    started_at: Time | None
    finished_at: Time | None
    timeout: float | None
    soft_timeout: float | None
    cpu_timeout: float | None
    stall_timeout: float | None
    schedule_timeout: float | None
    progress: msgspec.Raw | None
    error: msgspec.Raw | None
    metadata: msgspec.Raw | None
    tags: tuple[str, ...]
    replay_of: str | None
    concurrency_key: str
    parent: str | None
    after: msgspec.Raw | None
    children: Children
    urls: Urls


class Page(TypedDict):
    """A page of runs, newest first; `next` is the cursor of the page that follows."""

    runs: list[Summary]
    next: str | None


class Attempt(TypedDict):
    """One attempt of a run; `stderr` is there for the newest that ended badly, given the action `logs`."""

    number: int
    runner: str
    pid: int
    assigned_at: Time | None
    started_at: Time | None
    ended_at: Time | None
    ending: str | None
    cause: msgspec.Raw | None
    failure: msgspec.Raw | None
    stderr: NotRequired[list[str]]


class Offsets(TypedDict):
    """The events that the store has, and the cursor behind the newest."""

    first: int
    last: int
    cursor: str


class Snapshot(Summary):
    """A run as it stands."""

    result: msgspec.Raw | None
    result_expired: bool
    attempts: list[Attempt]
    subscribers: int
    offsets: Offsets


class Result(TypedDict):
    """How a run ended: `result` of a successful one, else `error`; neither while it has not."""

    id: str
    status: RunStatus
    result: NotRequired[msgspec.Raw | None]
    error: NotRequired[msgspec.Raw | None]
    finished_at: NotRequired[Time | None]


class Task(TypedDict):
    """A task of the catalogue; `parameters` is a JSON Schema."""

    name: str
    path: str
    kind: str
    doc: str
    parameters: dict[str, Any]
    positional: tuple[str, ...]
    pool: str
    priority: int
    timeout: float | None
    soft_timeout: float | None
    cpu_timeout: float | None
    stall_timeout: float | None
    schedule_timeout: float | None
    max_attempts: int
    concurrency: int | None
    rate_limit: str | None
    memory_limit: int | None
    on_lost: str
    on_disconnect: str
    metadata: dict[str, Any]


def rfc3339(moment: float | None) -> str | None:
    """Return Unix seconds as RFC 3339 UTC with milliseconds; None for what no calendar has."""
    if moment is None:
        return None
    try:
        text = datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):  # beyond the calendar: one row must not break a list
        return None
    return text.replace("+00:00", "Z")


def raw(data: bytes | None) -> msgspec.Raw | None:
    """Return JSON that is embedded as it is; None stays null."""
    return None if data is None else msgspec.Raw(data)


def urls(run: str) -> Urls:
    """Return where a run can be found, as paths: behind a proxy only the client knows the host."""
    base = f"{API}/runs/{run}"
    return {"self": base, "events": f"{base}/events", "result": f"{base}/result", "cancel": f"{base}/cancel"}


def accepted(run: RunRow, token: str) -> Accepted:
    """Return the answer to a submission."""
    return {"id": run.id, "status": run.status, "task": run.task, "urls": urls(run.id), "token": token}


def summary(run: RunRow) -> Summary:
    """Return a run as lists show it."""
    return {
        "id": run.id,
        "status": run.status,
        "task": run.task,
        "pool": run.pool,
        "priority": run.priority,
        "attempt": run.attempt,
        "max_attempts": run.max_attempts,
        "cancelling": run.cancelling,
        "created_at": rfc3339(run.created_at),
        "run_after": rfc3339(run.run_after),
        "started_at": rfc3339(run.started_at),
        "finished_at": rfc3339(run.finished_at),
        "timeout": run.timeout,
        "soft_timeout": run.soft_timeout,
        "cpu_timeout": run.cpu_timeout,
        "stall_timeout": run.stall_timeout,
        "schedule_timeout": run.schedule_timeout,
        "progress": raw(run.progress),
        "error": raw(run.error),
        "metadata": raw(run.metadata),
        "tags": run.tags,
        "replay_of": run.replay_of,
        "concurrency_key": run.concurrency_key,
        "parent": run.parent,
        "after": raw(run.after),
        "children": {"total": run.children, "ended": run.children_ended, "failed": run.children_failed},
        "urls": urls(run.id),
    }


def snapshot(
    run: RunRow,
    attempts: Sequence[AttemptRow],
    tails: Mapping[int, Sequence[OutputRow]],
    *,
    first: int,
    subscribers: int,
    result: msgspec.Raw | None,
) -> Snapshot:
    """Return a run as it stands: the summary, its result, every attempt with its ending.

    Args:
      tails: newest output lines by attempt, for those that may be shown.
      first: offset of the oldest event that the store has; 0 when there is none.
    """
    return {
        **summary(run),
        "result": result,
        "result_expired": run.result_expired,
        "attempts": [attempt(row, tails.get(row.number)) for row in attempts],
        "subscribers": subscribers,
        "offsets": {"first": first, "last": run.tail, "cursor": sse.event_id(run.epoch, run.tail)},
    }


def attempt(row: AttemptRow, lines: Sequence[OutputRow] | None) -> Attempt:
    """Return one attempt with its ending.

    `cause` has signal, exit code, max RSS and CPU seconds of a runner that died; `stderr` is there if
    `lines` are.
    """
    shown: Attempt = {
        "number": row.number,
        "runner": row.runner,
        "pid": row.pid,
        "assigned_at": rfc3339(row.assigned_at),
        "started_at": rfc3339(row.started_at),
        "ended_at": rfc3339(row.ended_at),
        "ending": row.ending,
        "cause": raw(row.cause),
        "failure": raw(row.failure),
    }
    if lines is not None:
        shown["stderr"] = [line.text for line in lines if line.stream != "stdout"]
    return shown


def result(run: RunRow, value: msgspec.Raw | None) -> Result:
    """Return how a run ended: `result` of a successful one, else `error`."""
    shown: Result = {"id": run.id, "status": run.status}
    if run.status.is_terminal:
        shown["finished_at"] = rfc3339(run.finished_at)
        if run.error is None:
            shown["result"] = value
        else:
            shown["error"] = raw(run.error)
    return shown


def log_data(row: OutputRow, run: str) -> bytes:
    """Return the data of a `log` event."""
    shown: dict[str, Any] = {"stream": row.stream, "text": row.text}
    if row.logger or row.level:
        shown |= {"level": row.level, "logger": row.logger}
    shown |= {"_run": run, "_attempt": row.attempt, "_timestamp": rfc3339(row.at)}
    return msgspec.json.encode(shown)


def task(info: TaskInfo) -> Task:
    """Return a task as the catalogue shows it."""
    return {
        "name": info.name,
        "path": info.path,
        "kind": info.kind,
        "doc": info.doc,
        "parameters": info.parameters,
        "positional": info.positional,
        "pool": info.pool,
        "priority": info.priority,
        "timeout": info.timeout,
        "soft_timeout": info.soft_timeout,
        "cpu_timeout": info.cpu_timeout,
        "stall_timeout": info.stall_timeout,
        "schedule_timeout": info.schedule_timeout,
        "max_attempts": info.max_attempts,
        "concurrency": info.concurrency,
        "rate_limit": info.rate_limit,
        "memory_limit": info.memory_limit,
        "on_lost": info.on_lost,
        "on_disconnect": info.on_disconnect,
        "metadata": info.metadata,
    }
