"""The seeds' words on a WebSocket: runs as their clients hear of them, wishes as they may be said. Pure.

The keys and words leave the process: they are for ever.
"""

from __future__ import annotations

import fnmatch
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from gateway import snapshot, sse
from gateway.fields import parse_time
from gateway.store.rows import RunRow
from taskkit import background
from taskkit.identifiers import parse_run_id
from taskkit.lifecycle import RunStatus


class Words(NamedTuple):
    """A state of a run in the seeds' words."""

    flowrra: str
    bazis: str


#: Flowrra's words. Neither seed can cancel: for their clients a cancelled run has failed, and its error says why.
_FLOWRRA: Final[Mapping[RunStatus, str]] = {
    RunStatus.READY: "pending",
    RunStatus.RUNNING: "running",
    RunStatus.SUCCESSFUL: "success",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "failed",
}

WORDS: Final[Mapping[RunStatus, Words]] = {
    status: Words(_FLOWRRA[status], background.WORDS[status]) for status in RunStatus
}

#: A run that waits for its next attempt. bazis's states only go forward.
RETRYING: Final = Words("retrying", "processing")

#: Bytes of JSON that `args`, `kwargs` or `result` may have in an update; for more there is OMITTED. It bounds what one
#: message can take in memory, once per client that takes it slowly. As for the result in `stream.end`.
MAX_VALUE: Final = 64 * 1024
OMITTED: Final = msgspec.Raw(b'{"_omitted":"it has more than 65536 bytes"}')

#: Updates that are kept rendered, of at most 16 KiB each: 4 MiB for everybody who watches.
KEPT: Final = 256
KEPT_SIZE: Final = 16 * 1024


def words_of(run: RunRow) -> Words:
    """Return a run's state in the seeds' words."""
    return RETRYING if run.status is RunStatus.READY and run.attempt else WORDS[run.status]


def task_update(run: RunRow) -> str:
    """Return Flowrra's message of a run; unlike Flowrra's, every one has all that is known."""
    task = {
        "task_id": run.id,
        "task_name": run.task,
        "status": words_of(run).flowrra,
        "result": OMITTED if run.result_blob is not None else _value(run.result),
        "error": _error(run.error),
        "submitted_at": snapshot.rfc3339(run.created_at),
        "started_at": snapshot.rfc3339(run.started_at),
        "finished_at": snapshot.rfc3339(run.finished_at),
        "retries": max(0, run.attempt - 1),
        "args": _value(run.args),
        "kwargs": _value(run.kwargs),
    }
    return _text({"type": "task.update", "task": task})


def channel_frame(run: RunRow) -> str:
    """Return bazis's frame of a run: its `data` is JSON within JSON."""
    inner = {"task_id": run.id, "status": words_of(run).bazis, "action": "async_bg"}
    return _text({"type": "data", "data": _text(inner)})


def event_message(run: str, id: str, type: str, data: bytes) -> str:
    """Return one event of a run that the client follows; `id` is the cursor behind it."""
    return _text({"type": "event", "run": run, "id": id, "event": type, "data": msgspec.Raw(data or b"null")})


def error_message(code: str, detail: str) -> str:
    """Return what is wrong with what the client said, or with its token."""
    return _text({"type": "error", "code": code, "detail": detail})


#: Answer to `ping`.
PONG: Final = '{"type":"pong"}'

#: The snapshot is complete; changes follow. Newer bazis sends it once it listens to the channel.
SUBSCRIBED: Final = '{"type":"subscribed"}'

#: The client was so far behind that changes were dropped: open runs follow; a run that is not among them has ended.
LAGGED: Final = '{"type":"stream.reset","reason":"lagged"}'


def _text(document: Mapping[str, Any]) -> str:
    return msgspec.json.encode(document).decode("utf-8", "replace")


def _value(data: bytes | None) -> msgspec.Raw | None:
    if data is None:
        return None
    return msgspec.Raw(data) if len(data) <= MAX_VALUE else OMITTED


class _Error(Struct):
    message: str = ""


_read_error: Final = msgspec.json.Decoder(_Error).decode


def _error(data: bytes | None) -> str | None:
    """Return an error as Flowrra has it: a text."""
    if data is None:
        return None
    try:
        return _read_error(data).message
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "failed"


