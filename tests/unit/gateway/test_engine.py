"""Rounds over a real store: what is accepted, spoken, cut off, refused, taken over."""

from __future__ import annotations

import random
import sqlite3
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from gateway.accepting import Acceptance
from gateway.grants import Revocation
from gateway.store.protocol import StoreError
from gateway.store.rows import Batch, EventRow, RunRow
from gateway.store.sqlite import SqliteStore
from gateway.submission import Submission
from taskkit.errors import IdempotencyConflict, LifecycleError, NotWritable, QueueFull
from taskkit.identifiers import new_run_id
from taskkit.lifecycle import RunStatus
from taskkit.settings import BreakerSettings, LimitSettings, Settings
from taskkit.tokens import Claims, Ticket
from taskkit.wire.messages import (
    Assigned,
    Cancel,
    Deadline,
    Disarm,
    Drained,
    Event,
    Finished,
    Kill,
    Notes,
    Progress,
    Retire,
    Row,
    Start,
    Started,
    TaskFailure,
)
from tests.unit.gateway.gate import SETTINGS, Gate, HandRunner, gate, submission


@pytest.fixture
def runners() -> Any:
    """Give a maker of runners that are closed at the end."""
    made: list[HandRunner] = []

    def make(id: str = "r1", **spec: Any) -> HandRunner:
        made.append(HandRunner(id, **spec))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def _up(g: Gate, runner: HandRunner) -> HandRunner:
    runner.up(g.engine)
    runner.hello()
    return runner


# --- a run from end to end


