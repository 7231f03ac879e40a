"""Every named moment, at which the process that passes it is killed, stopped, or fails."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Final

import psutil
import pytest
import trio

from taskkit import failpoints, linux
from tests import helpers
from tests.chaos.arming import Armed, signal_process, wait_until_stopped
from tests.chaos.scenario import SCHEDULED, Case

#: Seconds after which the test lets a stopped process go on, if nobody else has to deal with it.
STOPPED_SECONDS: Final = 0.6

#: What makes a process pass a moment that ordinary work does not lead to.
TRIGGERS: Final = {
    "gateway.configured": "kill-gateway",
    "gateway.opened": "kill-gateway",
    "gateway.serving": "kill-gateway",
    "gateway.parked": "restart-gateway",
    "reload.ready": "reload",
    "reload.switched": "reload",
}

#: Moments that only what the clock starts comes to.
BY_THE_CLOCK: Final = frozenset({"schedule.due", "schedule.fired", "schedule.committed"})

#: Moments of a new gateway: it has 20 s to serve, so the test lets it go on before it is replaced.
NEWBORN: Final = frozenset({"gateway.configured", "gateway.opened", "gateway.serving"})

#: Where another outcome than the task's own is right, with the endings that an attempt may have then.
#: An `emit` that fails raises in user code, and a task without another attempt has failed.
ELSEWHERE: Final = {
    ("runner.event", "error"): "raised",
    ("runner.blob", "error"): "raised",
}

#: Requests that a moment makes fail: a client asks again.
PATIENT: Final = {
    ("accept.asked", "error"): frozenset({500}),
    ("accept.answered", "error"): frozenset({500}),
}

#: Those of several nodes are in tests/chaos/test_nodes.py.
CASES: Final = [
    (point, action)
    for point in failpoints.POINTS
    if point not in failpoints.SHARED
    for action in failpoints.ACTIONS
]


@pytest.fixture(scope="module")
def armed() -> Iterator[Armed]:
    linux.set_subreaper()
    before = helpers.strays()
    with Armed() as running:
        yield running
        code = running.stop()
    left = helpers.wait_until_only(before, timeout=3.0)
    helpers.reap_children()
    assert code == 0, f"exit code {code}"
    assert not left, "; ".join(map(helpers.describe, left))


def test_every_moment_has_every_action() -> None:
    assert {point for point, _ in CASES} | failpoints.SHARED == failpoints.POINTS.keys()
    assert len(CASES) == (len(failpoints.POINTS) - len(failpoints.SHARED)) * 3
    assert {
        point for point, _ in (*ELSEWHERE, *PATIENT)
    } | TRIGGERS.keys() | NEWBORN | BY_THE_CLOCK <= failpoints.POINTS.keys()


@pytest.mark.parametrize(("point", "action"), CASES)
async def test_nothing_is_lost_at(armed: Armed, point: str, action: str) -> None:
    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        case = Case(armed, nursery, f"{point} {action}", patient=PATIENT.get((point, action), frozenset()))
        armed.arm(point, action)
        if point in TRIGGERS:
            nursery.start_soon(trigger, armed, TRIGGERS[point])
        case.wave()
        if point in BY_THE_CLOCK:
            case.submit(SCHEDULED)
        hit = await passed(case, point)
        acted_at = time.monotonic()
        await recover(armed, point, action, hit)
        recovered_at = time.monotonic()
        await case.be_healthy()
        await case.settle()
        nursery.cancel_scope.cancel()
    print(
        f"{point} {action}: acted {acted_at - began:.2f}, recovered {recovered_at - acted_at:.2f}, "
        f"whole {time.monotonic() - began:.2f}"
    )
    broken = forgiven(case, point, action)
    assert not broken, "\n".join([*broken, "", armed.tree.tail(3000)])


async def passed(case: Case, point: str) -> int:
    """Return the process that has been hit; another wave comes every three seconds until then."""
    for _ in range(4):
        with trio.move_on_after(3.0):
            while not case.armed.acted(point):
                await trio.sleep(0.01)
            return case.armed.acted(point)
        case.wave()
    case.armed.disarm(point)
    raise AssertionError(f"nobody came to {point}:\n{case.armed.tree.tail(3000)}")


async def trigger(armed: Armed, what: str) -> None:
    """Do what leads to the moment; the supervisor may die of it, or fail."""
    if what == "kill-gateway":
        signal_process(armed.pid("gateway"), signal.SIGKILL)
        return
    try:
        await trio.to_thread.run_sync(lambda: armed.tree.operate(what, timeout=15.0), abandon_on_cancel=True)
    except (OSError, AssertionError):
        return


async def recover(armed: Armed, point: str, action: str, hit: int) -> None:
    """Return when whoever was hit has gone, is replaced, or goes on."""
    if action == "stop":
        await trio.to_thread.run_sync(wait_until_stopped, hit)
        role = "gateway" if hit in armed.pids("gateway") else "zygote" if point.startswith("zygote") else ""
        if role and point not in NEWBORN:
            await trio.to_thread.run_sync(gone, hit)
        else:
            await trio.sleep(STOPPED_SECONDS)
            signal_process(hit, signal.SIGCONT)
    elif hit == armed.tree.process.pid:
        with trio.move_on_after(5.0 if action == "kill" else 0.5):
            while armed.tree.process.poll() is None:
                await trio.sleep(0.01)
    await trio.to_thread.run_sync(armed.revive)


def gone(pid: int) -> None:
    """Return when a process that stands still has been ended."""
    helpers.eventually(lambda: not psutil.pid_exists(pid), 15.0, f"the end of {pid}, which stands still")


def forgiven(case: Case, point: str, action: str) -> list[str]:
    """Return the violations, but for outcomes that are right here."""
    found = case.violations()
    ending = ELSEWHERE.get((point, action))
    if ending is None:
        return found
    return [it for it in found if not (it.startswith("outcome:") and f":{ending}" in it)]
