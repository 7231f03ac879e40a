"""One case under a small load that passes every moment, from the first submission to the verdict."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from tests.chaos.aftermath import read_projection
from tests.chaos.arming import Armed
from tests.chaos.checker import TERMINAL, check
from tests.chaos.clients import Clients
from tests.chaos.exchange import BROKEN, ask
from tests.chaos.history import (
    History,
    StoredAttempt,
    StoredEvent,
    StoredRun,
    Submission,
    Watch,
    read_notes,
)
from tests.chaos.load import arguments

#: Seconds for all that was submitted to end, over every recovery: a zygote that stands still takes five.
SETTLE_SECONDS: Final = 40.0

#: Seconds for Django's database to hear of it.
_PROJECT_SECONDS: Final = 15.0

#: Seconds that one client waits for an answer. A stopped gateway is replaced after one.
_ANSWER_SECONDS: Final = 4.0

_GOOD: Final = frozenset({"SUCCESSFUL"})
_BAD: Final = frozenset({"FAILED"})
_STOPPED: Final = frozenset({"CANCELLED", "SUCCESSFUL"})


@dataclass(frozen=True, slots=True)
class Sort:
    """One sort of run.

    Attributes:
      n: events; pause: seconds between them; scale: 40 makes blobs of them.
      options: of the submission.
      way: "key", over HTTP, repeated until it is answered; "django", through the outbox; "clock", by a schedule.
      cancel: whether somebody cancels it once a client has seen an event.
    """

    task: str
    n: int
    pause: float = 0.0
    scale: int = 1
    expected: frozenset[str] = _GOOD
    options: tuple[tuple[str, Any], ...] = ()
    way: str = "key"
    cancel: bool = False


#: Together they pass every moment of an ordinary life: events, blobs, output, ends of every sort, both ways in.
WAVE: Final = (
    Sort("chaos_ticks", 6, 0.02),
    Sort("chaos_ticks", 1, scale=40),
    Sort("chaos_talks", 3),
    Sort("chaos_fails", 2, expected=_BAD),
    Sort("chaos_retries", 2),
    Sort("chaos_ticks", 2, 5.0, expected=_BAD, options=(("timeout", 0.4), ("max_attempts", 1))),
    Sort("chaos_aticks", 200, 0.05, expected=_STOPPED, cancel=True),
    Sort("chaos_yields", 3, way="django"),
    Sort("ARow", 2),
)

#: What is due within two seconds.
SCHEDULED: Final = Sort("chaos_ticks", 2, way="clock")

#: What a healthy tree performs at once.
HEALTH: Final = Sort("chaos_ticks", 2)

#: How the clients of each run behave: one reads on, one breaks its connections by itself. What is large would be
#: broken seven times with a pause after each.
_PAIR: Final = ("plain", "reset")
_PAIR_OF_LARGE: Final = ("plain", "plain")


class PairOfClients(Clients):
    """Two resuming clients for each run, another one when all is over."""

    def follow_pairwise(self, run: str, *, large: bool, maybe_absent: bool) -> None:
        """Have the pair follow a run."""
        for temper in _PAIR_OF_LARGE if large else _PAIR:
            self.read(run, temper, maybe_absent=maybe_absent)

    def move(self, port: int) -> None:
        """Ask there from now on."""
        self._port = port

    def read(self, run: str, temper: str = "plain", *, maybe_absent: bool = False) -> None:
        """Have one client read a run from its beginning to its end."""
        watch = Watch(run, temper)
        self._history.watches.append(watch)
        self._nursery.start_soon(self._live, watch, random.Random(self._rng.random()), maybe_absent)


class Case:
    """What is submitted and seen in one case, on a tree that has seen others before.

    Args:
      seed: decides what is submitted.
      patient: statuses that mean "ask again" beyond 429 and 503, where a moment makes one request fail.
    """

    def __init__(
        self, armed: Armed, nursery: trio.Nursery, seed: str, *, patient: frozenset[int] = frozenset()
    ) -> None:
        self.history = History()
        self.armed = armed
        self._nursery = nursery
        self._rng = random.Random(seed)
        self._token = armed.tree.token()
        self._headers = {"Authorization": f"Bearer {self._token}"}
        self._again = {0, 429, 502, 503} | patient
        self.clients = PairOfClients(
            self.history, armed.port, self._token, nursery, self._rng.randrange(2**32)
        )
        self._floor = _newest(armed)
        self._under_way = 0
        self._deaths = len(armed.exits)

    # --- submitting ----------------------------------------------------------------------------------------

    def wave(self, sorts: tuple[Sort, ...] = WAVE) -> list[Submission]:
        """Begin to submit one of each sort."""
        return [self.submit(sort) for sort in sorts]

    def submit(self, sort: Sort) -> Submission:
        """Begin one submission."""
        it = Submission(
            no=len(self.history.submissions) + 1,
            task=f"proj.{sort.task}",
            salt=self._rng.randrange(1, 2**40),
            n=sort.n,
            scale=sort.scale,
            expected=sort.expected,
            way=sort.way,
        )
        self.history.submissions.append(it)
        self._under_way += 1
        self._nursery.start_soon(self._perform, it, sort)
        return it

    async def _perform(self, it: Submission, sort: Sort) -> None:
        try:
            ways = {"django": self._by_django, "clock": self._by_the_clock}
            await ways.get(it.way, self._by_http)(it, sort)
            if it.run is not None and it.must_exist:
                self.clients.follow_pairwise(it.run, large=it.scale > 1, maybe_absent=it.way == "django")
                if sort.cancel:
                    await self._cancel(it.run)
        finally:
            self._under_way -= 1

    async def _by_django(self, it: Submission, sort: Sort) -> None:
        answer = await trio.to_thread.run_sync(
            self.armed.django.submit, it.task, arguments(it, sort.pause), it.tag
        )
        it.run, it.outcome = answer["run"], answer["outcome"]

    async def _by_the_clock(self, it: Submission, sort: Sort) -> None:
        """Make a schedule of one moment, then wait for its run."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
        body = {"task": it.task, "at": at, "tags": [it.tag], "kwargs": arguments(it, sort.pause)}
        while True:
            status, answer = await self.ask("POST", "/api/v1/schedules", body)
            if status in (200, 201):
                break
            if status not in self._again:
                it.outcome, it.detail = "refused", f"{status} {answer!r:.200}"
                return
            await trio.sleep(0.05)
        it.outcome = "acknowledged"
        while it.run is None:
            status, page = await self.ask("GET", f"/api/v1/runs?tag=schedule:{answer['id']}")
            if status == 200 and page["runs"]:
                it.run = page["runs"][0]["id"]
            await trio.sleep(0.05)

    async def _by_http(self, it: Submission, sort: Sort) -> None:
        given = "fields" if it.task == "proj.ARow" else "kwargs"
        body = {"task": it.task, "tags": [it.tag], given: arguments(it, sort.pause), **dict(sort.options)}
        headers = {**self._headers, "Idempotency-Key": str(uuid.UUID(int=self._rng.getrandbits(128)))}
        while True:
            status, answer = await self.ask("POST", "/api/v1/runs", body, headers)
            if status in (200, 202):
                it.run, it.outcome = answer["id"], "acknowledged"
                return
            if status not in self._again:
                it.outcome, it.detail = "refused", f"{status} {answer!r:.200}"
                return
            it.unknown = True
            await trio.sleep(0.05)

    async def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        try:
            return await ask(
                self.armed.port,
                method,
                path,
                headers=headers or self._headers,
                body=body,
                timeout=_ANSWER_SECONDS,
            )
        except BROKEN:
            return 0, None

    async def _cancel(self, run: str) -> None:
        """Cancel a run that has said something, until somebody says that it is done, or too late."""
        while not any(seen.type == "tick" for watch in self._watches(run) for seen in watch.seen):
            if run in self.clients.ended:
                return
            await trio.sleep(0.02)
        while True:
            status, _ = await self.ask("POST", f"/api/v1/runs/{run}/cancel", {"grace": 0.5})
            if status not in self._again:
                return
            await trio.sleep(0.05)

    def _watches(self, run: str) -> list[Watch]:
        return [watch for watch in self.history.watches if watch.run == run]

    # --- coming to rest ------------------------------------------------------------------------------------

    async def until(self, what: Callable[[], object], seconds: float, name: str) -> bool:
        """Wait until `what` is true; when it does not become so, that is a trouble of the history."""
        with trio.move_on_after(seconds):
            while not what():
                await trio.sleep(0.02)
            return True
        self.history.troubles.append(f"not within {seconds:.0f} s: {name}")
        return False

    async def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until every submission is answered, every client at its end, Django told; then read all again.

        What does not come about in `seconds` is a trouble of the history, and nothing more is waited for.
        """
        answered = await self.until(lambda: not self._under_way, seconds, "every submission is answered")
        if not answered or not await self.until(self._all_read, seconds, "every client has reached the end"):
            return
        runs = {it.run: it.scale > 1 for it in self.history.submissions if it.run is not None}
        for run, large in runs.items():  # a page of large events has only one, and then comes a pause
            self.clients.read(run, "plain" if large else "pages")
        await self.until(self._all_read, seconds, "every run can be read again")
        await self.until(
            lambda: self._told(runs), min(seconds, _PROJECT_SECONDS), "Django has heard of every end"
        )
        await self._look_at_states(runs)

    def _all_read(self) -> bool:
        return all(watch.ended or watch.problems for watch in self.history.watches)

    def _told(self, runs: Collection[str]) -> bool:
        self.history.projected = {
            run: state for run, state in read_projection(self.armed.database).items() if run in runs
        }
        return all(self.history.projected.get(run) in TERMINAL for run in runs)

    async def _look_at_states(self, runs: Collection[str]) -> None:
        for run in runs:
            for _ in range(50):
                status, snapshot = await self.ask("GET", f"/api/v1/runs/{run}")
                if status == 200:
                    self.history.shown[run] = snapshot["status"]
                if status not in self._again:
                    break
                await trio.sleep(0.1)

    async def be_healthy(self, seconds: float = 10.0) -> None:
        """See that a new submission is performed within a few seconds; otherwise that is a trouble."""
        it = self.submit(HEALTH)
        await self.until(lambda: it.run in self.clients.ended, seconds, "a new submission is performed")

    async def until_seen(self, it: Submission, count: int, seconds: float = 15.0) -> None:
        """Wait until some client has seen `count` events of a run."""

        def seen() -> bool:
            return it.run is not None and any(len(watch.seen) >= count for watch in self._watches(it.run))

        await self.until(seen, seconds, f"{count} events of submission {it.no}")

    def move(self) -> None:
        """The tree has another port now."""
        self.clients.move(self.armed.port)

    # --- judging -------------------------------------------------------------------------------------------

    def violations(self) -> list[str]:
        """Return every broken promise of this case, as `rule: evidence`."""
        self.history.supervisor_deaths = len(self.armed.exits) - self._deaths
        _read_store(self.armed, self._floor, self.history)
        salts = {it.salt for it in self.history.submissions}
        if self.armed.notes.exists():
            notes = read_notes(self.armed.notes.read_text())
            self.history.notes = [note for note in notes if note.salt in salts]
        return [f"{it.rule}: {it.text}" for it in check(self.history).violations]


# --- the store -------------------------------------------------------------------------------------------------


def _connect(armed: Armed) -> contextlib.closing[sqlite3.Connection]:
    path = armed.state_dir / "store.sqlite3"
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
    connection.row_factory = sqlite3.Row
    return contextlib.closing(connection)


def _newest(armed: Armed) -> int:
    """Return the number of the newest run in the store."""
    with _connect(armed) as connection:
        return int(connection.execute("SELECT coalesce(max(no), 0) FROM run").fetchone()[0])


def _read_store(armed: Armed, floor: int, history: History) -> None:
    """Fill in `history.stored` with the runs whose number is above `floor`."""
    with _connect(armed) as connection:
        find = partial(_rows, connection, floor)
        attempts: dict[int, list[StoredAttempt]] = defaultdict(list)
        for row in find("SELECT * FROM attempt WHERE run > ? ORDER BY assigned_at, number"):
            kind = json.loads(row["cause"]).get("kind", "") if row["cause"] else ""
            attempts[row["run"]].append(
                StoredAttempt(row["number"], row["pid"], row["started_at"] is not None, row["ending"], kind)
            )
        events: dict[int, list[StoredEvent]] = defaultdict(list)
        for row in find('SELECT * FROM event WHERE run > ? ORDER BY run, "offset"'):
            data = row["data"] if row["blob"] is None else _blob(armed, row["blob"])
            digest = history.learn(row["type"], data)
            events[row["run"]].append(StoredEvent(row["offset"], row["type"], digest, row["attempt"]))
        endings = {row["run"] for row in find("SELECT run FROM ending WHERE run > ?")}
        for row in find("SELECT * FROM run WHERE no > ?"):
            history.stored[row["id"]] = StoredRun(
                id=row["id"],
                status=row["status"],
                tail=row["tail"],
                tags=tuple(json.loads(row["tags"])),
                task=row["task"],
                endings=int(row["no"] in endings),
                error=(row["error"] or b"").decode()[:300],
                events=events[row["no"]],
                attempts=attempts[row["no"]],
            )


def _rows(connection: sqlite3.Connection, floor: int, statement: str) -> list[Any]:
    return connection.execute(statement, (floor,)).fetchall()


def _blob(armed: Armed, name: str) -> bytes:
    try:
        return (armed.state_dir / "blobs" / name).read_bytes()
    except OSError as error:
        return repr(error).encode()
