"""What user code leaves behind is found, killed, reaped; everybody else is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import psutil
import pytest
import trio
import trio.testing

from supervisor import strays as room
from supervisor.strays import Strays
from taskkit import linux
from tests import helpers

Deadline = Callable[[float], AbstractContextManager[trio.CancelScope]]

#: Forks twice, like any daemon; prints the pid of what stays.
DAEMON = """
import os, sys, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode())
        for fd in (0, 1, 2): os.close(fd)
        time.sleep(60)
        os._exit(0)
    os._exit(0)
os.wait()
print(os.read(read, 100).decode())
"""


@pytest.fixture(autouse=True)
def _subreaper(leaves_nothing: None) -> None:
    """Be the parent of orphans, as the supervisor is."""
    linux.set_subreaper()


@pytest.fixture
def meant() -> set[int]:
    """Give the children that this process had before the test: they are meant to live."""
    return linux.children()


def daemon(source: str = DAEMON) -> psutil.Process:
    printed = subprocess.run(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, check=True, timeout=20
    ).stdout
    process = psutil.Process(int(printed))
    assert process.ppid() == os.getpid()
    return process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Give a child that is meant to live."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def gone(pid: int) -> bool:
    return pid not in linux.children()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what only the kernel knows, and tells nobody."""
    while not condition():
        await trio.sleep(0.01)


def test_a_daemon_is_killed_and_then_reaped(meant: set[int]) -> None:
    strays = Strays(lambda: meant, lambda: 0)
    stray = daemon()
    assert strays.sweep() == {stray.pid}
    assert helpers.wait_until_gone([stray], 3) == []
    assert not gone(stray.pid), "a zombie of ours"
    assert strays.sweep() == set()
    assert gone(stray.pid)
    assert strays.killed == 1


def test_one_that_ended_by_itself_is_reaped_and_not_counted(meant: set[int]) -> None:
    strays = Strays(lambda: meant, lambda: 0)
    stray = daemon()
    helpers.kill([stray])
    assert helpers.wait_until_gone([stray], 3) == []
    assert strays.sweep() == set()
    assert gone(stray.pid)
    assert strays.killed == 0


def test_known_children_are_not_touched(meant: set[int], sleeper: subprocess.Popen[bytes]) -> None:
    strays = Strays(lambda: meant | {sleeper.pid}, lambda: 0)
    assert strays.sweep() == set()
    assert sleeper.poll() is None


def test_a_known_child_that_died_is_left_for_whoever_waits_for_it(
    meant: set[int], sleeper: subprocess.Popen[bytes]
) -> None:
    strays = Strays(lambda: meant | {sleeper.pid}, lambda: 0)
    sleeper.kill()
    helpers.wait_until_gone([psutil.Process(sleeper.pid)], 3)
    strays.sweep()
    assert sleeper.wait(5) == -9


async def test_the_death_of_a_runner_is_a_reason_to_look(meant: set[int], deadline: Deadline) -> None:
    strays = Strays(lambda: meant, lambda: 0)
    with deadline(4):  # less than the period between looks without a reason
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strays.run)
            stray = daemon()
            strays.look()
            await until(lambda: gone(stray.pid))
            nursery.cancel_scope.cancel()


async def test_strays_are_found_without_a_reason_as_well(
    meant: set[int], deadline: Deadline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_PERIOD", 0.05)
    strays = Strays(lambda: meant, lambda: 0)
    with deadline(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strays.run)
            stray = daemon()
            await until(lambda: gone(stray.pid))
            nursery.cancel_scope.cancel()


async def test_nobody_is_judged_while_somebody_is_born(meant: set[int], deadline: Deadline) -> None:
    births = 1
    asked = 0

    def under_way() -> int:
        nonlocal asked
        asked += 1
        return births

    strays = Strays(lambda: meant, under_way)
    newborn = daemon()
    with deadline(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strays.run)
            strays.look()
            await until(lambda: asked >= 5)  # it keeps asking, since one look is owed
            assert helpers.is_alive(newborn)
            births = 0
            await until(lambda: gone(newborn.pid))
            nursery.cancel_scope.cancel()


async def test_what_a_stray_had_made_itself_is_found_next(meant: set[int], deadline: Deadline) -> None:
    daemon(DAEMON.replace("time.sleep(60)", "os.fork(); os.fork(); time.sleep(60)"))
    strays = Strays(lambda: meant, lambda: 0)
    with deadline(4):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(strays.run)
            strays.look()
            await until(lambda: not linux.children() - meant)
            nursery.cancel_scope.cancel()
    assert strays.killed >= 1
