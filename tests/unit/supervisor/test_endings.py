"""Runners are ended at deadlines and on orders; the first reason is the one that is told."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager

import msgspec
import psutil
import pytest
import trio
import trio.testing

from supervisor.endings import NO_GATEWAY, STALLED, Endings
from supervisor.runners import Runner
from taskkit.wire.messages import Cause, Deadline, Expired
from tests import helpers
from tests.unit.supervisor.conftest import LEAVES, STUBBORN, WAITS, Family

Limit = Callable[[float], AbstractContextManager[trio.CancelScope]]


@pytest.fixture
async def endings(family: Family) -> AsyncIterator[Endings]:
    """Give endings that run; no gateway has come up yet."""
    async with trio.open_nursery() as nursery:
        endings = Endings(family.runners, nursery)
        nursery.start_soon(endings.run)
        yield endings
        nursery.cancel_scope.cancel()


def cause(runner: Runner) -> Cause:
    assert runner.exited is not None
    assert runner.exited.runner == runner.spec.id
    return runner.exited.cause


def order(runner: Runner, after: float, *, kind: str = "timeout", grace: float = 5.0) -> Deadline:
    return Deadline(runner=runner.spec.id, token="t", kind=kind, after=after, grace=grace)


async def test_without_a_grace_it_is_killed(family: Family, endings: Endings) -> None:
    runner = await family.bear(STUBBORN)
    endings.end(runner.spec.id, "operator", 0.0, "by hand")
    told = cause(await family.wait_dead(runner))
    assert (told.kind, told.signal, told.detail) == ("operator", "SIGKILL", "by hand")


async def test_with_a_grace_it_may_leave_of_term(family: Family, endings: Endings) -> None:
    runner = await family.bear(WAITS)
    endings.end(runner.spec.id, "stopped", 8.0)
    told = cause(await family.wait_dead(runner))
    assert (told.kind, told.signal) == ("stopped", "SIGTERM")


@pytest.mark.parametrize("obstacle", ["ignores", "stopped"])
async def test_after_the_grace_it_is_killed(family: Family, endings: Endings, obstacle: str) -> None:
    runner = await family.bear(STUBBORN if obstacle == "ignores" else WAITS)
    if obstacle == "stopped":
        os.kill(runner.child.pid, signal.SIGSTOP)
        helpers.eventually(lambda: psutil.Process(runner.child.pid).status() == psutil.STATUS_STOPPED)
    began = trio.current_time()
    endings.end(runner.spec.id, "cancelled", 0.3)
    told = cause(await family.wait_dead(runner))
    assert (told.kind, told.signal) == ("cancelled", "SIGKILL")
    assert trio.current_time() - began >= 0.3


async def test_the_first_reason_stands_and_the_second_may_hurry(family: Family, endings: Endings) -> None:
    runner = await family.bear(STUBBORN)
    endings.end(runner.spec.id, "timeout", 60.0)
    await trio.testing.wait_all_tasks_blocked()
    endings.end(runner.spec.id, "operator", 0.0, "in a hurry")
    told = cause(await family.wait_dead(runner))
    assert (told.kind, told.signal) == ("timeout", "SIGKILL")
    assert "hurry" not in told.detail


async def test_the_dead_and_the_unknown_cannot_be_ended(family: Family, endings: Endings) -> None:
    runner = await family.bear(LEAVES)
    await family.wait_dead(runner)
    for id in (runner.spec.id, "nobody"):
        endings.end(id, "operator", 0.0)
    assert runner.ordered == ""
    assert (cause(runner).kind, cause(runner).exit_code) == ("exit", 5)


async def test_a_deadline_ends_its_runner(family: Family, endings: Endings) -> None:
    victim, other = await family.bear(WAITS), await family.bear(WAITS)
    endings.resume(NO_GATEWAY)
    endings.arm(order(victim, 0.05))
    endings.arm(order(other, 60))
    assert cause(await family.wait_dead(victim)).kind == "timeout"
    assert other.exited is None


async def test_no_deadline_passes_before_a_gateway_is_up(family: Family, endings: Endings) -> None:
    runner = await family.bear(WAITS)
    endings.arm(order(runner, 0.0))
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert runner.ordered == ""
    endings.resume(NO_GATEWAY)
    assert cause(await family.wait_dead(runner)).kind == "timeout"


async def test_a_pause_stops_a_deadline_that_is_being_waited_for(family: Family, endings: Endings) -> None:
    runner = await family.bear(WAITS)
    endings.resume(NO_GATEWAY)
    endings.arm(order(runner, 0.1))
    await trio.testing.wait_all_tasks_blocked()
    endings.pause(NO_GATEWAY)
    await trio.sleep(0.3)
    assert runner.ordered == ""
    endings.resume(NO_GATEWAY)
    assert cause(await family.wait_dead(runner)).kind == "timeout"


async def test_deadlines_stand_still_until_every_reason_is_gone(family: Family, endings: Endings) -> None:
    runner = await family.bear(WAITS)
    endings.arm(order(runner, 0.05))
    endings.pause(STALLED)
    endings.resume(NO_GATEWAY)
    await trio.sleep(0.2)
    assert runner.ordered == ""
    endings.resume(STALLED)
    assert cause(await family.wait_dead(runner)).kind == "timeout"


async def test_a_deadline_passes_by_the_clock_it_is_given(family: Family) -> None:
    """The machine slept: no timer of the loop has passed, but the deadline has."""
    runner, now = await family.bear(WAITS), [1000.0]
    async with trio.open_nursery() as nursery:
        endings = Endings(family.runners, nursery, clock=lambda: now[0])
        endings.resume(NO_GATEWAY)
        nursery.start_soon(endings.run)
        endings.arm(order(runner, 3600.0))
        await trio.testing.wait_all_tasks_blocked()
        now[0] += 3601.0
        endings.arm(order(runner, 7200.0, kind="cancelled"))  # any change makes it look at the clock
        assert cause(await family.wait_dead(runner)).kind == "timeout"
        nursery.cancel_scope.cancel()


async def test_an_attempt_that_ended_in_time_is_forgotten(family: Family, endings: Endings) -> None:
    early, late = await family.bear(WAITS), await family.bear(WAITS)
    endings.arm(order(early, 0.01))
    endings.arm(order(late, 0.02))
    endings.disarm(early.spec.id, "t")
    endings.resume(NO_GATEWAY)
    await family.wait_dead(late)  # its deadline was the later one
    assert early.ordered == ""


async def test_deadlines_of_nobody_are_ignored(family: Family, endings: Endings) -> None:
    dead = await family.bear(LEAVES)
    await family.wait_dead(dead)
    endings.resume(NO_GATEWAY)
    endings.arm(order(dead, 0.0))
    endings.arm(Deadline(runner="nobody", token="t", kind="timeout", after=0.0, grace=0.0))
    await trio.testing.wait_all_tasks_blocked()
    assert dead.ordered == ""


async def test_the_cause_is_the_kind_of_the_deadline(family: Family, endings: Endings) -> None:
    runner = await family.bear(STUBBORN)
    endings.resume(NO_GATEWAY)
    endings.arm(order(runner, 0.0, kind="cancelled", grace=0.0))
    told = cause(await family.wait_dead(runner))
    assert (told.kind, told.signal) == ("cancelled", "SIGKILL")


async def test_a_deadline_in_a_shared_process_is_told_again_and_again_and_ends_nobody(family: Family) -> None:
    runner, now = await family.bear(WAITS), [1000.0]
    runner.spec = msgspec.structs.replace(runner.spec, concurrency=4)
    told: list[Expired] = []
    async with trio.open_nursery() as nursery:
        endings = Endings(family.runners, nursery, clock=lambda: now[0], on_expired=told.append)
        endings.resume(NO_GATEWAY)
        nursery.start_soon(endings.run)
        endings.arm(order(runner, 60.0, grace=2.0))
        for passed, times in ((59.0, 0), (2.0, 1), (1.0, 1), (1.5, 2)):
            await trio.testing.wait_all_tasks_blocked()
            now[0] += passed
            endings.pause(STALLED)  # any change makes it look at the clock
            endings.resume(STALLED)
            await trio.testing.wait_all_tasks_blocked()
            assert len(told) == times
        assert told == [Expired(runner=runner.spec.id, token="t", kind="timeout")] * 2
        endings.disarm(runner.spec.id, "t")
        now[0] += 100.0
        endings.arm(Deadline(runner=runner.spec.id, token="", kind="abandoned", after=0.0, grace=0.0))
        told_of = cause(await family.wait_dead(runner))
        assert told_of.kind == "abandoned", "without a token it is about the process"
        assert len(told) == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["soft_timeout", "silence"])
async def test_the_gateway_is_told_of_what_ends_nobody(family: Family, kind: str) -> None:
    runner, told = await family.bear(WAITS), list[Expired]()
    async with trio.open_nursery() as nursery:
        endings = Endings(family.runners, nursery, on_expired=told.append)
        endings.resume(NO_GATEWAY)
        endings.arm(order(runner, 0.0, kind=kind, grace=30.0))
        nursery.start_soon(endings.run)
        await trio.testing.wait_all_tasks_blocked()
        assert told == [Expired(runner=runner.spec.id, token="t", kind=kind)]
        assert (runner.ordered, runner.exited) == ("", None)
        nursery.cancel_scope.cancel()


async def test_cpu_is_counted_from_the_order_and_looked_at_no_sooner_than_it_can_be_used_up(
    family: Family,
) -> None:
    runner, now, used = await family.bear(WAITS), [1000.0], [50.0]
    asked: list[float] = []

    def cpu(pid: int) -> float:
        assert pid == runner.child.pid
        asked.append(now[0])
        return used[0]

    async with trio.open_nursery() as nursery:
        endings = Endings(family.runners, nursery, clock=lambda: now[0], cpu=cpu)
        endings.resume(NO_GATEWAY)
        nursery.start_soon(endings.run)
        endings.arm(order(runner, 60.0, kind="cpu_timeout", grace=0.0))
        endings.arm(msgspec.structs.replace(order(runner, 60.0, kind="cpu_timeout"), at_most=True))
        assert len(asked) == 1, "the limit stands for the next gateway"
        for passed, using in ((60.0, 59.0), (100.0, 0.5), (100.0, 0.5)):
            await trio.testing.wait_all_tasks_blocked()
            assert runner.ordered == ""
            now[0] += passed
            used[0] += using
            endings.pause(STALLED)  # any change makes it look at the clock
            endings.resume(STALLED)
        told = cause(await family.wait_dead(runner))
        assert (told.kind, len(asked)) == ("cpu_timeout", 4)
        nursery.cancel_scope.cancel()
