"""What an attempt left behind ends with it, daemonised or not; a process plays the runner."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: A subreaper that leaves children behind in one way, then ends them and says what is left.
PROGRAM = """
import os, subprocess, sys, time
from taskkit import linux
from taskkit.runner.leftovers import end_children
linux.set_subreaper()
def sleeper():
    return subprocess.Popen(["sleep", "60"], start_new_session=True)
way = sys.argv[1]
started = 0
if way == "children":
    popen = [sleeper() for _ in range(5)]
    started = 5
elif way == "daemons":
    for _ in range(3):
        if (pid := os.fork()) == 0:
            os.setsid()
            sleeper()
            os._exit(0)
        os.waitpid(pid, 0)
    started = 3
elif way == "tree":
    if os.fork() == 0:
        sleeper(); sleeper(); time.sleep(60)
    (child,) = linux.children()
    while len(open(f"/proc/{child}/task/{child}/children").read().split()) < 2:
        time.sleep(0.001)
    started = 3
elif way == "zombies":
    for _ in range(3):
        if os.fork() == 0:
            os._exit(0)
    time.sleep(0.05)
print(end_children(), len(linux.children()), started)
"""


def left(way: str) -> list[int]:
    """Return [killed, children left, living processes that were started]."""
    command = [sys.executable, "-c", PROGRAM, way]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return [int(word) for word in ended.stdout.split()]


@pytest.mark.parametrize("way", ["children", "daemons", "tree"])
def test_all_of_them_are_killed_and_reaped(way: str) -> None:
    killed, remaining, started = left(way)
    assert (killed, remaining) == (started, 0)


def test_the_dead_are_reaped_uncounted() -> None:
    assert left("zombies") == [0, 0, 0]


def test_nothing_is_nothing() -> None:
    assert left("nothing") == [0, 0, 0]
