"""Pools stay full; what fails is tried later and later. No process is real here, so time may jump."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from supervisor.child import Child
from supervisor.config import Config
from supervisor.policy import RestartPolicy
from supervisor.pools import INTAKE, Pool, Pools, pools_of
from supervisor.runners import Ends, Runner, Runners
from supervisor.zygote_client import ForkError
from taskkit.lifecycle import ProcessEvent, ProcessState
from taskkit.settings import PoolSettings, Settings
from taskkit.wire.messages import Cause, Exited, RunnerSpec

#: Every test asks for `autojump_clock` itself: pytest-trio overlooks a clock that only a fixture asks for.
Clock = trio.testing.MockClock


class World:
    """Runners without processes, made by a zygote that can be out of order.

    Attributes:
      failure: what the next fork raises.
      delay: seconds a fork takes.
      state: what a new runner is in.
      orders: (time, number of runners) of every fork.
    """

    def __init__(self, nursery: trio.Nursery, tmp_path: Path, pools: Sequence[Pool]) -> None:
        self.failure: Exception | None = None
        self.delay = 0.01
        self.state = ProcessState.RUNNING
        self.orders: list[tuple[float, int]] = []
        self.runners = Runners(
            Config(settings_module="none"), Settings(), tmp_path, nursery, lambda _: None, lambda _: None
        )
        self.pools = Pools(pools, self.runners, nursery, fork=self.fork, on_made=lambda: self.pools.look())
        self._nursery = nursery

    async def fork(self, specs: Sequence[RunnerSpec]) -> None:
        self.orders.append((trio.current_time(), len(specs)))
        await trio.sleep(self.delay)
        if self.failure is not None:
            raise self.failure
        for spec in specs:
            child = Child(spec.id, 0, -1)
            child.state = self.state
            self.runners.all[spec.id] = Runner(spec, child, cast("Ends", None), 0.0)

    async def run(self) -> None:
        await self._nursery.start(self.pools.run)

    def living(self, pool: str = "default") -> list[Runner]:
        return self.runners.living(pool)

    def die(self, runner: Runner) -> None:
        runner.exited = Exited(runner=runner.spec.id, cause=Cause(kind="signal"))
        self.pools.look()


@pytest.fixture
def pool() -> Pool:
    return Pool("default", PoolSettings(runners=6, standby=2), RestartPolicy(intensity=None))


@pytest.fixture
async def world(autojump_clock: Clock, tmp_path: Path, pool: Pool) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery, tmp_path, [pool])
        nursery.cancel_scope.cancel()


async def test_started_means_full(world: World, autojump_clock: Clock) -> None:
    await world.run()
    assert len(world.living()) == 6
    assert [number for _, number in world.orders] == [4, 2], "four by one order"


async def test_started_waits_for_the_hello_of_each(world: World, autojump_clock: Clock) -> None:
    world.state = ProcessState.STARTING
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.run)
        await trio.sleep(60)
        assert len(world.living()) == 6
        assert len(nursery.child_tasks) == 1, "not started yet"
        for runner in world.living():
            runner.child.happen(ProcessEvent.READY)
        world.pools.look()


async def test_a_dead_runner_is_replaced(world: World, autojump_clock: Clock) -> None:
    await world.run()
    world.die(world.living()[0])
    await trio.sleep(1)
    assert len(world.living()) == 6


async def test_runners_at_work_leave_their_standby_ready(world: World, autojump_clock: Clock) -> None:
    await world.run()
    for runner in world.living():
        runner.retired = True
    world.pools.look()
    await trio.sleep(1)
    fresh = [runner for runner in world.living() if not runner.retired]
    assert (len(world.living()), len(fresh)) == (8, 2)


async def test_births_under_way_are_not_ordered_twice(world: World, autojump_clock: Clock) -> None:
    await world.run()
    world.orders.clear()
    world.delay = 3.0
    world.die(world.living()[0])
    for _ in range(10):
        await trio.sleep(0.1)
        world.pools.look()
    assert [number for _, number in world.orders] == [1]


@pytest.mark.parametrize("failure", [ForkError("the zygote is gone"), OSError(24, "too many open files")])
async def test_failures_are_repeated_later_and_later(
    world: World, autojump_clock: Clock, failure: Exception
) -> None:
    await world.run()
    world.orders.clear()
    world.failure = failure
    world.die(world.living()[0])
    await trio.sleep(20)
    waits = [
        later - at - world.delay for (at, _), (later, _) in zip(world.orders, world.orders[1:], strict=False)
    ]
    assert len(waits) >= 6
    for number, wait in enumerate(waits):
        assert 0.75 * 0.1 * 2**number <= wait <= 0.1 * 2**number + 1e-6
    world.failure = None
    await trio.sleep(30)
    assert len(world.living()) == 6


async def test_one_failure_long_after_others_costs_no_more_than_the_first(
    world: World, autojump_clock: Clock
) -> None:
    await world.run()
    for _ in range(12):  # as if a zygote had been lost once an hour
        await trio.sleep(3600)
        world.failure = ForkError("the zygote is gone")
        world.die(world.living()[0])
        await trio.sleep(0.05)
        world.failure = None
        await trio.sleep(0.5)
        assert len(world.living()) == 6


async def test_a_runner_that_dies_unused_is_replaced_later(world: World, autojump_clock: Clock) -> None:
    await world.run()
    victim = world.living()[0]
    world.orders.clear()
    now = trio.current_time()
    world.die(victim)
    world.pools.died_idle(victim)
    await trio.sleep(1)
    ((at, number),) = world.orders
    assert number == 1
    assert 0.075 <= at - now <= 0.11


async def test_runners_that_always_die_unused_do_not_loop(world: World, autojump_clock: Clock) -> None:
    await world.run()
    world.orders.clear()
    began = trio.current_time()
    while trio.current_time() < began + 60:
        for runner in world.living():
            world.die(runner)
            world.pools.died_idle(runner)
        await trio.sleep(0.2)
    assert len(world.orders) < 40


async def test_a_pool_without_a_runner_is_noted_until_one_serves(world: World, autojump_clock: Clock) -> None:
    await world.run()
    for runner in world.living():
        world.die(runner)
        world.pools.died_idle(runner)
    (note,) = world.pools.notes()
    assert "pool default: no runner comes up" in note
    await trio.sleep(5)
    assert list(world.pools.notes()) == []


async def test_after_stop_nobody_is_made(world: World, autojump_clock: Clock) -> None:
    await world.run()
    world.pools.stop()
    world.orders.clear()
    for runner in world.living():
        world.die(runner)
    await trio.sleep(10)
    assert world.orders == []


async def test_one_pools_trouble_is_not_anothers(autojump_clock: Clock, tmp_path: Path) -> None:
    settings = PoolSettings(runners=2, standby=0)
    async with trio.open_nursery() as nursery:
        world = World(
            nursery,
            tmp_path,
            [Pool(name, settings, RestartPolicy(intensity=None)) for name in ("default", "other")],
        )
        await world.run()
        sick = world.living("default")[0]
        world.die(sick)
        for _ in range(8):
            world.pools.died_idle(sick)
        world.die(world.living("other")[0])
        await trio.sleep(0.05)
        assert (len(world.living("default")), len(world.living("other"))) == (1, 2)
        nursery.cancel_scope.cancel()


# --- which pools there are -------------------------------------------------------------------------------------


def test_there_is_always_a_default_and_an_intake() -> None:
    pools = {pool.name: pool.settings for pool in pools_of(Settings())}
    assert set(pools) == {"default", INTAKE}
    assert (pools[INTAKE].size, pools[INTAKE].runs, pools[INTAKE].nice) == (1, 1000, 0)


def test_named_pools_stand_beside_the_default() -> None:
    pools = pools_of(Settings(pools={"heavy": PoolSettings(runners=1)}, intake_runners=0))
    assert [pool.name for pool in pools] == ["default", "heavy"]


@pytest.mark.parametrize(("starts", "intake"), [(("fork", "spawn"), "fork"), (("spawn", "spawn"), "spawn")])
def test_intake_is_forked_if_anybody_is(starts: tuple[str, str], intake: str) -> None:
    default, heavy = (PoolSettings(start="fork" if start == "fork" else "spawn") for start in starts)
    pools = {
        pool.name: pool.settings for pool in pools_of(Settings(pools={"default": default, "heavy": heavy}))
    }
    assert pools[INTAKE].start == intake


def test_a_pool_never_gives_up() -> None:
    for pool in pools_of(Settings()):
        assert None not in [pool.policy.died(0.0) for _ in range(100)]
