"""The keeper of zygotes, with zygotes that are played: what becomes of forks while there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import trio
import trio.testing

from supervisor import zygote_keeper as room
from supervisor.child import Child, Exit
from supervisor.config import Config
from supervisor.zygote_client import Zygote
from supervisor.zygote_keeper import ZygoteKeeper
from taskkit.errors import NeverReady
from taskkit.wire.messages import RunnerSpec, ZygoteReady


class PlayedChild:
    """A process that dies when the test says so."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._dead = trio.Event()

    async def wait(self) -> Exit:
        await self._dead.wait()
        return Exit(9, 0, 0.0)

    def die(self) -> None:
        self._dead.set()


class PlayedZygote:
    """A zygote that comes up, or does not."""

    def __init__(self, number: int, *, sound: bool = True, catalogue: str = "one") -> None:
        self.child = PlayedChild(number)
        self.was_spawned = False
        self.births = 0
        self.retired = False
        self.forks = 0
        self._sound = sound
        self._catalogue = catalogue

    async def run(self, *, task_status: trio.TaskStatus[ZygoteReady]) -> None:
        self.was_spawned = True
        await trio.sleep(0.1)  # it imports the project
        if not self._sound:
            raise NeverReady("killed while it imported the project")
        task_status.started(ZygoteReady(settings={}, settings_module=self._catalogue, catalogue=[]))
        await self.child.wait()

    async def fork(
        self, specs: Sequence[RunnerSpec], fds: Sequence[int], *, courier: bool = False, state_dir: str = ""
    ) -> list[tuple[int, int]]:
        self.forks += 1
        return []

    async def retire(self) -> None:
        self.retired = True
        self.child.die()


class World:
    """A keeper whose zygotes come from a list."""

    def __init__(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, *later: PlayedZygote) -> None:
        self.first = PlayedZygote(1)
        self.first.was_spawned = True
        rest = iter(later)
        monkeypatch.setattr(room, "Zygote", lambda config: next(rest))
        ready = ZygoteReady(settings={}, settings_module="first", catalogue=[])
        self.ups = 0
        self.keeper = ZygoteKeeper(
            Config(settings_module="m"), cast("Zygote", self.first), ready, nursery, self._up
        )

    def _up(self) -> None:
        self.ups += 1


async def test_forks_outlive_a_successor_that_fails(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zygote dies, the next one dies while it imports, the one after comes up: who waits must not be forgotten."""
    async with trio.open_nursery() as nursery:
        third = PlayedZygote(3)
        world = World(nursery, monkeypatch, PlayedZygote(2, sound=False), third)
        nursery.start_soon(world.keeper.run)
        await trio.testing.wait_all_tasks_blocked()
        world.first.child.die()
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            await world.keeper.fork([], [])
        assert (world.first.forks, third.forks) == (0, 1)
        assert (world.ups, world.keeper.restarts) == (1, 1)
        nursery.cancel_scope.cancel()


async def test_a_reload_that_is_not_accepted_changes_nothing(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(ready: ZygoteReady) -> None:
        raise NeverReady("it does not fit")

    async with trio.open_nursery() as nursery:
        second = PlayedZygote(2, catalogue="two")
        world = World(nursery, monkeypatch, second)
        nursery.start_soon(world.keeper.run)
        with pytest.raises(NeverReady, match="does not fit"):
            await world.keeper.reload(refuse)
        await trio.testing.wait_all_tasks_blocked()
        assert second.retired
        assert not world.first.retired
        assert world.keeper.ready.settings_module == "first"
        assert world.keeper.pids == {1}
        nursery.cancel_scope.cancel()


async def test_a_reload_that_fits_lets_the_old_one_leave_uncounted(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        second, third = PlayedZygote(2, catalogue="two"), PlayedZygote(3, catalogue="three")
        world = World(nursery, monkeypatch, second, third)
        nursery.start_soon(world.keeper.run)
        await world.keeper.reload(lambda ready: None)
        await trio.testing.wait_all_tasks_blocked()
        assert world.first.retired
        assert (world.keeper.ready.settings_module, world.keeper.restarts) == ("two", 0)
        second.child.die()  # the keeper watches the new one now
        await trio.sleep(5)
        assert (world.keeper.ready.settings_module, world.keeper.restarts) == ("three", 1)
        assert cast("Child", third.child) is world.keeper.child
        nursery.cancel_scope.cancel()
