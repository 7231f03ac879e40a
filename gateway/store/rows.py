"""What the store keeps, as plain rows, gathered into the batch that one round writes.

Pure data. JSON columns are bytes as they were rendered, once, by whoever made them. Times are Unix seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from taskkit.lifecycle import RunStatus


@dataclass(slots=True, kw_only=True)
class RunRow:
    """One run. `no` is the store's short number of it (1, 2, 3 …), `id` its public UUIDv7.

    Attributes:
      args, kwargs, metadata: JSON.
      row: JSON of taskkit.wire.messages.Row, when the task is a model.
      row_key: Row.key; at most one open run has it.
      subject: the `sub` of the token that submitted it.
      origin: "http" or "outbox".
      using: alias of the Django database its outbox row came from and its projection goes to.
      attempt: number of the latest attempt, 0 before the first.
      counted: attempts that count against `max_attempts` (lost ones do not).
      version: grows with each change that Django is told of; `told` is what the courier confirmed.
      tail: offset of the newest event; lines: number of the newest output line.
      result: JSON, or None; result_blob names a file in blobs/ instead.
      error: JSON `{code, message, …}` or None.
      progress: JSON of the newest run.progress, or None.
      cancelling: somebody wants it to stop.
      replay_of: id of the ended run whose arguments it has, or None.
      concurrency_key: who shares the limits of its task with it (gateway.throttle).
      parent: id of the run whose child it is, or None.
      after: JSON, ids of the runs that it comes after (gateway.flows).
      children, children_ended, children_failed: how many it has, as far as its stream has told of them.
      crashes: runners that it has killed; at taskkit.lifecycle.QUARANTINE_AFTER it is quarantined.
      suspect: it was in a shared process that died, so it is performed alone.
      epoch: grows when its newest events may have been lost with the machine's power (gateway.store.writer).
      result_expired: it had a result, which RESULT_TTL has removed.
      runner, attempted_at: who began the newest attempt, and when.
      failure: JSON of the newest attempt's bad end, as `error` has that of the run; None after a good one.
      fence: random name of this copy of the run: Django takes nothing of a copy that another node's has replaced.
      followed: it had a subscriber, and its task wants to be cancelled when it has none any more.
    """

    no: int
    id: str
    task: str
    args: bytes = b"[]"
    kwargs: bytes = b"{}"
    row: bytes | None = None
    row_key: str | None = None
    pool: str = "default"
    priority: int = 0
    run_after: float | None = None
    timeout: float | None = None
    soft_timeout: float | None = None
    cpu_timeout: float | None = None
    stall_timeout: float | None = None
    schedule_timeout: float | None = None
    max_attempts: int = 1
    on_lost: str = "retry"
    metadata: bytes = b"{}"
    tags: tuple[str, ...] = ()
    subject: str = ""
    origin: str = "http"
    using: str = "default"
    created_at: float = 0.0
    replay_of: str | None = None
    concurrency_key: str = ""
    parent: str | None = None
    after: bytes = b"[]"
    fence: str = ""
    # what changes
    status: RunStatus = RunStatus.READY
    attempt: int = 0
    counted: int = 0
    version: int = 1
    told: int = 0
    tail: int = 0
    lines: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    result: bytes | None = None
    result_blob: str | None = None
    error: bytes | None = None
    progress: bytes | None = None
    cancelling: bool = False
    crashes: int = 0
    suspect: bool = False
    followed: bool = False
    runner: str = ""
    attempted_at: float | None = None
    failure: bytes | None = None
    children: int = 0
    children_ended: int = 0
    children_failed: int = 0
    # what only the store changes
    epoch: int = 0
    result_expired: bool = False


#: Those that change when a run has only spoken. None of them is in an index; of MUTABLE, several are.
SPOKEN = ("tail", "lines", "progress", "children", "children_ended", "children_failed")

#: The columns of RunRow that a round may change; `told` has an operation of its own.
MUTABLE = (
    "run_after",
    "status",
    "attempt",
    "counted",
    "version",
    "tail",
    "lines",
    "started_at",
    "finished_at",
    "result",
    "result_blob",
    "error",
    "progress",
    "children",
    "children_ended",
    "children_failed",
    "cancelling",
    "crashes",
    "suspect",
    "followed",
    "runner",
    "attempted_at",
    "failure",
)


@dataclass(slots=True, kw_only=True)
class AttemptRow:
    """One attempt of a run; `token` is its fence. `ending` is None while it is open; `cause` and `failure` are JSON."""

    run: int
    number: int
    runner: str
    pid: int
    token: str
    assigned_at: float
    started_at: float | None = None
    ended_at: float | None = None
    ending: str | None = None
    cause: bytes | None = None
    failure: bytes | None = None


class EventRow(NamedTuple):
    """One event, a tuple as the store takes it. `pos` counts all events of the store, `offset` those of its run, both
    from 1.

    `data` is one line of JSON; with `blob` it is empty and the file of that name in blobs/ holds the line.
    """

    pos: int
    run: int
    offset: int
    attempt: int
    type: str
    data: bytes
    at: float
    blob: str | None = None


@dataclass(slots=True, frozen=True)
class OutputRow:
    """One line that a run printed or logged. `offset` counts the lines of its run from 1; `after` is the offset of
    the newest event at that moment. `stream` is "stdout", "stderr", "logging" or "output" (which of the first two
    is not known). `text` has no line break at its end. `level` and `logger` are set for logging only."""

    run: int
    offset: int
    after: int
    attempt: int
    stream: str
    text: str
    at: float
    level: str = ""
    logger: str = ""


@dataclass(slots=True, frozen=True)
class KeyRow:
    """An idempotency key of a subject: the run it made and the digest of the body that made it."""

    subject: str
    key: str
    digest: bytes
    run: str
    created_at: float


@dataclass(slots=True, frozen=True)
class TicketRow:
    """A ticket that was used: its `jti`, and until when it could have been, in Unix seconds."""

    id: str
    expires_at: float


@dataclass(slots=True, frozen=True)
class RevocationRow:
    """What was taken back: one token (`kind` "jti"), or all that a subject had at `at` ("sub").

    `expires_at`: when everything that it covers has expired.
    """

    kind: str
    name: str
    at: float
    expires_at: float


#: Between a run's id and its number in the id of a copy of what is another node's now (gateway.book.Book.disown).
COPY = "~"

#: Ended runs kept in memory because Django has not been told of them: 2 KB each without arguments and result. The
#: courier writes 100 in a transaction.
MAX_UNTOLD = 5_000

#: Quarantined runs that are told of, the newest ones: of a bad deployment's thousands nobody reads a list.
MAX_QUARANTINED = 100


@dataclass(slots=True, frozen=True)
class QuarantinedRow:
    """A run that has killed too many runners, and when it ended."""

    id: str
    task: str
    at: float


@dataclass(frozen=True, slots=True)
class InputRow:
    """Something that an open run was told.

    Attributes:
      number: 1, 2, 3 … per run.
      data: a JSON object.
      key: idempotency key of the request, or "".
    """

    run: int
    number: int
    name: str
    data: bytes
    key: str
    at: float


class BegunRow(NamedTuple):
    """An attempt of a task whose rate is limited has begun; `until` is when that does not matter any more."""

    task: str
    key: str
    at: float
    until: float


@dataclass(slots=True)
class Batch:
    """Everything one round changes, in one transaction.

    Attributes:
      runs: new runs.
      changed: runs whose MUTABLE columns are written as they are at this moment.
      spoken: runs of which only the columns of SPOKEN are written, if they are not among the others.
      attempts: new attempts (committed before `Start` leaves: attempt and assignment are one row).
      changed_attempts: attempts whose started_at, ended_at, ending, cause and failure are written.
      events, outputs: appended.
      ends: numbers of runs whose `stream.end` is among `events`; a second one for a run fails the transaction.
      sources: newest stored frame number by runner.
      forgotten: runners that are drained; their sources go.
      told: version by run number that Django has.
      keys: new idempotency keys.
      breakers: record of a task's circuit breaker by its name, None when there is nothing to keep.
      tickets: used in this round.
      revocations: made in this round; one of the same name is replaced.
      inputs: what runs were told.
      told_enough: numbers of runs that have ended: what they were told goes.
      begun: attempts that began in this round, of tasks whose rate is limited.
      begun_before: those that do not matter any more at this time may go.
      renamed: new id by number of a run that is another node's now.
      full: commit with synchronous=FULL (an accept, a claim or an end is among it).
    """

    runs: list[RunRow] = field(default_factory=list)
    changed: dict[int, RunRow] = field(default_factory=dict)
    spoken: dict[int, RunRow] = field(default_factory=dict)
    attempts: list[AttemptRow] = field(default_factory=list)
    changed_attempts: list[AttemptRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    outputs: list[OutputRow] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    told: dict[int, int] = field(default_factory=dict)
    keys: list[KeyRow] = field(default_factory=list)
    breakers: dict[str, bytes | None] = field(default_factory=dict)
    tickets: list[TicketRow] = field(default_factory=list)
    revocations: list[RevocationRow] = field(default_factory=list)
    inputs: list[InputRow] = field(default_factory=list)
    told_enough: list[int] = field(default_factory=list)
    begun: list[BegunRow] = field(default_factory=list)
    begun_before: float | None = None
    renamed: dict[int, str] = field(default_factory=dict)
    full: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(
            self.runs
            or self.changed
            or self.spoken
            or self.attempts
            or self.changed_attempts
            or self.events
            or self.outputs
            or self.ends
            or self.sources
            or self.forgotten
            or self.told
            or self.keys
            or self.breakers
            or self.tickets
            or self.revocations
            or self.inputs
            or self.told_enough
            or self.begun
            or self.begun_before
            or self.renamed
        )


@dataclass(slots=True)
class Opened:
    """What a gateway finds in the store when it opens it.

    Attributes:
      runs: READY and RUNNING runs by number, and at most MAX_UNTOLD ended ones that Django has not been told of.
      more_untold: there are more of those.
      gaps: after a power cut that may have taken events, positions between `low` and `high` (both exclusive) are left
        out: whoever stands there has seen events that are gone.
      attempts: open attempts (no ending).
      sources: newest stored frame number by runner.
      next_no, next_pos: first free numbers.
      newest_id: the greatest id of a run: one above it is new. Above all of them where that is not known.
      breakers: record of the circuit breaker by name of the task.
      quarantined: the newest runs in quarantine that nobody has released, oldest first.
      tickets, revocations: all that have not been removed.
      inputs: what open runs were told, by run, then number.
      begun: attempts whose beginning counts against a rate, oldest first.
    """

    runs: dict[int, RunRow]
    attempts: list[AttemptRow]
    sources: dict[str, int]
    next_no: int
    next_pos: int
    breakers: dict[str, bytes] = field(default_factory=dict)
    quarantined: list[QuarantinedRow] = field(default_factory=list)
    tickets: list[TicketRow] = field(default_factory=list)
    revocations: list[RevocationRow] = field(default_factory=list)
    inputs: list[InputRow] = field(default_factory=list)
    begun: list[BegunRow] = field(default_factory=list)
    more_untold: bool = False
    gaps: list[tuple[int, int]] = field(default_factory=list)
    newest_id: str = "~"


@dataclass(slots=True, kw_only=True)
class RunFilter:
    """Which runs to list, newest first; `before` is the number of the last run of the page before.

    `owner`, `ids` and `tasks` are what a token reaches: one of them has to fit, if any is there.
    """

    status: RunStatus | None = None
    task: str | None = None
    tag: str | None = None
    since: float | None = None
    until: float | None = None
    subject: str | None = None
    parent: str | None = None
    owner: str | None = None
    ids: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    before: int | None = None
    limit: int = 50


@dataclass(slots=True, frozen=True)
class Place:
    """Where somebody who has read up to a position of the store stands in one run.

    Attributes:
      after: offset of the newest event of the run up to there; 0: none, or it is gone.
      next: position of the first event behind it that there is; 0: there is none.
      last: position of the run's newest event; 0: there is none.
      open: whether the run was open.
    """

    no: int
    id: str
    epoch: int
    after: int
    next: int
    last: int
    open: bool


@dataclass(slots=True, frozen=True, kw_only=True)
class Mix:
    """A choice of runs whose events are read together.

    Attributes:
      runs: numbers of runs.
      tags: every run that has one of these, as far as `owner`, `ids` and `tasks` reach.
      owner, ids, tasks: of the runs with a tag those of such a subject, with such an id, or of such a task (`*` for any
        characters); all None: all.
    """

    runs: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()
    owner: str | None = None
    ids: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
