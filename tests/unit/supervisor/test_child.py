"""One child from its birth to the exit status, with real processes that behave and that do not."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import psutil
import pytest
import trio
import trio.testing

from supervisor import child as room
from supervisor.child import Child, Exit, spawn, tree_mark
from taskkit import linux
from taskkit.lifecycle import ProcessState
from tests import helpers
from tests.unit.supervisor.conftest import Start

pytestmark = pytest.mark.usefixtures("leaves_nothing")

Deadline = Callable[[float], AbstractContextManager[trio.CancelScope]]

LEAVES = "ready(); sys.exit(3)"
WAITS = "ready(); signal.pause()"
IGNORES_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready()\nwhile True: signal.pause()"
POLITE = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); ready(); signal.pause()"


async def test_the_exit_code_is_told(start: Start, deadline: Deadline) -> None:
    child = await start(LEAVES)
    with deadline(10):
        left = await child.wait()
    assert os.waitstatus_to_exitcode(left.status) == 3
    assert str(left) == "exit code 3"
    assert child.exit is left
    assert child.state is ProcessState.EXITED


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGRTMIN + 6, f"SIG{signal.SIGRTMIN + 6}"),  # has no name in the signal module
    ],
)
async def test_the_signal_is_told(start: Start, deadline: Deadline, number: int, name: str) -> None:
    child = await start(WAITS)
    os.kill(child.pid, number)
    with deadline(10):
        assert str(await child.wait()) == name


async def test_a_late_word_of_readiness_does_not_count(start: Start, deadline: Deadline) -> None:
    left, told, living = await start(LEAVES), await start(WAITS), await start(WAITS)
    assert living.ready()
    assert not living.ready(), "once"
    told.terminate()
    assert not told.ready()
    with deadline(10):
        await left.wait()
    assert not left.ready()
    assert left.state is ProcessState.EXITED


async def test_memory_and_cpu_are_told(start: Start, deadline: Deadline) -> None:
    child = await start(
        """
        block = bytearray(os.urandom(1 << 20)) * 60
        while time.process_time() < 0.3: pass
        ready()
        """
    )
    with deadline(10):
        left = await child.wait()
    assert 60 << 20 <= left.max_rss < 400 << 20
    assert 0.3 <= left.cpu < 10


async def test_nothing_is_open_but_what_was_given(start: Start, deadline: Deadline) -> None:
    other, end = os.pipe()
    os.set_inheritable(other, True)
    child = await start(
        """
        links = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.lexists(f"/proc/self/fd/{fd}")}
        given = int(sys.argv[1])
        ready()
        assert links.pop(0) == "/dev/null", links
        sys.exit(0 if set(links) <= {1, 2, given} else 1)
        """
    )
    os.close(other)
    os.close(end)
    with deadline(10):
        assert str(await child.wait()) == "exit code 0"


async def test_every_waiter_gets_the_same_answer(start: Start, deadline: Deadline) -> None:
    child = await start(WAITS)
    answers: list[Exit] = []

    async def wait() -> None:
        answers.append(await child.wait())

    with deadline(10):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            child.send_signal(signal.SIGKILL)
    assert len(answers) == 5
    assert len(set(map(id, answers))) == 1


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_cancelled_waiter_hands_over(start: Start, deadline: Deadline, victim: int) -> None:
    child = await start(WAITS)
    scopes = [trio.CancelScope() for _ in range(3)]
    done: list[int] = []

    async def wait(number: int) -> None:
        with scopes[number]:
            await child.wait()
            done.append(number)

    with deadline(10):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
            scopes[victim].cancel()
            await trio.testing.wait_all_tasks_blocked()
            child.send_signal(signal.SIGKILL)
    assert sorted(done) == sorted({0, 1, 2} - {victim})


async def test_waiting_again_answers_at_once(start: Start, deadline: Deadline) -> None:
    child = await start(LEAVES)
    with deadline(10):
        first = await child.wait()
        assert await child.wait() is first


async def test_the_garbage_collector_reaps_nothing(start: Start, deadline: Deadline) -> None:
    child = await start(LEAVES)
    gc.collect()
    with deadline(10):
        assert str(await child.wait()) == "exit code 3"


async def test_a_polite_child_leaves_by_itself(start: Start, deadline: Deadline) -> None:
    child = await start(POLITE)
    with deadline(10):
        assert str(await child.end(8)) == "exit code 7"
    assert child.state is ProcessState.EXITED


async def test_one_that_ignores_term_is_killed_after_its_grace(start: Start, deadline: Deadline) -> None:
    child = await start(IGNORES_TERM)
    began = trio.current_time()
    with deadline(10):
        left = await child.end(0.3)
    assert trio.current_time() - began >= 0.3
    assert str(left) == "SIGKILL"


async def test_without_a_grace_it_is_killed_at_once(start: Start, deadline: Deadline) -> None:
    child = await start(IGNORES_TERM)
    with deadline(5):
        assert str(await child.end(0)) == "SIGKILL"


async def test_a_stopped_child_is_killed_as_well(start: Start, deadline: Deadline) -> None:
    child = await start(WAITS)
    os.kill(child.pid, signal.SIGSTOP)
    helpers.eventually(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    with deadline(5):
        assert str(await child.end(0.1)) == "SIGKILL"


async def test_one_that_is_being_ended_is_stopping(start: Start, deadline: Deadline) -> None:
    child = await start(IGNORES_TERM)
    child.terminate()
    assert child.state is ProcessState.STOPPING
    with deadline(5):
        await child.end(0)


async def test_ending_the_dead_says_how_it_died(start: Start, deadline: Deadline) -> None:
    child = await start(LEAVES)
    with deadline(10):
        left = await child.wait()
        assert await child.end(0) is left
    child.send_signal(signal.SIGKILL)  # to nobody
    child.terminate()


async def test_ending_goes_on_when_nobody_waits_for_it_any_more(start: Start, deadline: Deadline) -> None:
    child = await start(IGNORES_TERM)
    with deadline(10):
        with trio.move_on_after(0.05):
            await child.end(100)
        assert child.exit is None
        assert str(await child.end(0)) == "SIGKILL"


async def grandchild_of(child: Child) -> psutil.Process:
    (found,) = psutil.Process(child.pid).children()
    return found


async def test_what_its_group_left_behind_dies_with_it(start: Start, deadline: Deadline) -> None:
    child = await start('subprocess.Popen(["sleep", "60"]); ready(); signal.pause()', session=True)
    grandchild = await grandchild_of(child)
    assert os.getpgid(grandchild.pid) == child.pid
    assert os.getsid(child.pid) == child.pid
    child.send_signal(signal.SIGTERM)  # to the leader only
    with deadline(10):
        assert str(await child.wait()) == "SIGTERM"
    assert helpers.wait_until_gone([grandchild], 3) == []


async def test_what_imports_user_code_is_marked_with_all_that_it_starts(
    start: Start, deadline: Deadline
) -> None:
    source = 'subprocess.Popen(["sleep", "60"], start_new_session=True); ready(); signal.pause()'
    marked, plain = await start(source, session=True), await start(source)
    daemons = [await grandchild_of(marked), await grandchild_of(plain)]
    found = linux.processes_of_tree(tree_mark())
    assert {marked.pid, daemons[0].pid} <= found
    assert not found & {plain.pid, daemons[1].pid}
    for process in (*daemons, marked, plain):
        os.kill(process.pid, signal.SIGKILL)
    with deadline(10):
        await marked.wait()
        await plain.wait()


async def test_a_child_without_a_group_takes_nobody_along(start: Start, deadline: Deadline) -> None:
    child = await start('subprocess.Popen(["sleep", "60"]); ready(); signal.pause()')
    grandchild = await grandchild_of(child)
    try:
        with deadline(10):
            await child.end(0)
        assert helpers.is_alive(grandchild)
    finally:
        helpers.kill([grandchild])
        helpers.wait_until_gone([grandchild], 3)


async def test_a_program_that_does_not_exist_says_so_by_its_exit(deadline: Deadline) -> None:
    child = spawn("nobody", "no.such.module", [], [], session=False)
    with deadline(10):
        assert str(await child.wait()) == "exit code 1"


def test_no_room_for_a_process_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(OSError):
        spawn("x", "http.server", [], [], session=False)


#: Forks twice; the grandchild dies at once, the child leaves after a while, or reaps it first.
DOUBLE_FORK = """
import os, sys, time
grandchild = os.fork()
if grandchild == 0:
    os._exit(9)
print(grandchild, flush=True)
{then}
time.sleep(0.3)
"""


def born_and_dead(then: str) -> tuple[int, int, subprocess.Popen[str]]:
    """Return pid and pidfd of a dead grandchild that is not ours yet, with the process between."""
    linux.set_subreaper()
    between = subprocess.Popen(
        [sys.executable, "-c", DOUBLE_FORK.format(then=then)], stdout=subprocess.PIPE, text=True
    )
    assert between.stdout is not None
    pid = int(between.stdout.readline())
    return pid, os.pidfd_open(pid), between


async def test_one_that_died_before_it_was_ours_is_waited_for(deadline: Deadline) -> None:
    pid, pidfd, between = born_and_dead("")
    with deadline(10):
        left = await Child("newborn", pid, pidfd).wait()
    assert str(left) == "exit code 9"
    with between:
        pass


async def test_one_that_somebody_else_has_reaped_never_came_up(
    deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_ADOPTION_SECONDS", 0.05)
    pid, pidfd, between = born_and_dead("time.sleep(0.2); os.waitpid(grandchild, 0)")
    with deadline(10):
        left = await Child("newborn", pid, pidfd).wait()
    assert str(left) == "exit code 70"
    with between:
        pass
