"""Large results on their way to Django: one at a time, each whole, whatever the disk does."""

from __future__ import annotations

from typing import Any, cast

import trio
import trio.testing

from gateway.bulk import Bulk
from gateway.store.protocol import Store, StoreError
from gateway.store.rows import RunRow


class Disk:
    """A store's files; `refusals` is how often it does not answer first."""

    def __init__(self, refusals: int = 0) -> None:
        self.read: list[str] = []
        self.refusals = refusals

    async def blob(self, name: str) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.refusals:
            self.refusals -= 1
            raise StoreError("no")
        self.read.append(name)
        return name.encode()


def run(id: str) -> RunRow:
    made: Any = RunRow.__new__(RunRow)
    made.id, made.result_blob = id, f"blob of {id}"
    return cast("RunRow", made)


async def test_the_next_is_read_when_the_one_before_is_told(autojump_clock: trio.testing.MockClock) -> None:
    disk, told = Disk(), list[tuple[str, bytes]]()
    bulk = Bulk(cast("Store", disk), lambda run, result: told.append((run.id, result)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulk.run)
        for id in ("a", "b"):
            bulk.add(run(id))
        await trio.testing.wait_all_tasks_blocked()
        bulk.told("b")
        bulk.told("somebody else's")
        await trio.testing.wait_all_tasks_blocked()
        assert told == [("a", b"blob of a")]
        assert disk.read == ["blob of a"]
        bulk.told("a")
        await trio.testing.wait_all_tasks_blocked()
        assert [id for id, _ in told] == ["a", "b"]
        bulk.told("b")
        await trio.testing.wait_all_tasks_blocked()
        bulk.told("b")
        bulk.add(run("c"))
        await trio.testing.wait_all_tasks_blocked()
        assert [id for id, _ in told] == ["a", "b", "c"]
        nursery.cancel_scope.cancel()


async def test_a_disk_that_does_not_answer_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    told: list[str] = []
    bulk = Bulk(cast("Store", Disk(refusals=3)), lambda run, result: told.append(run.id))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulk.run)
        bulk.add(run("a"))
        await trio.sleep(10)
        assert told == ["a"]
        nursery.cancel_scope.cancel()
