"""CPU of real processes."""

from __future__ import annotations

import os
import subprocess
import sys

from supervisor.cpu import cpu_of
from tests.helpers import eventually

#: Has a child that uses CPU, and uses none itself.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def test_our_own_is_what_the_kernel_says() -> None:
    times = os.times()
    before = times.user + times.system + times.children_user + times.children_system
    assert cpu_of(os.getpid()) >= before - 0.05


def test_that_of_living_children_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True) as parent:
        try:
            eventually(lambda: cpu_of(parent.pid) > 0.5, 30.0)
        finally:
            os.killpg(parent.pid, 9)


def test_one_that_waits_uses_none_and_one_that_is_gone_has_used_none() -> None:
    with subprocess.Popen(["sleep", "300"]) as child:
        assert cpu_of(child.pid) < 0.5
        child.kill()
    assert cpu_of(child.pid) == 0
