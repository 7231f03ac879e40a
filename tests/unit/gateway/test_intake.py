"""Rows of model tasks, saved by runners that are played by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from gateway.submission import Submission
from taskkit.errors import InvalidArguments, NotWritable, QueueFull
from taskkit.wire.messages import Create, Created, Kill, Row, Submit, TaskFailure
from tests.unit.gateway.gate import ROW_TASK, SETTINGS, Gate, HandRunner, gate, submission

SAVED = Row(app="t", model="Row", pk=7)


@pytest.fixture
def runner() -> Iterator[HandRunner]:
    made = HandRunner("i1", role="intake", pool="intake", runs=3)
    yield made
    made.close()


def _asked(**changes: Any) -> Submission:
    return submission(task=ROW_TASK, args=b"[]", **changes)


async def _create(g: Gate, results: list[Any], fields: dict[str, Any] | None = None) -> None:
    try:
        results.append(await g.engine.create_row(_asked(), fields or {}))
    except Exception as error:
        results.append(error)


async def _idle(g: Gate, runner: HandRunner) -> None:
    runner.up(g.engine)
    runner.hello()
    await g.until(lambda: g.engine.book.runners[runner.spec.id].session.seq)


async def test_a_row_is_saved_by_a_runner(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        results: list[Any] = []
        nursery.start_soon(_create, g, results, {"message": "hi"})
        order = await runner.ordered(Create)
        assert (order.task, order.fields) == ("t.Row", {"message": "hi"})
        runner.say(Created(ask=order.ask, row=SAVED))
        await g.until(lambda: results)
        assert [made.row for made in results] == [SAVED]


async def test_what_is_wrong_is_named_by_field(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        results: list[Any] = []
        nursery.start_soon(_create, g, results)
        order = await runner.ordered(Create)
        runner.say(Created(ask=order.ask, errors={"message": "too long"}))
        await g.until(lambda: results)
        (error,) = results
        assert isinstance(error, InvalidArguments)
        assert error.errors == {"message": "too long"}


async def test_a_database_that_is_away_is_nobodys_fault(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        results: list[Any] = []
        nursery.start_soon(_create, g, results)
        order = await runner.ordered(Create)
        failure = TaskFailure(exception="taskkit.errors.NotWritable", message="the database is locked")
        runner.say(Created(ask=order.ask, failure=failure))
        await g.until(lambda: results)
        (error,) = results
        assert isinstance(error, NotWritable)
        assert "the database is locked" in str(error)
        assert error.retry_after


async def test_one_runner_saves_one_row_at_a_time(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        results: list[Any] = []
        for _ in range(3):
            nursery.start_soon(_create, g, results)
        for number in (1, 2, 3):
            order = await runner.ordered(Create, number)
            await g.engine.flush()
            assert len([order for order in runner.orders() if isinstance(order, Create)]) == number
            runner.say(Created(ask=order.ask, row=SAVED))
        await g.until(lambda: len(results) == 3)
        assert g.engine.book.runners["i1"].seat.left == 0, "its life is over"


async def test_a_runner_that_dies_over_a_row_is_told_at_once(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        results: list[Any] = []
        nursery.start_soon(_create, g, results)
        await runner.ordered(Create)
        runner.die(g.engine, signal="SIGSEGV")
        with trio.fail_after(3):
            await g.until(lambda: results)
        assert "died over this one" in str(results[0])


async def test_an_answer_that_came_before_the_death_counts(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        results: list[Any] = []
        nursery.start_soon(_create, g, results)
        order = await runner.ordered(Create)
        runner.say(Created(ask=order.ask, row=SAVED))
        runner.die(g.engine, "exit")
        await g.until(lambda: results)
        assert [made.row for made in results] == [SAVED]


async def test_a_runner_that_hangs_is_killed_and_its_late_answer_dropped(
    tmp_path: Path, runner: HandRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.intake._SECONDS", 0.2)
    async with gate(tmp_path) as g:
        await _idle(g, runner)
        with pytest.raises(NotWritable, match="took longer"):
            await g.engine.create_row(_asked(), {})
        assert [(kill.runner, kill.kind) for kill in g.of(Kill)] == [("i1", "timeout")]
        order = await runner.ordered(Create)
        runner.say(Created(ask=order.ask, row=SAVED))
        await g.until(lambda: g.engine.book.runners["i1"].session.seq == 2)
        await g.engine.flush()
        assert g.engine.intake._answers == {}


async def test_without_a_runner_the_client_is_told_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.intake._SECONDS", 0.1)
    async with gate(tmp_path) as g:
        with pytest.raises(NotWritable, match="no process is free") as caught:
            await g.engine.create_row(_asked(), {})
        assert caught.value.retry_after


async def test_a_runner_that_does_not_take_the_order_is_passed_over(
    tmp_path: Path, runner: HandRunner
) -> None:
    other = HandRunner("i2", role="intake", pool="intake", runs=3)
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        runner.die(None)  # the gateway has not heard of it yet
        await _idle(g, other)
        results: list[Any] = []
        nursery.start_soon(_create, g, results)
        order = await other.ordered(Create)
        other.say(Created(ask=order.ask, row=SAVED))
        await g.until(lambda: results)
        assert [made.row for made in results] == [SAVED]
    other.close()


async def test_a_client_that_leaves_frees_the_runner(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g:
        await _idle(g, runner)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_create, g, [])
            await runner.ordered(Create)
            nursery.cancel_scope.cancel()
        assert g.engine.intake._busy == {}


async def test_the_order_has_all_that_the_outbox_needs(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        await _idle(g, runner)
        asked = _asked(priority=3, tags=("a",), metadata=b'{"b":1}', key="k", digest=b"\xff", timeout=9.0)
        nursery.start_soon(g.engine.create_row, asked, {})
        order = await runner.ordered(Create)
        assert order.submission == Submit(
            id=asked.id,
            task="t.Row",
            pool="default",
            priority=3,
            timeout=9.0,
            max_attempts=1,
            metadata={"b": 1},
            tags=["a"],
            subject="ann",
            key="k",
            digest=b"\xff",
            fence=order.submission.fence,
        )
        runner.say(Created(ask=order.ask, row=SAVED, run=asked.id))


async def test_no_row_is_saved_that_could_not_become_a_run(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g:
        await _idle(g, runner)
        g.engine.store_error = "the store does not answer: database or disk is full"
        with pytest.raises(NotWritable, match="disk is full") as away:
            await g.engine.create_row(_asked(), {})
        g.engine.store_error = ""
        limits = msgspec.structs.replace(SETTINGS.limits, queued_runs=0)
        g.engine.settings = msgspec.structs.replace(SETTINGS, limits=limits)
        with pytest.raises(QueueFull) as full:
            await g.engine.create_row(_asked(), {})
        assert away.value.retry_after
        assert full.value.retry_after
        assert not [order for order in runner.orders() if isinstance(order, Create)]


@pytest.mark.parametrize(("node", "refused"), [("here", False), ("", False), ("there", True)])
async def test_the_row_is_this_nodes_from_its_first_moment(
    tmp_path: Path, runner: HandRunner, node: str, refused: bool
) -> None:
    async with gate(tmp_path) as g, trio.open_nursery() as nursery:
        (g.engine.directory / "node").write_text("here\n")
        await _idle(g, runner)
        results: list[Any] = []
        nursery.start_soon(_create, g, results)
        order = await runner.ordered(Create)
        assert order.submission.node == "here"
        assert order.submission.fence
        runner.say(Created(ask=order.ask, row=SAVED, node=node, fence="f"))
        await g.until(lambda: results)
        assert isinstance(results[0], NotWritable) is refused
