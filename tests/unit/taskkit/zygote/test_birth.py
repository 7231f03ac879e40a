"""What a new child does before its own work, each in a child of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers import ROOT


def _child(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with `birth` and the usual modules imported."""
    head = "import os, signal, sys, time\nfrom taskkit.zygote import birth\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | changes,
    )


def _says(code: str, **changes: str) -> list[str]:
    done = _child(code, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_descriptors_of_ours_move_out_of_the_way_and_all_others_are_closed() -> None:
    said = _says("""
        pairs = [os.pipe() for _ in range(4)]
        stray = os.dup(0)
        high = os.dup2(pairs[3][1], 777)
        a, b, c = birth.move_descriptors([pairs[0][1], high, pairs[0][0]])
        os.write(a, b"x")
        open_now = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
        listing = open_now.pop(3) if open_now[3] < 500 else None
        print(min(a, b, c) >= 500, os.read(c, 1) == b"x", open_now == sorted([0, 1, 2, a, b, c]))
        print(os.get_inheritable(a))
    """)
    assert said == ["True", "True", "True", "False"]


def test_signals_are_the_kernels_again() -> None:
    said = _says("""
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        birth.reset_signals()
        left = {s for s in signal.valid_signals() if signal.getsignal(s) not in (signal.SIG_DFL, None)}
        print(left == {signal.SIGPIPE}, signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set())
        print(signal.set_wakeup_fd(-1))
    """)
    assert said == ["True", "True", "-1"]


def test_a_write_to_a_closed_pipe_is_an_exception_and_no_death() -> None:
    done = _child("""
        birth.reset_signals()
        read, write = os.pipe()
        os.close(read)
        try:
            os.write(write, b"x")
        except BrokenPipeError:
            print("told")
    """)
    assert (done.returncode, done.stdout.strip()) == (0, "told")


def test_adoption_is_awaited() -> None:
    """A double fork below a subreaper: the grandchild waits until the middle one has gone."""
    said = _says("""
        from taskkit import linux
        linux.set_subreaper()
        me = os.getpid()
        read, write = os.pipe()
        if (middle := os.fork()) == 0:
            mine = os.getpid()
            if os.fork() == 0:
                birth.await_adoption(mine, me)
                os.write(write, b"adopted" if os.getppid() == me else b"astray")
                os._exit(0)
            time.sleep(0.1)
            os._exit(0)
        os.waitpid(middle, 0)
        print(os.read(read, 20).decode())
        os.wait()
    """)
    assert said == ["adopted"]


def test_a_child_that_somebody_else_adopts_knows_at_once() -> None:
    said = _says("""
        from taskkit import linux
        linux.set_subreaper()
        read, write = os.pipe()
        if (middle := os.fork()) == 0:
            mine = os.getpid()
            if os.fork() == 0:
                started = time.monotonic()
                try:
                    birth.await_adoption(mine, 1 << 22)  # a supervisor that is no more
                except birth.Orphaned:
                    os.write(write, b"orphaned" if time.monotonic() - started < 3 else b"late")
                os._exit(0)
            os._exit(0)
        os.waitpid(middle, 0)
        print(os.read(read, 20).decode())
        os.wait()
    """)
    assert said == ["orphaned"]


def test_a_child_dies_with_its_supervisor() -> None:
    said = _says("""
        from taskkit import linux
        linux.set_subreaper()
        read, write = os.pipe()
        if (boss := os.fork()) == 0:
            if os.fork() == 0:
                birth.die_with(os.getppid(), signal.SIGTERM)
                os.write(write, b"ready")
                time.sleep(30)
                os._exit(0)
            os.read(read, 5)
            os._exit(0)
        os.waitpid(boss, 0)
        pid, status = os.wait()
        print(os.waitstatus_to_exitcode(status))
    """)
    assert said == ["-15"]


def test_a_supervisor_that_is_gone_already_is_noticed() -> None:
    done = _child("birth.die_with(1 << 22, signal.SIGKILL)")
    assert "Orphaned" in done.stderr


def test_siblings_draw_different_numbers() -> None:
    said = _says("""
        import random
        random.seed(1)
        for _ in range(2):
            if (pid := os.fork()) == 0:
                birth.reseed()
                os.write(1, f"{random.random()}\\n".encode())
                os._exit(0)
            os.waitpid(pid, 0)
    """)
    assert len(set(said)) == 2


@pytest.mark.parametrize(("session", "expected"), [(False, ["True", "False"]), (True, ["True", "True"])])
def test_a_child_leads_a_group_or_a_session(session: bool, expected: list[str]) -> None:
    said = _says(f"""
        if (pid := os.fork()) == 0:
            birth.own_group(session={session})
            os.write(1, f"{{os.getpgid(0) == os.getpid()}} {{os.getsid(0) == os.getpid()}}".encode())
            os._exit(0)
        os.waitpid(pid, 0)
    """)
    assert said == expected


def test_a_leader_of_a_session_stays_one() -> None:
    said = _says("""
        if (pid := os.fork()) == 0:
            os.setsid()
            birth.own_group(session=True)
            os.write(1, b"still")
            os._exit(0)
        os.waitpid(pid, 0)
    """)
    assert said == ["still"]


def test_a_process_is_named() -> None:
    said = _child("""
        birth.name_process("bulkhead: runner abc-1 (default)", "bh:runner 1 and much more")
        print(open("/proc/self/comm").read().strip())
        print(open("/proc/self/cmdline").read().rstrip("\\0 "))
    """).stdout.splitlines()
    assert said == ["bh:runner 1 and", "bulkhead: runner abc-1 (default)"]


@pytest.mark.parametrize("changes", [{}, {"PYTHONFAULTHANDLER": "1"}])
def test_a_fatal_signal_leaves_the_stack_behind(changes: dict[str, str]) -> None:
    """Also where the project, or its environment, has enabled the fault handler before."""
    said = _says(
        """
        faults = os.memfd_create("faults")
        if (pid := os.fork()) == 0:
            birth.reset_signals()
            birth.report_faults(faults)
            os.kill(os.getpid(), signal.SIGSEGV)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), "Segmentation" in os.pread(faults, 9999, 0).decode())
    """,
        **changes,
    )
    assert said == ["-11", "True"]


def test_stdin_is_empty() -> None:
    assert _says("birth.no_stdin(); print(repr(sys.stdin.read()), os.read(0, 9))") == ["''", "b''"]


def test_orphans_of_a_subreaper_come_to_it() -> None:
    said = _says("""
        birth.become_subreaper()
        if (middle := os.fork()) == 0:
            if os.fork() == 0:
                time.sleep(0.05)
                os._exit(7)
            os._exit(0)
        os.waitpid(middle, 0)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
    """)
    assert said == ["7"]


def test_a_hidden_process_is_not_dumpable() -> None:
    said = _says("""
        import ctypes
        birth.hide()
        print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
    """)
    assert said == ["0"]