async def test_a_run_is_accepted_performed_and_ended(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run = await g.submit(timeout=9.0)
        assert (await g.store.run(run.id)) is not None, "it is in the store when submit returns"
        token = await runner.started()
        runner.tick(token, 1, 2)
        runner.say(Progress(token=token, data=b'{"done":1}'))
        runner.print(f"\x1eo{token}\x1fprinted\n")
        runner.finish(token, result=b'{"x":1}')
        row = await g.ended(run)
        assert (row.status, row.result, row.progress) == (RunStatus.SUCCESSFUL, b'{"x":1}', b'{"done":1}')
        assert await g.names(run) == ["run.started", "tick", "tick", "run.progress", "stream.end"]
        assert await g.lines(run) == ["printed"]
        (attempt,) = await g.store.attempts(run.no)
        assert (attempt.ending, attempt.token) == ("returned", token)
        assert g.of(Assigned) == [Assigned(runner="r1", last=True)]
        assert Disarm(runner="r1", token=token) in g.told
        kinds = [deadline.kind for deadline in g.of(Deadline)]
        assert set(kinds) == {"timeout"}


async def test_a_claim_is_in_the_store_before_the_runner_hears_of_it(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run = await g.submit()
        start = await runner.ordered(Start)
        (attempt,) = await g.store.attempts(run.no)
        assert (attempt.token, attempt.started_at) == (start.token, None)


async def test_what_a_client_has_seen_is_in_the_store(
    tmp_path: Path, runners: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run, token = await g.ran(runner)
        seen: list[int] = []
        publish = g.hub.publish

        def spy(run: int, events: Sequence[EventRow]) -> None:
            seen.extend(row.offset for row in events)
            publish(run, events)

        monkeypatch.setattr(g.hub, "publish", spy)
        for n in range(50):
            runner.tick(token, n)
            await g.engine.round_over()
            stored = [row.offset for row in await g.store.events(run.no, 0, 1000, 1 << 20)]
            assert set(seen) <= set(stored)
        await g.until(lambda: run.tail == 51)


async def test_output_is_in_the_store_with_the_end(tmp_path: Path, runners: Any) -> None:
    """The round that commits `stream.end` has every line the runner wrote in front of it."""
    async with gate(tmp_path, running=False) as g:
        async with trio.open_nursery() as nursery:
            runner = _up(g, runners())
            nursery.start_soon(g.engine.run)
            run, token = await g.ran(runner)
            for n in range(500):
                runner.print(f"\x1eo{token}\x1fline {n}\n")
            runner.finish(token)
            await g.ended(run)
            assert await g.lines(run) == [f"line {n}" for n in range(500)]
            nursery.cancel_scope.cancel()


async def test_a_large_event_reaches_clients_with_its_data(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        name, data = str(uuid.uuid4()), b'{"x":"' + b"y" * 100_000 + b'"}'
        (tmp_path / "blobs" / name).write_bytes(data)
        run, token = await g.ran(runner)
        with g.hub.attach(run.no) as subscription:
            runner.say(
                Event(token=token, type="big", blob=name, size=len(data), sha256="…"),
                Event(token=token, type="big", blob=str(uuid.uuid4()), size=1, sha256="…"),
                Event(token=token, type="big", blob="../../etc/passwd", size=1, sha256="…"),
            )
            await g.until(lambda: subscription.news(3))  # decided is not published
            entries = subscription.batch(1, 1 << 20) or []
            assert next(iter(entries)).row.data == data
        rows = await g.events(run)
        assert rows[1].data == data
        assert b"_missing_blob" in rows[2].data
        assert b"root" not in rows[3].data


async def test_a_thousand_runs_are_given_out_by_priority(
    tmp_path: Path, runners: Any, rng: random.Random
) -> None:
    async with gate(tmp_path) as g:
        priorities = [rng.randint(-5, 5) for _ in range(1_000)]
        made: list[RunRow] = []

        async def submit(priority: int) -> None:
            made.append(await g.submit(priority=priority))

        async with trio.open_nursery() as nursery:
            for priority in priorities:
                nursery.start_soon(submit, priority)
        expected = [run.id for run in sorted(made, key=lambda run: (-run.priority, run.no))]
        runner = _up(g, runners(runs=1_000))
        performed = []
        for number in range(1, 1_001):
            start = await runner.ordered(Start, number)
            performed.append(start.run)
            runner.say(Started(token=start.token), Finished(token=start.token, ending="returned"))
        await g.until(lambda: not g.engine.book.runs)
        assert performed == expected
        assert (await g.store.counts())["SUCCESSFUL"] == 1_000


async def test_a_shared_runner_gets_as_many_as_it_takes(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners(pool="shared", concurrency=3, runs=9))
        runs = [await g.submit(pool="shared") for _ in range(4)]
        tokens = [await runner.started(number) for number in (1, 2, 3)]
        await g.until(lambda: [run.status for run in runs].count(RunStatus.RUNNING) == 3)
        assert len([order for order in runner.orders() if isinstance(order, Start)]) == 3
        (view,) = g.engine.runners()
        assert (view.state, len(view.runs)) == ("BUSY", 3)
        runner.finish(tokens[1])
        await runner.ordered(Start, 4)


async def test_a_run_waits_for_its_time(tmp_path: Path, runners: Any) -> None:
    import time

    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        due = time.time() + 0.3
        await g.submit(run_after=due)
        await runner.ordered(Start)
        assert time.time() >= due


# --- submitting


async def test_a_retry_with_the_same_id_is_the_same_run(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        id = new_run_id()
        first, replayed = await g.engine.submit(submission(id=id))
        assert not replayed
        again, replayed = await g.engine.submit(submission(id=id))
        assert replayed
        assert again.no == first.no
        runner = _up(g, runners())
        runner.finish(await runner.started())
        await g.ended(first)
        late, replayed = await g.engine.submit(submission(id=id))
        assert replayed
        assert (late.no, late.status) == (first.no, RunStatus.SUCCESSFUL)


async def test_the_store_is_asked_only_about_ids_that_may_be_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = SqliteStore.runs_by_id

    async def asks(self: SqliteStore, ids: Sequence[str]) -> dict[str, RunRow]:
        asked.extend(ids)
        return await read(self, ids)

    monkeypatch.setattr(SqliteStore, "runs_by_id", asks)
    early, first, second = sorted(new_run_id() for _ in range(3))
    async with gate(tmp_path) as g:
        for id in (first, second):
            run = await g.submit(id=id)
            await g.engine.cancel(run, None)
    assert asked == []
    async with gate(tmp_path) as g:  # after a restart, too: it is the store that knows
        for id in (first, second):
            assert (await g.engine.submit(submission(id=id)))[1]
        assert not (await g.engine.submit(submission(id=early)))[1]
        assert asked == [first, second, early]
        await g.submit()
        assert asked == [first, second, early]


@pytest.mark.parametrize("key", ["k", None])
async def test_submissions_at_the_same_time_make_one_run(tmp_path: Path, key: str | None) -> None:
    async with gate(tmp_path) as g:
        id = new_run_id()
        outcomes: list[tuple[RunRow, bool]] = []

        async def submit() -> None:
            made = submission(key=key, digest=b"d", id=new_run_id() if key else id)
            outcomes.append(await g.engine.submit(made))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(submit)
        assert len({run.no for run, _ in outcomes}) == 1
        assert sum(not replayed for _, replayed in outcomes) == 1


async def test_one_key_with_another_body_is_a_conflict(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        await g.submit(key="k", digest=b"one")
        with pytest.raises(IdempotencyConflict):
            await g.engine.submit(submission(key="k", digest=b"two"))
        await g.submit(key="k", digest=b"two", subject="bob")  # keys are a subject's own
    async with gate(tmp_path) as g:  # after a restart it is the store that knows
        with pytest.raises(IdempotencyConflict):
            await g.engine.submit(submission(key="k", digest=b"two"))


@pytest.mark.parametrize("key", ["k", None])
async def test_a_submission_that_raced_with_its_own_runs_end_is_that_run(
    tmp_path: Path, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before the first one was there, and comes to its round when that has ended already."""

    look = Acceptance._look
    looks = 0

    async def looks_too_early(self: Acceptance, made: list[Submission], outcomes: list[Any]) -> None:
        nonlocal looks
        looks += 1
        if looks >= 3:
            await look(self, made, outcomes)

    async with gate(tmp_path) as g:
        monkeypatch.setattr(Acceptance, "_look", looks_too_early)
        id = new_run_id()
        first = await g.submit(id=id, key=key, digest=b"d")
        await g.engine.cancel(first, None)
        assert g.engine.book.find(id) is None
        again, replayed = await g.engine.submit(submission(id=id, key=key, digest=b"d"))
        assert replayed
        assert (again.no, again.status) == (first.no, RunStatus.CANCELLED)


async def test_a_row_has_one_open_run(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        first = await g.submit(row=Row(app="t", model="Row", pk=1))
        second, replayed = await g.engine.submit(submission(row=Row(app="t", model="row", pk=1)))
        assert replayed
        assert second is first
        runner = _up(g, runners())
        runner.finish(await runner.started())
        await g.ended(first)
        third, replayed = await g.engine.submit(submission(row=Row(app="t", model="ROW", pk=1)))
        assert not replayed
        assert third.no != first.no


async def test_a_full_queue_refuses_and_takes_again(tmp_path: Path, runners: Any) -> None:
    settings = Settings(limits=LimitSettings(queued_runs=2))
    async with gate(tmp_path, settings=settings) as g:
        runs = [await g.submit() for _ in range(2)]
        with pytest.raises(QueueFull) as caught:
            await g.engine.submit(submission())
        assert caught.value.retry_after
        await g.engine.cancel(runs[0], None)
        await g.submit()


# --- cancelling and stopping


async def test_a_waiting_run_is_cancelled_at_once(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        run = await g.submit()
        await g.engine.cancel(run, None)
        row = await g.store.run(run.id)
        assert row is not None
        assert row.status is RunStatus.CANCELLED
        assert await g.names(run) == ["stream.end"]
        with pytest.raises(LifecycleError):
            await g.engine.cancel(run, None)


async def test_a_running_run_is_asked_and_has_a_deadline(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run, token = await g.ran(runner)
        found = await g.engine.cancel(run, 0.5)
        assert found.status is RunStatus.RUNNING
        assert found.cancelling
        assert await runner.ordered(Cancel) == Cancel(token=token)
        deadline = Deadline(runner="r1", token=token, kind="cancelled", after=0.5, grace=1.0, at_most=True)
        assert deadline in g.told
        runner.finish(token, ending="cancelled")
        assert (await g.ended(run)).status is RunStatus.CANCELLED
        assert await g.names(run) == ["run.started", "run.cancelling", "stream.end"]


async def test_without_a_grace_the_settings_grace_is_taken(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        run, _ = await g.ran(_up(g, runners()))
        await g.engine.cancel(run, None)
        assert [deadline.after for deadline in g.of(Deadline)] == [3.0]


async def test_draining_claims_nothing_and_puts_runs_back(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners(runs=5))
        run, token = await g.ran(runner)
        g.engine.drain()
        assert (await runner.ordered(Cancel)).reason == "stopping"
        await runner.ordered(Retire)
        waiting = await g.submit()
        runner.finish(token, ending="cancelled")
        await g.until(lambda: run.status is RunStatus.READY)
        assert run.counted == 0
        assert g.engine.statistics()["draining"]
        assert waiting.status is RunStatus.READY


# --- how runners end


async def test_a_runner_that_dies_ends_its_run_with_the_cause(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run, token = await g.ran(runner)
        runner.tick(token, 1, 2, 3)
        runner.die(g.engine, signal="SIGSEGV", detail="killed by SIGSEGV")
        row = await g.ended(run)
        assert row.status is RunStatus.FAILED
        assert msgspec.json.decode(row.error or b"")["cause"]["signal"] == "SIGSEGV"
        assert await g.ticks(run) == [1, 2, 3]
        await g.drained(runner)
        assert g.engine.runners() == []


async def test_a_retry_is_another_attempt_of_the_same_stream(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners(runs=5))
        run, token = await g.ran(runner, max_attempts=2)
        failure = TaskFailure(exception="builtins.ValueError", message="no")
        runner.finish(token, ending="raised", failure=failure, retry_in=0.0)
        token = await runner.started(2)
        runner.finish(token)
        assert (await g.ended(run)).status is RunStatus.SUCCESSFUL
        assert await g.names(run) == ["run.started", "run.retrying", "run.started", "stream.end"]
        assert [attempt.number for attempt in await g.store.attempts(run.no)] == [1, 2]


async def test_a_corrupt_runner_leaves_its_neighbour_alone(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        bad, good = _up(g, runners("bad")), _up(g, runners("good"))
        first, second = await g.submit(), await g.submit()
        tokens = {}
        for runner in (bad, good):
            start = await runner.ordered(Start)
            tokens[runner] = start.run, start.token
            runner.say(Started(token=start.token))
        bad.tick(tokens[bad][1], 1)
        bad.write(b"garbage" * 10)
        good.tick(tokens[good][1], 2)
        await g.until(lambda: g.of(Kill))
        bad.die(g.engine, signal="SIGKILL")
        good.tick(tokens[good][1], 3)
        good.finish(tokens[good][1])
        by_id = {first.id: first, second.id: second}
        failed, fine = await g.ended(by_id[tokens[bad][0]]), await g.ended(by_id[tokens[good][0]])
        assert msgspec.json.decode(failed.error or b"")["cause"]["kind"] == "corrupt"
        assert await g.ticks(failed) == [1]
        assert (fine.status, await g.ticks(fine)) == (RunStatus.SUCCESSFUL, [2, 3])


async def test_runners_are_shown_as_they_are(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = runners(runs=2)
        runner.up(g.engine)
        assert [view.state for view in g.engine.runners()] == ["STARTING"]
        runner.hello()
        await g.until(lambda: [view.state for view in g.engine.runners()] == ["IDLE"])
        run, token = await g.ran(runner)
        (view,) = g.engine.runners()
        assert (view.state, view.runs, view.pid, view.pool, view.role) == (
            "BUSY",
            (run.id,),
            77,
            "default",
            "runner",
        )
        runner.finish(token)
        run, token = await g.ran(runner, 2)
        runner.finish(token)
        await g.ended(run)
        (view,) = g.engine.runners()
        assert (view.state, view.runs_done, view.last_ending) == ("RETIRING", 2, "returned")


# --- a store in trouble


class Sulking:
    """A store whose commits fail while `broken`."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.broken = False
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def commit(self, batch: Batch) -> None:
        if self.broken:
            self.refused += 1
            await trio.lowlevel.checkpoint()
            raise StoreError("no space left on device")
        await self._store.commit(batch)


async def test_a_store_that_cannot_be_written_stops_consumption_and_loses_nothing(
    tmp_path: Path, runners: Any
) -> None:
    async with gate(tmp_path, wrap=Sulking) as g:
        store: Any = g.engine.store
        runner = _up(g, runners())
        run, token = await g.ran(runner)
        store.broken = True
        runner.tick(token, *range(100))
        await g.until(lambda: g.engine.store_error)
        tail = (await g.store.events(run.no, 0, 1000, 1 << 20))[-1].offset
        for n in range(100, 200):
            runner.tick(token, n)
        with pytest.raises(NotWritable) as caught:
            await g.engine.submit(submission())
        assert caught.value.run
        with pytest.raises(NotWritable):
            await g.engine.cancel(run, None)
        assert (await g.store.events(run.no, 0, 1000, 1 << 20))[-1].offset == tail
        assert "no space" in g.engine.statistics()["store_error"]
        store.broken = False
        runner.finish(token)
        row = await g.ended(run)
        assert await g.ticks(run) == list(range(200))
        assert row.status is RunStatus.SUCCESSFUL
        assert g.engine.store_error == ""
        await g.submit()


async def test_a_disk_that_is_full_stops_consumption_and_loses_nothing(tmp_path: Path, runners: Any) -> None:
    """SQLite's own refusal, at a number of pages."""
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run, token = await g.ran(runner)
        writer: Any = g.store._require().writer
        pages = writer.connection.execute("PRAGMA page_count").fetchone()[0]
        writer.connection.execute(f"PRAGMA max_page_count = {pages + 3}")
        for n in range(30):
            runner.say(Event(token=token, type="tick", data=b'{"n":%d,"x":"%s"}' % (n, b"x" * 2_000)))
        await g.until(lambda: g.engine.store_error)
        writer.connection.execute("PRAGMA max_page_count = 1000000")
        runner.finish(token)
        await g.ended(run)
        assert await g.ticks(run) == list(range(30))


async def test_a_submission_whose_outcome_is_unknown_is_safe_to_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.engine._ANSWER_SECONDS", 0.1)
    async with gate(tmp_path, wrap=Sulking) as g:
        store: Any = g.engine.store
        id = new_run_id()
        store.broken = True
        with pytest.raises(NotWritable) as caught:
            await g.engine.submit(submission(id=id))
        assert caught.value.run == id
        store.broken = False
        monkeypatch.undo()
        await g.until(lambda: not g.engine.store_error)
        run, replayed = await g.engine.submit(submission(id=id))
        assert run.id == id
        assert replayed, "it was decided, and committed as soon as that was possible"


@pytest.mark.parametrize("key", ["k", None])
async def test_a_repeated_submission_is_not_answered_before_the_first_is_committed(
    tmp_path: Path, key: str | None
) -> None:
    """The gateway could die before it is, and whoever was told of the run would ask for it in vain."""
    async with gate(tmp_path, wrap=Sulking) as g:
        store: Any = g.engine.store
        store.broken = True
        id = new_run_id()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(g.engine.submit, submission(id=id, key=key, digest=b"d"))
            await g.until(lambda: g.engine.book.find(id) and g.engine.store_error)
            with pytest.raises(NotWritable):
                await g.engine.submit(submission(id=id, key=key, digest=b"d"))
            store.broken = False
        run, replayed = await g.engine.submit(submission(id=id, key=key, digest=b"d"))
        assert (run.id, replayed) == (id, True)


async def test_an_error_of_a_decision_is_its_callers_alone(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        with pytest.raises(ZeroDivisionError):
            await g.engine.decide(lambda: 1 / 0)
        await g.submit()


# --- gateways that are killed


class Killed(BaseException):
    """Stands for SIGKILL."""


@asynccontextmanager
async def _doomed(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Gate, trio.Event, trio.Event]]:
    """Give a gateway that is killed when it comes to `at` with an open run once `armed` is set; then `dead` is."""
    armed, dead = trio.Event(), trio.Event()

    async with gate(tmp_path, running=False) as g:
        step = getattr(g.engine, at)

        def trap(*args: Any) -> Any:
            if armed.is_set() and g.engine.book.runs:
                raise Killed
            return step(*args)

        monkeypatch.setattr(g.engine, at, trap)

        async def live() -> None:
            try:
                await g.engine.run()
            except* Killed:
                dead.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            yield g, armed, dead
            with trio.fail_after(20):
                await dead.wait()


@pytest.mark.parametrize("at", ["_commit", "_publish", "_act"])
async def test_a_killed_gateways_successor_has_everything_once(
    tmp_path: Path, runners: Any, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the commit, after it, before the orders: the union of both lives is exact."""
    runner = runners()
    async with _doomed(tmp_path, at, monkeypatch) as (g, armed, _):
        _up(g, runner)
        run, token = await g.ran(runner)
        runner.tick(token, *range(10))
        await g.until(lambda: run.tail == 11)
        armed.set()
        runner.tick(token, *range(10, 20))
    runner.tick(token, *range(20, 30))
    async with gate(tmp_path, adopting=[runner]) as g:
        runner.finish(token)
        row = await g.ended(run)
        assert await g.ticks(row) == list(range(30))
        assert (await g.names(row)).count("stream.end") == 1


async def test_frames_that_were_committed_and_not_consumed_are_stored_once(
    tmp_path: Path, runners: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runners()
    async with gate(tmp_path, running=False) as g:
        _up(g, runner)

        dead = trio.Event()

        def killed(id: str, size: int) -> None:
            raise Killed

        async def live() -> None:
            try:
                await g.engine.run()
            except* Killed:
                dead.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            run, token = await g.ran(runner)
            await g.engine.flush()
            monkeypatch.setattr(g.engine._pipes, "consume", killed)
            runner.tick(token, 1, 2, 3)
            runner.finish(token)
    row = await _stored(tmp_path, run)
    assert row.status is RunStatus.SUCCESSFUL, "the commit came before the kill"
    async with gate(tmp_path, adopting=[runner]) as g:
        runner.die(g.engine, "exit")
        await g.drained(runner)
        assert await g.ticks(row) == [1, 2, 3]
        assert (await g.names(row)).count("stream.end") == 1
        assert not g.of(Kill)


async def _stored(tmp_path: Path, run: RunRow) -> RunRow:
    async with gate(tmp_path, running=False) as g:
        row = await g.store.run(run.id)
    assert row is not None
    return row


async def test_runner_and_gateway_killed_together_lose_nothing(tmp_path: Path, runners: Any) -> None:
    runner = runners()
    async with gate(tmp_path) as g:
        _up(g, runner)
        run, token = await g.ran(runner)
        await g.engine.flush()
    runner.tick(token, *range(500))
    runner.die(None)
    async with gate(tmp_path, adopting=[runner]) as g:
        runner.die(g.engine, signal="SIGKILL")
        await g.drained(runner)
        assert await g.ticks(run) == list(range(500))
        assert (await g.names(run))[-1] == "stream.end"


async def test_a_pipe_cut_inside_a_frame_is_found_again(tmp_path: Path, runners: Any) -> None:
    """The predecessor was killed inside its one consuming read."""
    import os

    runner = runners()
    async with gate(tmp_path) as g:
        _up(g, runner)
        run, token = await g.ran(runner)
        await g.engine.flush()
        await g.until(lambda: run.tail == 1)
    runner.tick(token, 1)
    async with gate(tmp_path, adopting=[runner]) as g:  # stores the tick
        await g.until(lambda: g.engine.book.runs[run.no].tail == 2)
        await g.engine.flush()
    half = runner.frame(Event(token="stored before", type="tick", data=b"{}"))
    runner.seq -= 1
    os.write(runner.events, half[len(half) // 2 :])
    async with gate(tmp_path, adopting=[runner]) as g:
        runner.tick(token, 2)
        runner.finish(token)
        await g.ended(run)
        assert await g.ticks(run) == [1, 2]
        assert not g.of(Kill)


async def test_an_order_that_was_never_sent_is_sent_by_the_successor(
    tmp_path: Path, runners: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runners()
    async with _doomed(tmp_path, "_act", monkeypatch) as (g, armed, dead):
        _up(g, runner)
        await g.until(lambda: g.engine.book.runners["r1"].session.seq == 1)
        await g.engine.flush()
        armed.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(g.engine.submit, submission())
            with trio.fail_after(20):
                await dead.wait()
            nursery.cancel_scope.cancel()
    assert not runner.orders()
    async with gate(tmp_path, adopting=[runner]) as g:
        token = await runner.started()
        (run,) = g.engine.book.runs.values()
        runner.finish(token)
        assert (await g.ended(run)).attempt == 1


async def test_runs_of_a_tree_that_died_are_performed_again(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        run, token = await g.ran(_up(g, runners("old")))
        await g.engine.flush()
    async with gate(tmp_path) as g:
        runner = _up(g, runners("new"))
        again = await runner.started()
        assert again != token
        runner.finish(again)
        row = await g.ended(run)
        assert (row.status, row.counted, row.attempt) == (RunStatus.SUCCESSFUL, 1, 2)
        assert await g.names(run) == ["run.started", "run.retrying", "run.started", "stream.end"]


async def test_plain_output_of_an_adopted_runner_still_belongs_to_its_attempt(
    tmp_path: Path, runners: Any
) -> None:
    """The marker that told whose plain lines are was read by the predecessor."""
    runner = runners()
    async with gate(tmp_path) as g:
        _up(g, runner)
        run, token = await g.ran(runner)
        runner.print(f"\x1eB{token}\x1f\nbefore\n")
        await g.until(lambda: run.lines == 1)
        await g.engine.flush()
    async with gate(tmp_path, adopting=[runner]) as g:
        runner.print("after\n")
        runner.finish(token)
        await g.ended(run)
        assert await g.lines(run) == ["before", "after"]


async def test_an_orphan_reads_its_pipes_to_the_end(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        runner = _up(g, runners())
        run, token = await g.ran(runner)
        runner.tick(token, *range(300))
        runner.die(None)
        with trio.fail_after(10):
            await g.engine.until_quiet(5.0)
        assert await g.ticks(run) == list(range(300))


async def test_an_idle_engine_sleeps(tmp_path: Path, runners: Any) -> None:
    async with gate(tmp_path) as g:
        _up(g, runners())
        await g.submit(pool="shared")  # nobody performs it
        await g.engine.flush()
        rounds = g.engine.rounds
        with trio.move_on_after(0.3):
            await trio.sleep_forever()
        assert g.engine.rounds - rounds <= 1
        assert Drained(runner="r1") not in g.told


def test_the_settings_of_these_tests_have_the_pools_they_name() -> None:
    assert set(SETTINGS.all_pools) == {"default", "shared"}


# --- tasks that keep crashing


async def test_a_tripped_task_is_noted_and_tried_without_being_asked(tmp_path: Path, runners: Any) -> None:
    breaker = BreakerSettings(crashes=1, pause=0.3)
    async with gate(tmp_path, settings=SETTINGS.replace(breaker=breaker)) as g:
        await g.engine.flush()
        assert g.of(Notes) == [Notes(notes=[])], "the supervisor may know of an older gateway's"
        victim = _up(g, runners())
        run, _ = await g.ran(victim)
        waiting = await g.submit()
        free = _up(g, runners("r2"))
        victim.die(g.engine, signal="SIGSEGV", detail="it died of SIGSEGV")
        assert (await g.ended(run)).status is RunStatus.FAILED
        await g.until(lambda: len(g.of(Notes)) > 1)
        (note,) = g.of(Notes)[-1].notes
        assert "task t.f is held back" in note
        (held,) = g.engine.statistics()["held"]
        assert held["task"] == "t.f"
        token = await free.started()  # nobody has woken the engine: the pause is over
        free.finish(token)
        assert (await g.ended(waiting)).status is RunStatus.SUCCESSFUL
        await g.until(lambda: g.of(Notes)[-1].notes == [])


async def test_an_operator_resets_a_task_and_ends_runners(tmp_path: Path, runners: Any) -> None:
    breaker = BreakerSettings(crashes=1, pause=60.0)
    async with gate(tmp_path, settings=SETTINGS.replace(breaker=breaker)) as g:
        victim = _up(g, runners())
        run, _ = await g.ran(victim)
        victim.die(g.engine)
        await g.ended(run)
        waiting, free = await g.submit(), _up(g, runners("r2"))
        assert await g.engine.reset_task("t.f")
        assert not await g.engine.reset_task("t.f")
        await free.started()
        await g.until(lambda: waiting.status is RunStatus.RUNNING)
        assert await g.engine.end_runner("r2", now=True)
        assert not await g.engine.end_runner("nobody", now=True)
        await g.until(lambda: Kill(runner="r2", kind="operator") in g.told)
        other = _up(g, runners("r3"))
        assert await g.engine.end_runner("r3", now=False)
        await other.ordered(Retire)


# --- tickets and revocations


def _ticket(id: str = "t") -> Ticket:
    return Ticket(id, _claims(), valid_until=2e9)


def _claims(id: str = "j") -> Claims:
    return Claims("ann", 2e9, id, frozenset({"read"}), "*", (), 100.0)


async def test_of_two_requests_in_one_round_one_uses_the_ticket(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        won: list[bool] = []

        async def ask() -> None:
            won.append(await g.engine.redeem(_ticket()))

        rounds = g.engine.rounds
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
        assert sorted(won) == [False, False, False, False, True]
        assert g.engine.rounds == rounds + 1
        assert g.engine.is_used(_ticket())


async def test_a_used_ticket_and_a_revocation_outlive_the_gateway(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        assert await g.engine.redeem(_ticket())
        await g.engine.revoke(Revocation("jti", "j", 200.0))
        # Nothing of this gateway is asked again: what counts was on disk when the calls returned.
        with closing(sqlite3.connect(tmp_path / "store.sqlite3")) as other:
            assert other.execute("SELECT id FROM ticket").fetchall() == [("t",)]
            assert other.execute("SELECT kind, name FROM revocation").fetchall() == [("jti", "j")]
    async with gate(tmp_path) as g:
        assert not await g.engine.redeem(_ticket())
        assert g.engine.is_revoked(_claims())
        assert not g.engine.is_revoked(_claims("k"))


async def test_a_store_that_takes_nothing_uses_up_no_ticket(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        g.engine.store_error = "no space left on device"
        with pytest.raises(NotWritable):
            await g.engine.redeem(_ticket())
        with pytest.raises(NotWritable):
            await g.engine.revoke(Revocation("jti", "j", 200.0))
        g.engine.store_error = ""
        assert not g.engine.is_revoked(_claims())
        assert await g.engine.redeem(_ticket())
