"""One wake-up for many runs."""

from __future__ import annotations

import trio
import trio.testing

from gateway.fanout import Hub
from gateway.store.rows import EventRow
from gateway.watching import Watcher


def row(pos: int, run: int, offset: int) -> EventRow:
    return EventRow(pos, run, offset, 1, "x", b"{}", 0.0)


async def test_each_run_is_kept_once_until_it_is_taken() -> None:
    watcher = Watcher()
    for run in (1, 2, 1):
        watcher.touch(run)
    await watcher.wait()
    assert watcher.take() == {1, 2}
    assert watcher.take() == set()


async def test_waiting_ends_with_a_touch_or_another_reason(autojump_clock: trio.testing.MockClock) -> None:
    watcher = Watcher()
    for reason in (lambda: watcher.touch(1), watcher.wake):
        with trio.move_on_after(5) as scope:
            await watcher.wait()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watcher.wait)
            await trio.testing.wait_all_tasks_blocked()
            reason()
        await watcher.wait()  # it is there still
        watcher.take()


def test_a_watcher_hears_of_its_runs_when_all_of_a_round_is_published() -> None:
    hub = Hub(horizon=5)
    with hub.watcher() as watcher, hub.attach(3, watcher=watcher):
        one = hub.attach(1, watcher=watcher)
        hub.publish(1, [row(7, 1, 1)])
        hub.publish(2, [row(6, 2, 1)])
        assert (watcher.take(), hub.horizon) == (set(), 5)
        hub.settled(7)
        assert (watcher.take(), hub.horizon) == ({1}, 7)
        hub.settled(7)
        assert watcher.take() == set(), "once"
        one.close()
        hub.publish(1, [row(8, 1, 2)])
        hub.settled(8)
        assert watcher.take() == set(), "it has left"


def test_only_those_who_follow_the_run_itself_are_its_subscribers() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1, counted=False) as one:
        assert hub.subscribers(1) == 0
        hub.publish(1, [row(1, 1, 1)])
        assert [entry.offset for entry in one.batch(0) or []] == [1], "the ring is kept for it all the same"
        with hub.attach(1):
            assert hub.subscribers(1) == 1
    assert hub.statistics()["ring_events"] == 0