class Updates:
    """Flowrra's messages, rendered once for everybody who watches: a version of a run never changes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int], str] = OrderedDict()

    def of(self, run: RunRow) -> str:
        """Return the message of this picture of a run."""
        key = run.no, run.version
        text = self._kept.get(key)
        if text is None:
            text = task_update(run)
            if len(text) <= KEPT_SIZE:
                self._kept[key] = text
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return text


# --- what a client says -----------------------------------------------------------------------------------------

_Name = Annotated[str, Meta(min_length=1, max_length=200)]
_Names = Annotated[list[_Name], Meta(min_length=1, max_length=100)]
#: Fewer, as each costs something with every change of any run.
_Patterns = Annotated[list[_Name], Meta(min_length=1, max_length=20)]


class _Subscribe(Struct, forbid_unknown_fields=True):
    type: str
    run: _Name | _Names | None = None
    task: _Name | _Patterns | None = None
    status: _Name | _Names | None = None
    user: _Name | _Names | None = None
    since: str | None = None
    after: str | int | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs a client wants to hear of: all conditions must hold, of each one value is enough; None: any.

    `tasks` matches their names.
    """

    runs: frozenset[str] | None = None
    tasks: re.Pattern[str] | None = None
    statuses: frozenset[str] | None = None
    users: frozenset[str] | None = None

    def matches(self, run: RunRow) -> bool:
        """Whether the client wants to hear of this state of a run."""
        return (
            (self.runs is None or run.id in self.runs)
            and (self.tasks is None or self.tasks.fullmatch(run.task) is not None)
            and (self.statuses is None or words_of(run).flowrra in self.statuses)
            and (self.users is None or run.subject in self.users)
        )


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Tell of these runs as well.

    Attributes:
      since: show ended runs that were made since then, Unix seconds.
      run, cursor: tell the events of this run behind it.
    """

    filter: Filter
    since: float | None = None
    run: str = ""
    cursor: sse.Cursor | None = None


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Tell of no run any more, and of no events."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?"""


@dataclass(frozen=True, slots=True)
class Renew:
    """Go on with this token."""

    token: str


Said = Subscribe | Unsubscribe | Ping | Renew


class Complaint(Exception):
    """A message of the client cannot be acted on; it is told so by `code`, with the remedy. Nothing has changed."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def parse(text: str) -> Said:
    """Return what a client says.

    Raises:
      Complaint: it is none of the messages that there are. The client's fault.
    """
    try:
        said = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Complaint("bad-json", f"a message must be a JSON object: {error}") from error
    if not isinstance(said, dict):
        raise Complaint("bad-json", "a message must be a JSON object")
    kind = said.get("type")
    if isinstance(said.get("token"), str) and kind in (None, "token"):
        return Renew(said["token"])
    if kind == "ping":
        return Ping()
    if kind == "subscribe":
        return _subscribe(said)
    if kind == "unsubscribe":
        return Unsubscribe()
    raise Complaint("bad-message", 'type: must be "subscribe", "unsubscribe" or "ping"; or send {"token": …}')


def _subscribe(said: Mapping[str, Any]) -> Subscribe:
    try:
        asked = msgspec.convert(said, _Subscribe)
    except msgspec.ValidationError as error:
        raise Complaint("bad-message", str(error).replace("`$.", "`")) from error
    since = None if asked.since is None else parse_time(asked.since)
    if asked.since is not None and since is None:
        raise Complaint("bad-message", "since: must be an RFC 3339 time in UTC, as 2026-01-31T12:00:00Z")
    statuses = _names(asked.status)
    known = sorted({word.flowrra for word in (*WORDS.values(), RETRYING)})
    if statuses is not None and not statuses <= set(known):
        raise Complaint("bad-message", f"status: there are {', '.join(known)}")
    tasks = _names(asked.task)
    runs = _names(asked.run)
    if runs is not None:
        runs = frozenset(parse_run_id(id) or id for id in runs)
    chosen = Filter(runs, None if tasks is None else pattern_of(tasks), statuses, _names(asked.user))
    if asked.after is None:
        return Subscribe(chosen, since)
    return Subscribe(chosen, since, *_followed(chosen, str(asked.after)))


def pattern_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return what matches each of these names of tasks, where `*` stands for any characters."""
    return re.compile("|".join(fnmatch.translate(name) for name in sorted(names)))


def _followed(chosen: Filter, text: str) -> tuple[str, sse.Cursor]:
    if chosen.runs is None or len(chosen.runs) != 1:
        raise Complaint("bad-message", "after: needs `run`, one id; subscribe again for another run")
    (run,) = chosen.runs
    try:
        return run, sse.parse_cursor(None, {"after": text})
    except ValueError as error:
        raise Complaint("bad-cursor", str(error)) from error


def _names(value: str | Sequence[str] | None) -> frozenset[str] | None:
    if value is None:
        return None
    return frozenset([value] if isinstance(value, str) else value)
