"""Who watches all runs sees every change of state once it is committed, or hears that some are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from gateway.changes import MAX_WAITING, Changes
from tests.unit.gateway.gate import HandRunner, gate, submission
from tests.unit.gateway.store import samples


@pytest.fixture
def runner() -> Iterator[HandRunner]:
    """Give a runner that is played by hand."""
    made = HandRunner()
    yield made
    made.close()


async def test_each_watcher_takes_everything_once() -> None:
    changes = Changes()
    changes.publish([samples.run(1)])
    assert not changes.watched
    with changes.watch() as first, changes.watch() as second:
        assert changes.watchers == 2
        changes.publish([samples.run(2), samples.run(3)])
        assert [row.no for row in first.take()[0]] == [2, 3]
        changes.publish([samples.run(2)])
        assert [row.no for row in first.take()[0]] == [2]
        assert [row.no for row in second.take()[0]] == [2, 3, 2]
        assert second.take() == ([], False)
    assert not changes.watched


async def test_who_is_too_far_behind_is_told_so() -> None:
    changes = Changes()
    with changes.watch() as watch:
        changes.publish([samples.run(1)] * MAX_WAITING)
        changes.publish([samples.run(2)])
        assert watch.take() == ([], True)
        changes.publish([samples.run(3)])
        assert [row.no for row in watch.take()[0]] == [3]


async def test_waiting_ends_with_a_change(autojump_clock: trio.testing.MockClock) -> None:
    changes = Changes()
    with changes.watch() as watch:
        with trio.move_on_after(5) as scope:
            await watch.wait()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.wait)
            await trio.testing.wait_all_tasks_blocked()
            changes.publish([samples.run(1)])
        await watch.wait()  # it is there still
        assert watch.take()[0]


async def test_every_state_of_a_run_is_published(tmp_path: Path, runner: HandRunner) -> None:
    async with gate(tmp_path) as g:
        with g.engine.changes.watch() as watch:
            runner.up(g.engine)
            runner.hello()
            run, token = await g.ran(runner)
            runner.finish(token)
            await g.ended(run)
            seen = [(row.no, row.status.value, row.attempt) for row in watch.take()[0]]
        assert seen == [(run.no, "READY", 0), (run.no, "RUNNING", 1), (run.no, "SUCCESSFUL", 1)]
        await g.engine.submit(submission())
        assert watch.take() == ([], False)


@pytest.mark.parametrize("number", [1, 3])
async def test_a_picture_does_not_change_any_more(tmp_path: Path, number: int) -> None:
    async with gate(tmp_path) as g:
        with g.engine.changes.watch() as watch:
            for _ in range(number):
                await g.engine.submit(submission())
            rows, _ = watch.take()
            for run in list(g.engine.book.runs.values()):
                await g.engine.cancel(run, 0.0)
            assert [row.status.value for row in rows] == ["READY"] * number
            assert [row.status.value for row in watch.take()[0]] == ["CANCELLED"] * number
