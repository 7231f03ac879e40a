"""The supervisor becomes another image of its program under load: children, pipes, sockets, deadlines are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from taskkit.wire.messages import Status
from tests.e2e.test_takeover import Follower, assert_whole
from tests.helpers import Tree, eventually


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with Tree(settings=None, runners=4) as running:
        yield running


def upgrade(tree: Tree, how: str = "operation") -> Status:
    """Have it upgrade; return the status once everything is of the new image."""
    before = tree.status().uptime
    if how == "signal":
        os.kill(tree.pid, signal.SIGUSR2)
    else:
        with pytest.raises(AssertionError, match="closed the operator socket"):
            tree.operate("upgrade", timeout=60)

    def upgraded() -> Status | None:
        try:
            status = tree.operate("upgraded", timeout=60)
        except (OSError, AssertionError):
            return None
        # Asked by a signal, it may not have begun yet; an image that answered has ended when its socket closed.
        return status if how == "operation" or status.uptime < before else None

    return eventually(upgraded, 30, "the new image")


def connected(tree: Tree) -> None:
    """Let go of connections that the planned restart of the gateway has ended."""
    tree.http.close()
    del tree.http


def test_a_running_task_goes_on_and_its_stream_resumes(tree: Tree) -> None:
    run = tree.submit("demo.count", n=500, delay=0.01)["id"]
    follower = Follower(tree, run)
    follower.wait_for(50)
    runner = next(event.json for event in follower.events if event.type == "run.started")
    pid, descriptors = tree.pid, psutil.Process(tree.pid).num_fds()
    status = upgrade(tree)
    connected(tree)
    assert (status.error, status.pid) == ("", pid)
    assert runner["pid"] in {child.pid for child in status.children}
    assert_whole(follower.finish(30), 500)
    assert follower.connections == 2  # the gateway is of the new image as well
    eventually(
        lambda: psutil.Process(tree.pid).num_fds() <= descriptors,
        5,
        f"no more than {descriptors} descriptors",
    )


def test_the_exit_status_of_a_task_from_before_is_seen(tree: Tree) -> None:
    run = tree.submit("demo.count", n=10_000, delay=0.01)["id"]
    follower = Follower(tree, run)
    follower.wait_for(10)
    runner = next(event.json for event in follower.events if event.type == "run.started")
    upgrade(tree, how="signal")
    connected(tree)
    os.kill(runner["pid"], signal.SIGSEGV)
    events = follower.finish(20)
    cause = events[-1].json["error"]["cause"]
    assert (cause["kind"], cause["signal"]) == ("signal", "SIGSEGV")
    assert cause["max_rss"] > 0
    assert (
        "Segmentation fault" in cause["traceback"]
    )  # what faulthandler wrote into a descriptor that was kept


def test_a_deadline_from_before_still_ends_its_run(tree: Tree) -> None:
    started = time.monotonic()
    body = {"task": "demo.count", "kwargs": {"n": 10_000, "delay": 0.01}, "timeout": 4.0}
    run = tree.http.post("/api/v1/runs", json=body).json()["id"]
    follower = Follower(tree, run)
    follower.wait_for(10)
    upgrade(tree)
    connected(tree)
    events = follower.finish(20)
    assert events[-1].json["error"]["code"] == "timed_out"
    assert time.monotonic() - started >= 4.0


def test_the_command_says_when_all_is_of_the_new_version(tree: Tree) -> None:
    command = [sys.executable, "-m", "supervisor", "upgrade", "--state-dir", str(tree.state_dir)]
    before = tree.status()
    ended = subprocess.run(
        command, env=tree.environment(), capture_output=True, text=True, timeout=90, check=False
    )
    connected(tree)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Upgraded" in ended.stdout
    after = tree.status()
    assert after.pid == before.pid
    for kind in ("gateway", "zygote", "courier"):
        assert pid_of(before, kind) != pid_of(after, kind)
    assert tree.wait(tree.submit("demo.count", n=1, delay=0)["id"])["status"] == "SUCCESSFUL"


def pid_of(status: Status, kind: str) -> int:
    return next(child.pid for child in status.children if child.kind == kind)


def test_one_after_the_other_under_load_loses_nothing(tree: Tree) -> None:
    runs = [tree.submit("demo.count", n=600, delay=0.01)["id"] for _ in range(3)]
    followers = [Follower(tree, run) for run in runs]
    for follower in followers:
        follower.wait_for(20)
    for _ in range(3):
        upgrade(tree)
    connected(tree)
    for follower in followers:
        assert_whole(follower.finish(30), 600)


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    """The installed version is broken: everything stays as it is."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text("")
    with Tree(settings=None, runners=2, env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}) as tree:
        run = tree.submit("demo.count", n=100, delay=0.01)["id"]
        broken.write_text("import sys; sys.modules['supervisor.daemon'] = None")
        status = tree.operate("upgrade", timeout=60)
        assert "does not start" in status.error
        assert tree.wait(run)["status"] == "SUCCESSFUL"
        assert tree.wait(tree.submit("demo.count", n=1, delay=0)["id"])["status"] == "SUCCESSFUL"


def test_a_key_that_cannot_be_read_is_told_before_anything_changes(tree: Tree) -> None:
    key = tree.state_dir / "key"
    kept = key.rename(key.with_name("kept"))
    key.mkdir()
    try:
        assert "KEY_FILE" in tree.operate("upgrade", timeout=60).error
        assert tree.status().state == "RUNNING"
    finally:
        key.rmdir()
        kept.rename(key)
    assert tree.wait(tree.submit("demo.count", n=1, delay=0)["id"])["status"] == "SUCCESSFUL"


def test_a_reload_and_an_upgrade_at_once_do_not_wait_for_each_other(tree: Tree) -> None:
    os.kill(tree.pid, signal.SIGHUP)
    started = time.monotonic()
    upgrade(tree)
    connected(tree)
    assert tree.wait(tree.submit("demo.count", n=1, delay=0)["id"])["status"] == "SUCCESSFUL"
    assert time.monotonic() - started < 15, "they waited until one of them gave up"
    assert tree.status().notes == []
