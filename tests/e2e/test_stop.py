"""The end of a tree: in order, in time, with nothing left; and the next one finds every run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import SseEvent, Tree, describe, eventually, processes_of, socket_files, wait_until_gone


def everything_of(tree: Tree) -> set[psutil.Process]:
    """The supervisor and all below it, now."""
    supervisor = psutil.Process(tree.pid)
    return {supervisor, *supervisor.children(recursive=True)}


def busy(tree: Tree) -> list[str]:
    """Start a burn, a quiet and a count; return their ids once all are running."""
    runs = [
        tree.submit("demo.burn", seconds=60)["id"],
        tree.submit("demo.quiet", seconds=60)["id"],
        tree.submit("demo.count", n=10_000, delay=0.01)["id"],
    ]
    for run in runs:
        eventually(lambda run=run: tree.snapshot(run)["status"] == "RUNNING", 10, f"run {run} at work")
    return runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_in_time(number: signal.Signals, tmp_state_dir: Path) -> None:
    with Tree(tmp_state_dir, settings=None, runners=4) as tree:
        runs = busy(tree)
        processes = everything_of(tree)
        with tree.stream(runs[1]) as quiet, tree.stream(runs[2]) as count:
            first = next(count.events())
            assert first.id == "1"
            started = time.monotonic()
            os.kill(tree.pid, number)
            rest = list(count.events())  # ends properly, or raises
            list(quiet.events())
            code = tree.process.wait(15)
        took = time.monotonic() - started
        assert code == 0, tree.tail()
        assert took < 12, f"stopping took {took:.1f} s"
        # The stream breaks off with a hint when to come back, not with an end: the run goes on later.
        assert quiet.decoder.retries[-1:]
        assert count.decoder.retries[-1:]
        assert all(event.type != "stream.end" for event in rest)
        assert not wait_until_gone(processes, 1.0)
        assert not processes_of(tmp_state_dir)
        assert not [path for path in socket_files() if tmp_state_dir in path.parents]
    with Tree(tmp_state_dir, settings=None, runners=4) as tree:  # the runs were put back, and begin again
        for run in runs:
            snapshot = eventually(
                lambda run=run: (s := tree.snapshot(run))["status"] == "RUNNING" and s, 10, f"run {run} again"
            )
            assert [attempt["ending"] for attempt in snapshot["attempts"]] == ["lost", None]


def test_a_second_signal_waits_for_nobody(tmp_state_dir: Path) -> None:
    with Tree(tmp_state_dir) as tree:
        run = tree.submit("proj.stubborn", seconds=60)["id"]
        eventually(lambda: tree.snapshot(run)["status"] == "RUNNING", 10, "a run at work")
        started = time.monotonic()
        os.kill(tree.pid, signal.SIGINT)
        eventually(lambda: "topping" in tree.tail(), 5, "word of stopping")
        os.kill(tree.pid, signal.SIGINT)
        tree.process.wait(10)
        assert time.monotonic() - started < 6


def test_a_killed_supervisor_takes_its_runners_along_and_loses_no_run(tmp_state_dir: Path) -> None:
    with Tree(tmp_state_dir, settings=None, runners=4) as tree:
        runs = busy(tree)
        waiting = [tree.submit("demo.quiet", seconds=0.1)["id"] for _ in range(3)]
        children = set(psutil.Process(tree.pid).children(recursive=True))
        runners = {process for process in children if "runner" in describe(process)}
        assert runners
        os.kill(tree.pid, signal.SIGKILL)
        tree.process.wait(5)
        assert not wait_until_gone(runners, 0.5), "a runner survives its supervisor"
        left = wait_until_gone(children, 2.0)
        assert not left, (
            "survive their supervisor by two seconds: " + "; ".join(map(describe, left)) + tree.tail(2000)
        )

        port = tree.url.rpartition(":")[2]
        tree.args = ("--bind", f"127.0.0.1:{port}")  # the same address, at once
        started = time.monotonic()
        tree.start()
        assert time.monotonic() - started < 10
        for run in waiting:
            assert tree.wait(run, 10)["status"] == "SUCCESSFUL"
        for run in runs:
            snapshot = eventually(
                lambda run=run: (s := tree.snapshot(run))["status"] == "RUNNING" and s, 10, f"run {run} again"
            )
            assert [attempt["ending"] for attempt in snapshot["attempts"]] == ["lost", None]
            assert snapshot["attempts"][0]["cause"]["kind"] == "lost"


def test_the_supervisor_starts_at_once_beside_a_draining_gateway(tmp_state_dir: Path) -> None:
    """The old gateway still holds the store while the new supervisor begins."""
    with Tree(tmp_state_dir, settings=None, runners=2) as tree:
        run = tree.submit("demo.flood", n=200_000, size=200)["id"]
        eventually(lambda: tree.snapshot(run)["status"] == "RUNNING", 10, "a run at work")
        os.kill(tree.pid, signal.SIGKILL)
        tree.process.wait(5)
        tree.start()
        events: list[SseEvent] = tree.events(run, timeout=60)
        assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
        assert events[-1].json["status"] == "SUCCESSFUL"


DAEMONS = pytest.mark.parametrize("task", ["proj.daemonise", "proj.daemonise_by_fork"])


@DAEMONS
def test_what_tasks_have_started_dies_with_a_killed_supervisor(tmp_state_dir: Path, task: str) -> None:
    """A child of a task, in a session of its own: the kernel does not tell it."""
    with Tree(tmp_state_dir) as tree:
        run = tree.submit(task)["id"]
        with tree.stream(run) as stream:
            events = (event for event in stream.events() if event.type == "daemon")
            daemon = psutil.Process(next(events).json["pid"])
        os.kill(tree.pid, signal.SIGKILL)
        tree.process.wait(5)
        assert not wait_until_gone({daemon}, 2.0), "a task's child survives the supervisor"


@DAEMONS
def test_what_a_run_has_started_dies_with_it(tmp_state_dir: Path, task: str) -> None:
    with Tree(tmp_state_dir) as tree:
        run = tree.submit(task, seconds=0.2)["id"]
        (daemon,) = [event.json["pid"] for event in tree.events(run) if event.type == "daemon"]
        eventually(lambda: not psutil.pid_exists(daemon), 3, "the end of a daemon whose run has ended")
        assert tree.snapshot(run)["status"] == "SUCCESSFUL"


@DAEMONS
def test_what_even_the_gateway_could_not_end_is_ended_by_the_next_start(
    tmp_state_dir: Path, task: str
) -> None:
    with Tree(tmp_state_dir) as tree:
        run = tree.submit(task)["id"]
        with tree.stream(run) as stream:
            events = (event for event in stream.events() if event.type == "daemon")
            daemon = psutil.Process(next(events).json["pid"])
        gateway = tree.child("gateway").pid
        os.kill(tree.pid, signal.SIGSTOP)  # or it would start another gateway
        os.kill(gateway, signal.SIGKILL)
        os.kill(tree.pid, signal.SIGKILL)
        tree.process.wait(5)
        assert daemon.is_running()
        tree.start()
        assert not wait_until_gone({daemon}, 2.0), "it works beside its own second attempt"
