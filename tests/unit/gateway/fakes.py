"""A store in memory, an engine that obeys, a client that speaks ASGI: what the HTTP rooms are tested with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import trio

from gateway.accepting import Outcome
from gateway.app import build_app
from gateway.auth import Authenticator
from gateway.changes import Changes
from gateway.documents import Picture
from gateway.fanout import Hub
from gateway.grants import Grants, Revocation
from gateway.inputs import Inputs
from gateway.retention import Retention
from gateway.store.protocol import StoreError
from gateway.store.removal import Removal, Removed, RunLength, Usage
from gateway.store.rows import (
    AttemptRow,
    Batch,
    EventRow,
    KeyRow,
    Mix,
    Opened,
    OutputRow,
    Place,
    RunFilter,
    RunRow,
)
from gateway.submission import Catalogue, Submission
from gateway.tally import RunTally, StoreTally
from taskkit import tokens
from taskkit.errors import IdempotencyConflict, LifecycleError, SubmitError
from taskkit.lifecycle import RunStatus
from taskkit.settings import Settings
from taskkit.wire.messages import Answer, Created, Located, Row, ScheduleAnswer, ScheduleOrder, TaskInfo

KEY = b"k" * 32

COUNT = TaskInfo(
    name="demo.count",
    path="demo.tasks.count",
    kind="function",
    doc="Count.",
    parameters={
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0},
            "delay": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
            "when": {"type": "string", "format": "date-time"},
            "mode": {"enum": ["fast", "slow"]},
            "items": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["n"],
        "additionalProperties": False,
    },
    positional=("n", "delay", "when", "mode", "items"),
)
EXAMPLE = TaskInfo(
    name="demo.ExampleTask",
    path="demo.models.ExampleTask",
    kind="model",
    parameters={
        "$ref": "#/$defs/Fields",
        "$defs": {
            "Fields": {
                "type": "object",
                "properties": {"message": {"type": "string"}},
                "required": ["message"],
                "additionalProperties": False,
            }
        },
    },
    timeout=7.0,
    metadata={"team": "a"},
)


class MemoryUpkeep:
    """gateway.store.protocol.Upkeep that removes nothing by itself: it notes what was asked.

    `answers` are given by `remove` one by one, and an empty one when there is none left.
    """

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.asked: list[Removal] = []
        self.answers: list[Removed] = []
        self.lengths_of: list[RunLength] = []
        self.notes: dict[str, str] = {}
        self.unlinked: list[str] = []
        self.swept: list[float] = []
        self.dropped: list[str] = []
        self.done: list[str] = []
        self.used = Usage(file=8192, wal=0, free=0, events=100, blobs=0, blob_bytes=0, incremental=True)

    async def weigh(self) -> None:
        await self._store._check()
        self.done.append("weigh")

    async def usage(self) -> Usage:
        await self._store._check()
        return self.used

    async def remove(self, removal: Removal) -> Removed:
        await self._store._check()
        self.asked.append(removal)
        return self.answers.pop(0) if self.answers else Removed()

    async def lengths(self, runs: Sequence[int], after: int, limit: int) -> list[RunLength]:
        await self._store._check()
        known = [one for one in self.lengths_of if one.run in runs]
        return known + [one for one in self.lengths_of if one.run > after][:limit]

    async def note(self, key: str, value: str) -> None:
        await self._store._check()
        self.notes[key] = value
        self.done.append("note")

    async def noted(self, key: str) -> str | None:
        await self._store._check()
        return self.notes.get(key)

    async def unlink(self, names: Sequence[str]) -> int:
        await self._store._check()
        self.unlinked += names
        self.done.append("unlink")
        return 10 * len(names)

    async def sweep(self, before: float) -> tuple[int, int]:
        await self._store._check()
        self.swept.append(before)
        return 0, 0

    async def large_values(self) -> list[str]:
        await self._store._check()
        return [*self._store.blobs]

    async def drop(self, names: Sequence[str]) -> tuple[int, int]:
        await self._store._check()
        self.dropped += names
        return len(names), 10 * len(names)

    async def vacuum(self, pages: int) -> int:
        await self._store._check()
        self.done.append("vacuum")
        self.used = replace(
            self.used,
            free=max(0, self.used.free - pages * 4096),
            file=max(0, self.used.file - min(self.used.free, pages * 4096)),
        )
        return self.used.free // 4096

    async def checkpoint(self) -> bool:
        await self._store._check()
        self.done.append("checkpoint")
        return True


class MemoryStore:
    """gateway.store.protocol.Store without a disk. `broken` makes every call fail."""

    def __init__(self) -> None:
        self.rows: dict[int, RunRow] = {}
        self.event_rows: dict[int, list[EventRow]] = {}
        self.output_rows: dict[int, list[OutputRow]] = {}
        self.attempt_rows: list[AttemptRow] = []
        self.keys_used: dict[tuple[str, str], KeyRow] = {}
        self.broken = False
        self.reads = 0
        self.blobs: dict[str, bytes] = {}
        self.upkeep = MemoryUpkeep(self)

    async def _check(self) -> None:
        await trio.lowlevel.checkpoint()
        self.reads += 1
        if self.broken:
            raise StoreError("no space left on device")

    async def open(self) -> Opened:
        await self._check()
        return Opened({}, [], {}, 1, 1)

    async def commit(self, batch: Batch) -> None:
        await self._check()

    async def run(self, id: str) -> RunRow | None:
        await self._check()
        return next((replace(row) for row in self.rows.values() if row.id == id), None)

    async def runs_by_id(self, ids: Sequence[str]) -> dict[str, RunRow]:
        await self._check()
        return {row.id: replace(row) for row in self.rows.values() if row.id in ids}

    async def copies(self, ids: Sequence[str]) -> dict[str, RunRow]:
        await self._check()
        return {}

    async def runs(self, which: RunFilter) -> list[RunRow]:
        await self._check()
        found = [row for row in self.rows.values() if _selects(which, row)]
        return sorted(found, key=lambda row: -row.no)[: which.limit]

    async def untold(self, after: int, limit: int) -> list[RunRow]:
        await self._check()
        found = [row for row in self.rows.values() if row.version > row.told and row.no > after]
        return sorted(found, key=lambda row: row.no)[:limit]

    async def run_of_row(self, row_key: str) -> RunRow | None:
        await self._check()
        found = [row for row in self.rows.values() if row.row_key == row_key]
        return replace(max(found, key=lambda row: row.no)) if found else None

    async def attempts(self, run: int) -> list[AttemptRow]:
        await self._check()
        return [row for row in self.attempt_rows if row.run == run]

    async def events(self, run: int, after: int, limit: int, max_bytes: int) -> list[EventRow]:
        await self._check()
        found: list[EventRow] = []
        size = 0
        for row in self.event_rows.get(run, []):
            if row.offset <= after:
                continue
            size += len(row.data)
            if found and (size > max_bytes or len(found) >= limit):
                break
            found.append(row)
        return found

    async def places(self, mix: Mix, after: int, limit: int) -> tuple[list[Place], int | None]:
        await self._check()
        found = [self._place(row, after) for row in self.rows.values() if _mixes(mix, row)]
        kept = [place for place in found if place.open or place.no in mix.runs]
        ended = sorted(
            (place for place in found if place.next and place not in kept), key=lambda place: place.next
        )
        return kept + ended[:limit], ended[limit].next - 1 if len(ended) > limit else None

    def _place(self, row: RunRow, after: int) -> Place:
        events = self.event_rows.get(row.no, [])
        seen = max((event.offset for event in events if event.pos <= after), default=0)
        following = min((event.pos for event in events if event.pos > after), default=0)
        last = max((event.pos for event in events), default=0)
        return Place(row.no, row.id, row.epoch, seen, following, last, not row.status.is_terminal)

    async def merged(
        self, heads: Sequence[tuple[int, int]], upto: int, limit: int, max_bytes: int
    ) -> tuple[list[EventRow], int]:
        await self._check()
        rows = [
            event
            for run, after in heads
            for event in self.event_rows.get(run, [])
            if event.offset > after and event.pos <= upto
        ]
        found: list[EventRow] = []
        size = 0
        for row in sorted(rows, key=lambda row: row.pos):
            size += len(row.data)
            if found and (size > max_bytes or len(found) >= limit):
                return found, found[-1].pos
            found.append(row)
        return found, upto

    async def outputs(self, run: int, after: int, limit: int) -> list[OutputRow]:
        await self._check()
        return [row for row in self.output_rows.get(run, []) if row.offset > after][:limit]

    async def last_outputs(self, run: int, attempt: int, limit: int) -> list[OutputRow]:
        await self._check()
        return [row for row in self.output_rows.get(run, []) if row.attempt == attempt][-limit:]

    async def key(self, subject: str, key: str) -> KeyRow | None:
        await self._check()
        return self.keys_used.get((subject, key))

    async def keys(self, subject: str, keys: Sequence[str]) -> dict[str, KeyRow]:
        await self._check()
        return {key: self.keys_used[subject, key] for key in keys if (subject, key) in self.keys_used}

    async def blob(self, name: str) -> bytes:
        await self._check()
        return self.blobs[name]

    async def counts(self) -> dict[str, int]:
        await self._check()
        found: dict[str, int] = {}
        for row in self.rows.values():
            found[row.status.value] = found.get(row.status.value, 0) + 1
        return found

    async def close(self) -> None:
        await self._check()


def _selects(which: RunFilter, row: RunRow) -> bool:
    visible = which.owner is None and which.ids is None and which.tasks is None
    visible = visible or row.subject == which.owner
    visible = visible or row.id in (which.ids or ())
    visible = visible or any(fnmatchcase(row.task, pattern) for pattern in which.tasks or ())
    return (
        visible
        and which.status in (None, row.status)
        and which.task in (None, row.task)
        and which.subject in (None, row.subject)
        and (which.tag is None or which.tag in row.tags)
        and (which.since is None or row.created_at >= which.since)
        and (which.until is None or row.created_at < which.until)
        and (which.before is None or row.no < which.before)
    )


def _mixes(mix: Mix, row: RunRow) -> bool:
    visible = mix.ids is None and mix.tasks is None
    visible = visible or row.id in (mix.ids or ())
    visible = visible or any(fnmatchcase(row.task, pattern) for pattern in mix.tasks or ())
    return row.no in mix.runs or (visible and not set(mix.tags).isdisjoint(row.tags))


@dataclass
class View:
    """A runner as the engine shows it."""

    id: str
    pid: int
    pool: str = "default"
    role: str = "runner"
    state: str = "IDLE"
    runs: tuple[str, ...] = ()
    started_at: float = 0.0
    runs_done: int = 0
    last_ending: str | None = None


@dataclass
class StubEngine:
    """Commits to the memory store and tells the hub, in that order; runs nothing."""

    store: MemoryStore = field(default_factory=MemoryStore)
    hub: Hub = field(default_factory=Hub)
    changes: Changes = field(default_factory=Changes)
    catalogue: Catalogue = field(default_factory=lambda: Catalogue([COUNT, EXAMPLE]))
    settings: Settings = field(default_factory=Settings)
    refusal: Exception | None = None
    answer: Answer | None = None
    views: list[View] = field(default_factory=list)
    courier: bool = True
    located: dict[str, Located] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    graces: list[float | None] = field(default_factory=list)
    inputs: Inputs = field(default_factory=lambda: Inputs([]))
    submissions: list[Submission] = field(default_factory=list)
    ordered: list[tuple[str, bool]] = field(default_factory=list)
    schedule_orders: list[ScheduleOrder] = field(default_factory=list)
    schedule_answers: dict[str, ScheduleAnswer] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    grants: Grants = field(default_factory=lambda: Grants(Opened({}, [], {}, 1, 1)))
    position: int = 0
    run_tally: RunTally = field(default_factory=RunTally)
    store_tally: StoreTally = field(default_factory=StoreTally)
    versions: dict[str, str] = field(default_factory=lambda: {"bulkhead": "0.1"})

    async def submit(self, submission: Submission) -> tuple[RunRow, bool]:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        known = self.store.keys_used.get((submission.subject, submission.key or ""))
        if known is not None:
            if known.digest != submission.digest:
                raise IdempotencyConflict("the key was used with another body")
            found = await self.store.run(known.run)
            assert found is not None
            return found, True
        existing = await self.store.run(submission.id)
        if existing is not None:
            return existing, True
        self.submissions.append(submission)
        return self.add(submission), False

    async def submit_all(self, submissions: Sequence[Submission]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for submission in submissions:
            try:
                outcomes.append(await self.submit(submission))
            except SubmitError as error:
                outcomes.append(error)
        return outcomes

    def add(self, submission: Submission) -> RunRow:
        row = RunRow(
            no=len(self.store.rows) + 1,
            id=submission.id,
            task=submission.task.name,
            args=submission.args,
            kwargs=submission.kwargs,
            row_key=None if submission.row is None else submission.row.key,
            metadata=submission.metadata,
            tags=submission.tags,
            subject=submission.subject,
            replay_of=submission.replay_of,
            created_at=1_700_000_000.0 + len(self.store.rows),
        )
        self.store.rows[row.no] = row
        if submission.key is not None:
            self.store.keys_used[submission.subject, submission.key] = KeyRow(
                submission.subject, submission.key, submission.digest, row.id, row.created_at
            )
        self.hub.opened(row.no, 0)
        self.changes.publish([replace(row)])
        return row

    async def cancel(self, run: RunRow, grace: float | None) -> RunRow:
        await trio.lowlevel.checkpoint()
        if run.status.is_terminal:
            raise LifecycleError("the run has ended")
        self.graces.append(grace)
        self.store.rows[run.no].cancelling = True
        return replace(self.store.rows[run.no])

    async def input(self, run: RunRow, name: str, data: bytes, key: str) -> tuple[int, bool]:
        await trio.lowlevel.checkpoint()
        return self.inputs.add(run.no, name, data, key, 1.0, Batch())[0].number, False

    async def create_row(self, submission: Submission, fields: dict[str, Any]) -> Created:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        self.created.append(fields)
        row = Row(app="demo", model="ExampleTask", pk=len(self.created))
        return Created(ask="1", row=row, run=submission.id)

    async def ask(self, app: str, model: str, pk: str) -> Answer:
        await trio.lowlevel.checkpoint()
        return self.answer or Answer(ask="1", status="unknown")

    async def locate(self, id: str) -> Located | None:
        await trio.lowlevel.checkpoint()
        return self.located.get(id)

    async def schedule(self, order: ScheduleOrder) -> ScheduleAnswer:
        await trio.lowlevel.checkpoint()
        self.schedule_orders.append(order)
        if self.refusal is not None:
            raise self.refusal
        return self.schedule_answers.get(order.order) or ScheduleAnswer(ask="1", status="unknown")

    async def end_runner(self, id: str, *, now: bool) -> bool:
        await trio.lowlevel.checkpoint()
        self.ordered.append((id, now))
        return id in [view.id for view in self.views]

    async def reset_task(self, task: str) -> bool:
        await trio.lowlevel.checkpoint()
        was_held = task in self.held
        self.held.discard(task)
        return was_held

    async def redeem(self, ticket: tokens.Ticket) -> bool:
        await trio.lowlevel.checkpoint()
        return self.grants.redeem(ticket, trio.current_time(), Batch())

    def is_used(self, ticket: tokens.Ticket) -> bool:
        return self.grants.is_used(ticket)

    async def revoke(self, revocation: Revocation) -> None:
        await trio.lowlevel.checkpoint()
        self.grants.revoke(revocation, Batch())

    def is_revoked(self, claims: tokens.Claims) -> bool:
        return self.grants.is_revoked(claims)

    def runners(self) -> list[View]:
        return self.views

    def statistics(self) -> Picture:
        return {
            "queued": 0,
            "queues": {},
            "pools": {"default": {"size": 4, "queued": 0, "runners": len(self.views), "busy": 0}},
            "running": 0,
            "runners": len(self.views),
            "untold": 0,
            "rounds": 7,
            "uptime": 1.5,
            "store_error": "",
            "courier": self.courier,
            "draining": False,
            "restarts": {"courier": 0, "runners": 0},
            "held": [],
            "quarantined": [],
            "tickets": 0,
            "revocations": 0,
        }

    # --- what a run does ------------------------------------------------------------------------------------

    def start(self, task: str = "demo.count", **changes: Any) -> RunRow:
        """Make a run that is open, and known to the hub."""
        no = len(self.store.rows) + 1
        row = RunRow(no=no, id=f"01890a5d-ac96-774b-bcce-{no:012d}", task=task, status=RunStatus.RUNNING)
        row = replace(row, created_at=1_700_000_000.0 + no, **changes)
        self.store.rows[no] = row
        self.store.event_rows.setdefault(no, [])
        self.hub.opened(no, row.tail)
        self.changes.publish([replace(row)])
        return row

    def emit(self, run: RunRow, *events: tuple[str, Any]) -> None:
        """Commit events, then publish them."""
        self.publish(self.commit(run, *events))

    def commit(self, run: RunRow, *events: tuple[str, Any]) -> list[EventRow]:
        """Commit events; they are not published."""
        row = self.store.rows[run.no]
        new: list[EventRow] = []
        for type, data in events:
            row.tail += 1
            self.position += 1
            packed = data if isinstance(data, bytes) else msgspec.json.encode(data)
            new.append(EventRow(self.position, run.no, row.tail, 1, type, packed, 1_700_000_000.0))
        self.store.event_rows.setdefault(run.no, []).extend(new)
        return new

    def publish(self, events: list[EventRow]) -> None:
        """Publish committed events, those of one round."""
        for no in dict.fromkeys(event.run for event in events):
            self.hub.publish(no, [event for event in events if event.run == no])
        if events:
            self.hub.settled(events[-1].pos)

    def say(self, run: RunRow, *texts: str, stream: str = "stdout") -> None:
        """Commit output lines, then publish them."""
        row = self.store.rows[run.no]
        new: list[OutputRow] = []
        for text in texts:
            row.lines += 1
            new.append(OutputRow(run.no, row.lines, row.tail, 1, stream, text, 1_700_000_000.0))
        self.store.output_rows.setdefault(run.no, []).extend(new)
        self.hub.publish_output(run.no, new)

    def end(self, run: RunRow, status: RunStatus = RunStatus.SUCCESSFUL, result: Any = None) -> None:
        """Commit the outcome with `stream.end`, publish, tell the hub."""
        row = self.store.rows[run.no]
        row.status, row.finished_at = status, 1_700_000_100.0
        data: dict[str, Any] = {"status": status.value}
        if status is RunStatus.SUCCESSFUL:
            row.result = msgspec.json.encode(result)
            data["result"] = result
        else:
            row.error = b'{"code":"raised","message":"boom"}'
        self.emit(run, ("stream.end", data))
        self.hub.ended(run.no)


def token(**claims: Any) -> str:
    """Return a token that may do everything, unless said otherwise."""
    given: dict[str, Any] = {"actions": tokens.ACTIONS, "runs": "*", "tasks": ("*",), "ttl": 3600.0}
    return tokens.issue(KEY, **{"subject": "me", **given, **claims})


def app_of(engine: StubEngine) -> Any:
    """Return the application over `engine`."""
    settings = engine.settings
    authenticator = Authenticator(
        KEY,
        ["testserver"],
        settings.cors_origins,
        desk=engine,
        limits=settings.limits,
        channels=settings.async_request.anonymous,
    )
    return build_app(engine, authenticator, Retention(engine.store, engine.settings, "boot"))


@asynccontextmanager
async def client_of(engine: StubEngine, bearer: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """Give an httpx client of the application; it buffers whole responses."""
    transport = httpx.ASGITransport(app=app_of(engine), raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {token() if bearer is None else bearer}"}
    if bearer == "":
        headers = {}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://testserver", headers=headers
    ) as client:
        yield client


class Exchange:
    """One request spoken in ASGI, message by message: what a stream says as it says it."""

    def __init__(self, path: str, method: str = "GET", **headers: str) -> None:
        parts = urlsplit(path)
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.ended = False
        self.returned = False
        self.news = trio.Event()
        self._gone = trio.Event()
        self._asked = False
        sent = {"host": "testserver", "authorization": f"Bearer {token()}"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": parts.path,
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
            "state": {},
        }

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def events(self) -> list[tuple[str, str, str]]:
        """What an EventSource would dispatch: id, type, data."""
        found: list[tuple[str, str, str]] = []
        id = ""
        for block in self.body.decode().split("\n\n"):
            fields: dict[str, list[str]] = {}
            for line in block.split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            id = fields.get("id", [id])[-1]
            if "data" in fields:
                found.append((id, fields.get("event", ["message"])[-1], "\n".join(fields["data"])))
        return found

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert not self.ended, "a send behind the last one"
            self.chunks.append(message.get("body", b""))
            self.ended = not message.get("more_body", False)
        self.news.set()
        self.news = trio.Event()

    def leave(self) -> None:
        """Close the connection from the client's side."""
        self._gone.set()

    async def run(self, app: Any) -> None:
        await app(self.scope, self.receive, self.send)
        self.returned = True
        self.news.set()
        self.news = trio.Event()

    async def until(self, text: bytes | None = None, seconds: float = 5.0) -> None:
        """Wait until the body has `text`, or until the response is over."""
        with trio.fail_after(seconds):
            while not (self.returned if text is None else text in self.body):
                await self.news.wait()


@asynccontextmanager
async def exchange(
    engine: StubEngine, path: str, method: str = "GET", **headers: str
) -> AsyncIterator[Exchange]:
    """Give a request under way; it is cut off at the end of the block."""
    one = Exchange(path, method, **headers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, app_of(engine))
        yield one
        nursery.cancel_scope.cancel()
