"""Rings, positions, wake-ups."""

from __future__ import annotations

import trio
import trio.testing

from gateway import fanout
from gateway.fanout import Hub
from gateway.store.rows import EventRow, OutputRow


def rows(first: int, last: int, size: int = 2) -> list[EventRow]:
    return [EventRow(n, 1, n, 1, "x", b"1" * size, 0.0) for n in range(first, last + 1)]


def line(n: int) -> OutputRow:
    return OutputRow(1, n, 0, 1, "stdout", "x", 0.0)


def offsets(entries: list[fanout.Entry] | None) -> list[int] | None:
    return None if entries is None else [entry.offset for entry in entries]


async def test_what_is_published_is_read_by_position() -> None:
    hub = Hub()
    hub.opened(1, 5)
    with hub.attach(1) as one:
        assert one.tail == 5
        assert one.batch(5) == []
        assert one.batch(3) is None, "older events are in the store"
        hub.publish(1, rows(6, 9))
        assert one.tail == 9
        assert offsets(one.batch(5)) == [6, 7, 8, 9]
        assert offsets(one.batch(8)) == [9]
        assert one.batch(4) is None


async def test_a_batch_is_bounded_unless_its_first_event_is_larger() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        hub.publish(1, rows(1, 5, size=40))
        assert offsets(one.batch(0, 100)) == [1, 2]
        assert offsets(one.batch(0, 10)) == [1]


async def test_the_bytes_are_rendered_once_for_all() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one, hub.attach(1) as two:
        hub.publish(1, rows(1, 1))
        first, second = one.batch(0), two.batch(0)
        assert first is not None
        assert second is not None
        assert first[0].sse is second[0].sse
        assert first[0].sse == b"id: 1\nevent: x\ndata: 11\n\n"


async def test_a_ring_is_bounded_by_events() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        for n in range(1, 2500, 100):
            hub.publish(1, rows(n, n + 99))
        assert hub.statistics()["ring_events"] == fanout.RING_EVENTS
        assert one.batch(1499) is None
        found = one.batch(1500, 10**6)
        assert found is not None
        assert len(found) == 1000


async def test_a_ring_is_bounded_by_bytes() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        hub.publish(1, rows(1, 30, size=60_000))
        assert hub.statistics()["ring_bytes"] <= fanout.RING_BYTES
        hub.publish(1, rows(31, 31, size=2 * 1024 * 1024))
        assert hub.statistics()["ring_events"] == 0
        assert one.tail == 31
        assert one.batch(30) is None, "too large for the ring, so it is read from the store"
        hub.publish(1, rows(32, 33))
        assert offsets(one.batch(31)) == [32, 33]
        assert one.batch(30) is None


async def test_nobody_listens_nothing_is_kept() -> None:
    hub = Hub()
    hub.opened(1, 0)
    hub.publish(1, rows(1, 50))
    assert hub.statistics() == {
        "runs": 1,
        "subscribers": 0,
        "multiplexed": 0,
        "ring_events": 0,
        "ring_bytes": 0,
        "published": 50,
        "riders": 0,
        "fast_deliveries": 0,
        "shortfalls": 0,
    }
    with hub.attach(1) as one:
        hub.publish(1, rows(51, 60))
        assert hub.subscribers(1) == 1
        assert offsets(one.batch(50)) == list(range(51, 61))
    assert hub.subscribers(1) == 0
    assert hub.statistics()["ring_events"] == 0
    hub.ended(1)
    assert hub.statistics()["runs"] == 0


async def test_a_repeated_publish_shows_nothing_twice() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        hub.publish(1, rows(1, 3))
        hub.publish(1, rows(2, 4))
        assert offsets(one.batch(0)) == [1, 2, 3, 4]


async def test_a_hole_empties_the_ring_instead_of_hiding() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        hub.publish(1, rows(1, 3))
        hub.publish(1, rows(6, 7))
        assert one.batch(3) is None
        assert offsets(one.batch(5)) == [6, 7]


async def test_the_end_leaves_the_ring_to_those_who_read() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        hub.publish(1, rows(1, 2))
        hub.ended(1)
        assert one.ended
        assert one.tail is None
        assert offsets(one.batch(0)) == [1, 2]
        assert one.batch(2) == []
    assert hub.statistics()["runs"] == 0


async def test_waiting_wakes_with_a_publish(autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    hub.opened(1, 0)
    woken: list[int] = []

    async def listen(after: int) -> None:
        with hub.attach(1) as one:
            await one.wait(after)
            woken.append(one.tail or 0)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(listen, 0)
            await trio.testing.wait_all_tasks_blocked()
            assert woken == []
            hub.publish(1, rows(1, 1))
    assert woken == [1] * 10


async def test_news_in_between_do_not_get_lost() -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one, trio.fail_after(1):
        hub.publish(1, rows(1, 1))
        await one.wait(0)
        hub.ended(1)
        await one.wait(1)
        await one.wait_end()


async def test_output_wakes_only_those_who_asked(autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    hub.opened(1, 0)
    with hub.attach(1) as one:
        hub.publish_output(1, [line(1), line(2)])
        assert one.lines == 2
        with trio.move_on_after(1) as scope:
            await one.wait(0)
        assert scope.cancelled_caught
        with trio.fail_after(1):
            await one.wait(0, line=1)
        with trio.move_on_after(1) as scope:
            await one.wait(0, line=2)
        assert scope.cancelled_caught


async def test_shutdown_wakes_everybody_and_whoever_comes() -> None:
    hub = Hub()
    hub.opened(1, 0)
    async with trio.open_nursery() as nursery:
        with hub.attach(1) as one, trio.fail_after(1):
            nursery.start_soon(one.wait, 0)
            await trio.testing.wait_all_tasks_blocked()
            hub.end_streams()
            assert one.closing
    with hub.attach(2) as two, trio.fail_after(1):
        assert two.closing
        await two.wait(0)
    assert hub.statistics()["runs"] == 1


async def test_attaching_before_the_run_is_announced() -> None:
    hub = Hub()
    with hub.attach(1) as one:
        assert one.tail is None
        assert one.batch(0) is None
        hub.opened(1, 0)
        assert one.tail == 0
        hub.publish(1, rows(1, 1))
        assert offsets(one.batch(0)) == [1]


def test_publishing_needs_no_event_loop() -> None:
    hub = Hub()
    hub.publish(3, rows(1, 1))
    hub.publish(3, [])
    hub.publish_output(4, [line(1)])
    hub.ended(9)
    hub.ended(3)
    hub.end_streams()
    assert hub.statistics()["runs"] == 0


async def test_an_idle_subscriber_costs_the_same_whatever_is_said() -> None:
    hub = Hub()
    hub.opened(1, 0)
    held = [hub.attach(1) for _ in range(1000)]
    hub.publish(1, rows(1, 900, size=100))
    assert hub.statistics()["ring_events"] == 900, "one ring for a thousand subscribers"
    for one in held:
        with one:
            pass
    assert hub.subscribers(1) == 0


async def test_an_event_without_its_large_value_is_left_to_the_store() -> None:
    hub = Hub()
    hub.opened(1, 0)
    unread = EventRow(3, 1, 3, 1, "x", b"", 0.0, "a-blob")
    with hub.attach(1) as one:
        hub.publish(1, [*rows(1, 2), unread])
        assert one.tail == 3
        assert one.batch(2) is None, "the store fills it in"
        assert one.batch(3) == []
        hub.publish(1, rows(4, 5))
        assert offsets(one.batch(3)) == [4, 5]
        assert one.batch(0) is None
