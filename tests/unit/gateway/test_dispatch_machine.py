"""Queues against a plain list, under a wall clock that jumps as it likes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.dispatch import Queues
from gateway.store.rows import RunRow

POOLS, TASKS = ("a", "b"), ("t", "u")


@dataclass
class Waiting:
    """A run that waits; `ripe` once its time has been seen to have come, for good."""

    run: RunRow
    ripe: bool


class Dispatch(RuleBasedStateMachine):
    """Runs that come, leave, are given out and put back; tasks that are held, let go and tried."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = Queues()
        self.now = 1_000_000.0
        self.numbers = 0
        self.waiting: dict[int, Waiting] = {}
        self.out: list[RunRow] = []
        self.held: set[str] = set()

    # --- what happens

    @rule(seconds=st.floats(-100_000, 100_000))
    def jump(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        pool=st.sampled_from(POOLS),
        tasks=st.lists(st.sampled_from(TASKS), min_size=1, max_size=4),
        priority=st.integers(-1, 1),
        delay=st.none() | st.floats(-10, 1000),
        suspect=st.sampled_from([False, False, False, True]),
    )
    def submit(self, pool: str, tasks: list[str], priority: int, delay: float | None, suspect: bool) -> None:
        for task in tasks:
            self.numbers += 1
            run = RunRow(no=self.numbers, id=str(self.numbers), task=task, pool=pool, priority=priority)
            run.suspect = suspect
            self.add(run, delay)

    def add(self, run: RunRow, delay: float | None) -> None:
        run.run_after = None if delay is None else self.now + delay
        self.queues.add(run, self.now)
        ripe = run.run_after is None or run.run_after <= self.now
        self.waiting[run.no] = Waiting(run, ripe)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def say_again(self, data: st.DataObject) -> None:
        self.queues.add(data.draw(st.sampled_from(list(self.waiting.values()))).run, self.now)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), delay=st.none() | st.floats(0, 1000), suspect=st.booleans())
    def put_back(self, data: st.DataObject, delay: float | None, suspect: bool) -> None:
        run = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        run.suspect = suspect
        self.add(run, delay)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        no = data.draw(st.sampled_from(list(self.waiting)))
        self.queues.remove(no)
        del self.waiting[no]

    @rule(task=st.sampled_from(TASKS))
    def hold(self, task: str) -> None:
        self.queues.hold(task)
        self.held.add(task)

    @rule(task=st.sampled_from(TASKS))
    def let_go(self, task: str) -> None:
        self.queues.let_go(task)
        self.held.discard(task)

    # --- what is given out

    def ripen(self) -> None:
        for one in self.waiting.values():
            one.ripe = one.ripe or (one.run.run_after or 0.0) <= self.now

    def ready(self, pool: str) -> list[RunRow]:
        self.ripen()
        found = [one.run for one in self.waiting.values() if one.ripe and one.run.pool == pool]
        return sorted(found, key=lambda run: (-run.priority, run.no))

    def together(self, pool: str) -> list[RunRow]:
        return [run for run in self.ready(pool) if not run.suspect and run.task not in self.held]

    def alone(self, pool: str, trials: Collection[str]) -> list[RunRow]:
        suspects = [run for run in self.ready(pool) if run.suspect and run.task not in self.held]
        tried = [run for run in self.ready(pool) if run.task in self.held and run.task in trials]
        return sorted(suspects + tried, key=lambda run: (-run.priority, run.no))

    def in_sight(self, pool: str, alone: list[RunRow]) -> list[RunRow]:
        """Return those that must be found: a held run may stand behind one of the others, until that is taken."""
        head = next(((-run.priority, run.no) for run in self.together(pool)), (99, 0))
        return [run for run in alone if run.task not in self.held or (-run.priority, run.no) < head]

    @rule(pool=st.sampled_from(POOLS))
    def take(self, pool: str) -> None:
        wanted = self.together(pool)
        run = self.queues.take(pool, self.now)
        assert run is (wanted[0] if wanted else None)
        self.given(run)

    @rule(pool=st.sampled_from(POOLS), trials=st.sets(st.sampled_from(TASKS)))
    def take_alone(self, pool: str, trials: set[str]) -> None:
        allowed = self.alone(pool, trials)
        sure = self.in_sight(pool, allowed)
        run = self.queues.take_alone(pool, self.now, trials)
        assert run is None or any(run is one for one in allowed)
        assert (run is not None) or not sure
        assert run is None or not sure or (-run.priority, run.no) <= (-sure[0].priority, sure[0].no)
        self.given(run)

    def given(self, run: RunRow | None) -> None:
        if run is not None:
            del self.waiting[run.no]
            self.out.append(run)

    @rule(pool=st.sampled_from(POOLS), trials=st.sets(st.sampled_from(TASKS)))
    def waits(self, pool: str, trials: set[str]) -> None:
        allowed, together = self.alone(pool, trials), self.together(pool)
        sure = self.in_sight(pool, allowed)
        found = self.queues.waits_alone(pool, self.now, trials)
        assert bool(sure) <= found <= bool(allowed)
        assert self.queues.waits(pool, self.now, trials) == bool(allowed or together)

    # --- what can be seen

    @invariant()
    def counts(self) -> None:
        assert len(self.queues) == len(self.waiting)
        depths = {pool: sum(one.run.pool == pool for one in self.waiting.values()) for pool in POOLS}
        assert self.queues.depth() == {pool: depth for pool, depth in depths.items() if depth}

    @invariant()
    def wakes_in_time(self) -> None:
        times = [one.run.run_after for one in self.waiting.values() if not one.ripe and one.run.run_after]
        assert self.queues.next_due() == (min(times) if times else None)

    def teardown(self) -> None:
        """Whatever the clock did: at the end of time every run that is not held is given out, once."""
        self.now = 1e12
        for task in TASKS:
            self.let_go(task)
        for pool in POOLS:
            while self.alone(pool, ()):
                self.take_alone(pool, set())
            while self.together(pool):
                self.take(pool)
        assert not self.waiting
        assert len(self.queues) == 0


TestDispatch = Dispatch.TestCase
