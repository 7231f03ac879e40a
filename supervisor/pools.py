"""Keeps every pool as full as it should be."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from supervisor.policy import RestartPolicy
from supervisor.pool import PoolCount, wanted
from supervisor.runners import Runner, Runners
from supervisor.zygote_client import ForkError
from taskkit.lifecycle import ProcessState
from taskkit.settings import PoolSettings, Settings
from taskkit.wire.messages import RunnerSpec

logger = logging.getLogger("bulkhead.supervisor")

#: Pool of the runners that validate and save submitted rows.
INTAKE: Final = "intake"

#: Rows an intake runner saves before it is replaced, as a leak in a project's `save` would add up.
_INTAKE_ROWS: Final = 1_000


@dataclass
class Pool:
    """One pool, with what is on its way. `trouble`: why its last runner did not come up, or died without work."""

    name: str
    settings: PoolSettings
    policy: RestartPolicy
    births: int = 0
    failing: bool = False
    trouble: str = ""


def pools_of(settings: Settings) -> list[Pool]:
    """Return the pools that the settings ask for, intake included."""
    longest = settings.limits.restart_delay_seconds

    def pool_of(name: str, pool: PoolSettings) -> Pool:
        return Pool(name, pool, RestartPolicy(intensity=None, longest_delay=longest))

    pools = [pool_of(name, pool) for name, pool in settings.all_pools.items()]
    if settings.intake_runners:
        forks = any(pool.settings.start == "fork" for pool in pools)
        intake = PoolSettings(
            runners=settings.intake_runners, runs=_INTAKE_ROWS, start="fork" if forks else "spawn", nice=0
        )
        pools.append(pool_of(INTAKE, intake))
    return pools


class Pools:
    """Makes runners whenever one is missing; after failures later and later.

    Args:
      fork: has the zygote fork runners of these specs.
      on_made: told synchronously when runners have been made, or could not be.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        runners: Runners,
        nursery: trio.Nursery,
        *,
        fork: Callable[[Sequence[RunnerSpec]], Awaitable[None]],
        on_made: Callable[[], None],
    ) -> None:
        self._pools = {pool.name: pool for pool in pools}
        self._runners = runners
        self._nursery = nursery
        self._fork = fork
        self._on_made = on_made
        self._changed = trio.Event()
        self._looked = trio.Event()
        self._stopped = False

    def stop(self, stopped: bool = True) -> None:
        """Make no further runner; with False, make them again."""
        self._stopped = stopped
        self.look()

    def use(self, pools: Sequence[Pool]) -> None:
        """Keep these pools from now on; a pool that stays keeps its past."""
        kept: dict[str, Pool] = {}
        for pool in pools:
            kept[pool.name] = self._pools.get(pool.name, pool)
            kept[pool.name].settings = pool.settings
        self._pools = kept
        self.look()

    @property
    def _full(self) -> bool:
        missing = any(
            wanted(pool.settings, self._count(pool)) or pool.births for pool in self._pools.values()
        )
        return not missing and not self._runners.starting

    async def until_full(self) -> None:
        """Return when no runner is missing, and each has said hello; the caller has a deadline."""
        while not self._full:
            await self._looked.wait()

    def look(self) -> None:
        """Something has changed: count again."""
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep the pools full; `started` when they are for the first time, and every runner waits for orders."""
        announced = False
        while True:
            self._changed = trio.Event()
            looked, self._looked = self._looked, trio.Event()
            looked.set()
            if not self._fill() and not self._runners.starting and not announced:
                announced = True
                task_status.started()
            await self._changed.wait()

    def _fill(self) -> int:
        """Order what is missing; return how many runners are still to come."""
        coming = 0
        for pool in () if self._stopped else self._pools.values():
            if self._serves(pool):
                pool.trouble = ""
            number = 0 if pool.failing else wanted(pool.settings, self._count(pool))
            if number:
                pool.births += number
                self._nursery.start_soon(self._make, pool, number)
            coming += pool.births
        return coming

    def _serves(self, pool: Pool) -> bool:
        return any(
            runner.child.state is not ProcessState.STARTING for runner in self._runners.living(pool.name)
        )

    def notes(self) -> Iterator[str]:
        """Yield what an operator has to know: pools in which no runner comes up."""
        for pool in self._pools.values():
            if pool.trouble and not self._serves(pool):
                yield (
                    f"pool {pool.name}: no runner comes up, {pool.policy.restarts} tries within "
                    f"{pool.policy.period:.0f} s; the last: {pool.trouble}"
                )

    def _count(self, pool: Pool) -> PoolCount:
        living = self._runners.living(pool.name)
        retired = sum(runner.retired for runner in living)
        return PoolCount(fresh=len(living) - retired, retired=retired, births=pool.births)

    async def _make(self, pool: Pool, number: int) -> None:
        specs = [
            self._runners.spec(pool.name, pool.settings, intake=pool.name == INTAKE) for _ in range(number)
        ]
        try:
            if pool.settings.start == "spawn":
                for spec in specs:
                    self._runners.spawn(spec)
            else:
                await self._fork(specs)
        except (ForkError, OSError) as error:
            logger.warning("pool %s: no new runner: %s", pool.name, error)
            self._back_off(pool, str(error))
        else:
            # Otherwise failures would add up for good: the ninth lost zygote in a month would cost half a minute.
            pool.policy.ready(trio.current_time())
        finally:
            pool.births -= number
            self._on_made()

    def died_idle(self, runner: Runner) -> None:
        """A runner died before anybody gave it work, so it is not a task's fault: make the next one later."""
        pool = self._pools.get(runner.spec.pool)
        assert runner.exited is not None
        cause = runner.exited.cause
        told = (runner.spec.pool, runner.spec.id, cause.detail, cause.traceback)
        logger.warning("pool %s: runner %s died before it had work: %s\n%s", *told)
        if pool is not None:  # a reload may have removed it
            self._back_off(pool, cause.detail or cause.kind)

    def _back_off(self, pool: Pool, trouble: str) -> None:
        pool.trouble = trouble
        if pool.failing:
            return  # those that die together are one failure; a wait for each would end with the shortest
        delay = pool.policy.died(trio.current_time())
        assert delay is not None, "a pool never gives up"
        pool.failing = True
        self._nursery.start_soon(self._resume, pool, delay)

    async def _resume(self, pool: Pool, delay: float) -> None:
        await trio.sleep(delay)
        pool.failing = False
        self.look()
