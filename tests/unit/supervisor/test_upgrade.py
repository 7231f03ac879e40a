"""What has to hold before this program becomes another version of itself; none of these tests gets that far."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio
import trio.testing

from supervisor import handover
from supervisor import upgrade as room
from supervisor.handover import HandOver
from supervisor.upgrade import Upgrade
from taskkit.errors import SettingsError
from tests.unit.supervisor.test_handover import COUNT, made


class World:
    """A tree that is asked to upgrade."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, calm: bool = True) -> None:
        self.paused: list[bool] = []
        self.left: list[HandOver] = []
        self.calm = calm
        self.problem: Exception | None = None
        monkeypatch.setattr(handover, "leave", self._leave)
        self.upgrade = Upgrade(pause=self.paused.append, hold=self._hold, check=self._check)

    def _leave(self, held: HandOver) -> OSError:
        self.left.append(held)
        return OSError("no such program")

    def _hold(self) -> HandOver | None:
        return made(list(range(100, 100 + COUNT))) if self.calm else None

    def _check(self) -> None:
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_what_the_kernel_refuses_is_said_and_the_tree_goes_on(world: World) -> None:
    with trio.fail_after(60):
        assert await world.upgrade.run() == "cannot become the installed version: no such program"
    assert len(world.left) == 1
    assert world.paused == [True, False]
    assert not world.upgrade.is_running
    assert world.upgrade.pids == set()


@pytest.mark.parametrize(
    "problem", [SettingsError("KEY_FILE is a folder"), OSError(24, "Too many open files")]
)
async def test_what_the_next_image_could_not_begin_with_is_refused(world: World, problem: Exception) -> None:
    world.problem = problem
    assert str(problem) in await world.upgrade.run()
    assert world.left == []


def _no_descriptor(*_: object, **__: object) -> None:
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize("where", ["spawn", "sealed_memfd"])
async def test_want_of_descriptors_ends_nothing(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room if where == "spawn" else handover.linux, where, _no_descriptor)
    before = set(os.listdir("/proc/self/fd"))
    assert "Too many open files" in await world.upgrade.run()
    assert set(os.listdir("/proc/self/fd")) == before
    assert world.left == []


async def test_a_version_that_does_not_understand_the_hand_over_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Callable[[HandOver], int] = lambda held: handover.linux.sealed_memfd("x", b"\xc1")  # noqa: E731
    monkeypatch.setattr(handover, "written", broken)
    with trio.fail_after(60):
        assert "does not start (exit code 1)" in await world.upgrade.run()
    assert world.left == []


async def test_a_tree_that_does_not_come_to_rest_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(monkeypatch, calm=False)
    assert "did not come to rest" in await world.upgrade.run()
    assert world.paused == [False]


async def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    world = World(monkeypatch, calm=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.upgrade.run)
        await trio.testing.wait_all_tasks_blocked()
        assert await world.upgrade.run() == "an upgrade is under way already"
        nursery.cancel_scope.cancel()
