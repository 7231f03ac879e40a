"""What happened, as the judge gets it: submissions, what clients saw, what is stored. Pure data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.chaos import payload


def digest_of(data: bytes) -> bytes:
    """Return what stands for an event's data: 8 bytes, so that a million of them fit the memory."""
    return hashlib.blake2b(data, digest_size=8).digest()


@dataclass(slots=True)
class Submission:
    """One thing that a submitter wanted performed, however often it had to ask.

    Attributes:
      way: "key" and "id" are repeated until they are acknowledged, "once" is not; "django" is an outbox entry
        whose transaction was committed or rolled back.
      expected: the states it may end in when no process of it died.
      run: id of the run, as soon as it is known.
      outcome: "asked" (nobody knows), "acknowledged", "refused", "committed", "rolled back".
      unknown: whether an answer was lost before.
      replayed: whether an answer said that the run had been there before.
    """

    no: int
    task: str
    salt: int
    n: int
    scale: int
    expected: frozenset[str]
    way: str
    run: str | None = None
    outcome: str = "asked"
    unknown: bool = False
    replayed: bool = False
    tries: int = 0
    detail: str = ""

    @property
    def tag(self) -> str:
        """Marks its run, or its runs, if the product makes a mistake."""
        return f"s{self.no}"

    @property
    def must_exist(self) -> bool:
        """Whether somebody was told that it will be performed."""
        return self.outcome in ("acknowledged", "committed")


class Seen(NamedTuple):
    """One event as a client saw it. `opened` is when its connection was opened; both times are monotonic."""

    id: int
    type: str
    digest: bytes
    at: float
    opened: float


@dataclass(slots=True)
class Watch:
    """One client following one run, over as many connections as it took.

    Attributes:
      ended: whether it saw `stream.end`.
      closed: whether the server then closed, or answered 204.
      problems: answers that no client should get.
    """

    run: str
    client: str
    seen: list[Seen] = field(default_factory=list)
    ended: bool = False
    connections: int = 0
    problems: list[str] = field(default_factory=list)


class Content(NamedTuple):
    """What an event says, as far as the judge needs it: read once, however many clients saw it.

    Attributes:
      n: the task's own number, None for events that are not the task's.
      salt, scale: as the event claims; `right`: whether its text is what these three lead to.
      status: of `stream.end`.
      pid: of `run.started`.
    """

    run: str
    attempt: int
    n: int | None = None
    salt: int = 0
    scale: int = 1
    right: bool = True
    status: str = ""
    pid: int = 0


def read_content(type: str, data: bytes) -> Content:
    """Return what an event's data says. Unreadable data is an event of no run, which no rule forgives."""
    try:
        found: dict[str, Any] = json.loads(data)
        run, attempt = str(found["_run"]), int(found["_attempt"])
    except (ValueError, KeyError, TypeError):
        return Content("", 0, right=False)
    if type == "stream.end":
        return Content(run, attempt, status=str(found.get("status")))
    if type == "run.started":
        return Content(run, attempt, pid=int(found.get("pid", 0)))
    if "salt" in found:
        salt, scale = found["salt"], found.get("scale", 1)
        return Content(run, attempt, found.get("n"), salt, scale, payload.is_right(found, salt, scale))
    if type == "progress" and "step" in found:
        return Content(run, attempt, found["step"], scale=int(found.get("total_steps", 0)))
    return Content(run, attempt)


class StoredEvent(NamedTuple):
    """One event as the store has it."""

    offset: int
    type: str
    digest: bytes
    attempt: int


class StoredAttempt(NamedTuple):
    """One attempt as the store has it; `kind` is that of the cause of death, if there was one."""

    number: int
    pid: int
    started: bool
    ending: str | None
    kind: str = ""


@dataclass(slots=True)
class StoredRun:
    """One run as the store has it after everything has stopped."""

    id: str
    status: str
    tail: int
    tags: tuple[str, ...] = ()
    task: str = ""
    endings: int = 0
    error: str = ""
    events: list[StoredEvent] = field(default_factory=list)
    attempts: list[StoredAttempt] = field(default_factory=list)


class Note(NamedTuple):
    """How far a process of a run came, by its own durable notes: `n` events said, `salt` of the submission."""

    run: str
    attempt: int
    pid: int
    n: int
    salt: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that took place, at a monotonic time; `pids` are the processes it hit."""

    number: int
    kind: str
    at: float
    seconds: float
    pids: tuple[int, ...] = ()


@dataclass(slots=True)
class History:
    """Everything the judge judges.

    Attributes:
      contents: what events say, by their digest.
      stored: runs by id.
      shown: states by run id as the API lists them at the end; projected: as Django's database has them.
      supervisor_deaths: how often a whole tree was lost.
      troubles: what the harness itself found wrong (leftovers, exit codes), one line each.
    """

    submissions: list[Submission] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    contents: dict[bytes, Content] = field(default_factory=dict)
    stored: dict[str, StoredRun] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    projected: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    supervisor_deaths: int = 0
    troubles: list[str] = field(default_factory=list)

    def learn(self, type: str, data: bytes) -> bytes:
        """Return the digest of an event's data, after noting what it says."""
        digest = digest_of(data)
        if digest not in self.contents:
            self.contents[digest] = read_content(type, data)
        return digest


def read_notes(text: str) -> list[Note]:
    """Return the furthest note of each process; a torn last line is passed over."""
    furthest: dict[tuple[str, int, int], Note] = {}
    for line in text.splitlines():
        parts = line.split()
        if len(parts) != 6:
            continue
        run, attempt, pid, _, n, salt = parts
        note = Note(run, int(attempt), int(pid), int(n), int(salt))
        key = note[:3]
        if key not in furthest or furthest[key].n < note.n:
            furthest[key] = note
    return list(furthest.values())
