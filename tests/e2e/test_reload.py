"""Code, gateway, settings are exchanged under load: no stream is dropped, no run fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.site import Site
from tests.e2e.test_takeover import Follower
from tests.helpers import Tree, eventually


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def tree(site: Site) -> Iterator[Tree]:
    with Tree(settings="site_settings", runners=4, env=site.environment) as running:
        yield running


class Submitter(threading.Thread):
    """Submits one short run after the other, and waits for its end; remembers what became of the requests."""

    def __init__(self, tree: Tree, task: str) -> None:
        super().__init__(daemon=True)
        self._client = tree.client()
        self._task = task
        self._enough = threading.Event()
        self.runs: list[str] = []
        self.errors: list[str] = []
        self.start()

    def run(self) -> None:
        while not self._enough.is_set():
            try:
                answer = self._client.post("/api/v1/runs", json={"task": self._task})
            except httpx.TransportError as error:
                self.errors.append(repr(error))
                continue
            if answer.status_code != 202:
                self.errors.append(answer.text)
                continue
            self.runs.append(answer.json()["id"])
            with contextlib.suppress(httpx.TransportError):  # it only keeps the queue short
                self._client.get(f"/api/v1/runs/{self.runs[-1]}/result", headers={"Prefer": "wait=5"})

    def finish(self) -> None:
        self._enough.set()
        self.join(15)
        assert not self.is_alive()


def version_of(tree: Tree) -> str:
    result = tree.wait(tree.submit("shop.version")["id"])["result"]
    assert isinstance(result, str)
    return result


def test_a_reload_under_load_drops_no_stream_and_fails_no_run(tree: Tree, site: Site) -> None:
    runs = [tree.submit("shop.count", n=300, delay=0.01)["id"] for _ in range(3)]
    followers = [Follower(tree, run) for run in runs]
    for follower in followers:
        follower.wait_for(20)
    submitter = Submitter(tree, "shop.version")
    for number in range(2, 5):
        site.write(f"version {number}")
        assert tree.operate("reload", timeout=60).error == ""
        assert version_of(tree) == f"version {number}"
    submitter.finish()
    assert submitter.errors == []
    for follower in followers:
        events = follower.finish(20)
        assert [event.json["step"] for event in events if event.type == "progress"] == list(range(1, 301))
        assert events[-1].json["status"] == "SUCCESSFUL"
        assert {event.json["version"] for event in events if event.type == "progress"} == {"one"}
        assert follower.connections == 1, "its stream was dropped"
    ended = [tree.wait(run) for run in submitter.runs]
    assert {run["status"] for run in ended} == {"SUCCESSFUL"}
    seen = [run["result"] for run in ended]
    assert seen == sorted(seen), "a run was performed by code older than that of the run before"


@pytest.mark.parametrize("how", ["command", "HUP"])
def test_a_broken_import_keeps_the_old_code_and_says_why(tree: Tree, site: Site, how: str) -> None:
    site.break_import()
    if how == "HUP":
        os.kill(tree.pid, signal.SIGHUP)
    else:
        command = [sys.executable, "-m", "supervisor", "reload", "--state-dir", str(tree.state_dir)]
        ended = subprocess.run(
            command, env=tree.environment(), capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 2
        assert "a_module_that_is_missing" in ended.stderr
    eventually(lambda: "a_module_that_is_missing" in "".join(tree.status().notes), 20, "a note that says why")
    assert version_of(tree) == "one"
    site.write("two")
    assert tree.operate("reload", timeout=60).error == ""
    assert tree.status().notes == []
    assert version_of(tree) == "two"


def test_the_old_code_serves_on_after_the_death_of_the_gateway(tree: Tree, site: Site) -> None:
    run = tree.submit("shop.count", n=200, delay=0.01)["id"]
    follower = Follower(tree, run)
    follower.wait_for(20)
    site.write("two")
    assert tree.operate("reload", timeout=60).error == ""
    tree.kill("gateway")  # the next one must not give a run to the old runner, which is busy
    eventually(lambda: tree.child("gateway").state == "RUNNING", 10, "another gateway")
    tree.http.close()  # its connection has died with the gateway
    del tree.http
    assert version_of(tree) == "two"
    events = follower.finish(20)
    assert {event.json["version"] for event in events if event.type == "progress"} == {"one"}
    assert events[-1].json["status"] == "SUCCESSFUL"


def test_changed_settings_come_into_force(tree: Tree, site: Site) -> None:
    run = tree.submit("shop.count", n=200, delay=0.01)["id"]
    follower = Follower(tree, run)
    follower.wait_for(20)
    site.append_settings('TASKKIT["POOLS"] = {"extra": {"runners": 2}}\n')
    site.append_settings('TASKKIT["BIND"] = "127.0.0.1:1"\n')
    status = tree.operate("reload", timeout=60)
    assert status.error == ""
    assert [child.kind for child in status.children].count("runner (extra)") == 2
    # The flag --bind stands over the setting, so nothing of it has changed.
    assert status.notes == []
    answer = tree.http.post("/api/v1/runs", json={"task": "shop.version", "pool": "extra"})
    assert tree.wait(answer.json()["id"])["status"] == "SUCCESSFUL"
    events = follower.finish(20)
    assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
    assert events[-1].json["status"] == "SUCCESSFUL"


def test_wrong_settings_are_refused(tree: Tree, site: Site) -> None:
    site.append_settings('TASKKIT["POOLS"] = {"extra": {"runners": 0}}\n')
    assert "POOLS.extra.runners" in tree.operate("reload", timeout=60).error
    assert version_of(tree) == "one"


def test_a_gateway_restart_under_load_refuses_nobody(tree: Tree, site: Site) -> None:
    runs = [tree.submit("shop.count", n=400, delay=0.01)["id"] for _ in range(4)]
    followers = [Follower(tree, run) for run in runs for _ in range(5)]
    for follower in followers:
        follower.wait_for(20)
    refused: list[str] = []
    enough = threading.Event()

    def connect() -> None:
        """Ask on a connection of its own each time: what a listener that is closed for a moment would refuse."""
        while not enough.is_set():
            try:
                answer = httpx.get(f"{tree.url}/health", timeout=10, trust_env=False)
                if answer.status_code != 200:
                    refused.append(answer.text)
            except httpx.TransportError as error:
                refused.append(repr(error))

    prober = threading.Thread(target=connect, daemon=True)
    prober.start()
    submitter = Submitter(tree, "shop.version")
    for _ in range(3):
        assert tree.operate("restart-gateway", timeout=60).error == ""
    enough.set()
    prober.join(15)
    submitter.finish()
    assert refused == []
    for follower in followers:
        events = follower.finish(30)
        assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
        assert [event.json["step"] for event in events if event.type == "progress"] == list(range(1, 401))
        assert events[-1].json["status"] == "SUCCESSFUL"
    assert {tree.wait(run)["status"] for run in submitter.runs} == {"SUCCESSFUL"}
    lost = [error for error in submitter.errors if "ReadError" not in error and "RemoteProtocol" not in error]
    assert lost == [], "an answer other than a connection that ended while it was idle"
    print(
        f"RECORD gateway restarts: {len(submitter.runs)} submissions, cut {len(submitter.errors)}, refused 0"
    )


def test_a_foreground_tree_ends_with_its_terminal(tmp_path: Path) -> None:
    """The kernel sends the same signal then as people do for a reload."""
    tree = Tree(tmp_path / "state", settings=None, runners=1)
    terminal, other = os.openpty()
    process = subprocess.Popen(
        tree.command(),
        env=tree.environment(),
        preexec_fn=lambda: os.login_tty(other),
    )
    try:
        os.close(other)
        operator = tmp_path / "state" / "control.sock"
        eventually(operator.exists, 30, "a tree that starts")
        os.close(terminal)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
