"""`bulkhead start` and its companions: a tree that is nobody's foreground."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import helpers
from tests.helpers import ROOT, eventually

SETTINGS = "tests.project.settings"

#: Runs its arguments in a shell on a terminal of their own; the terminal goes away while the shell still lives.
TERMINAL = """
import os, pty, shlex, sys
pid, master = pty.fork()
if pid == 0:
    os.execvp("sh", ["sh", "-c", shlex.join(sys.argv[1:]) + "; echo code $?; exec sleep 60"])
said = b""
while b"code " not in said or not said.endswith(b"\\n"):
    said += os.read(master, 1000)
os.close(master)
_, status = os.waitpid(pid, 0)
print(said.decode(), "shell ended by signal", os.WTERMSIG(status))
"""


class Daemon:
    """The command line on one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.flags = ["--settings", SETTINGS, "--state-dir", str(state_dir)]
        database = state_dir / "project.sqlite3"
        shutil.copyfile(helpers.migrated_database(), database)
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("TASKKIT_") and name not in ("DJANGO_SETTINGS_MODULE", "NOTIFY_SOCKET")
        } | {"BULKHEAD_TEST_DB": str(database), "PYTHONPATH": str(ROOT)}

    def command(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "supervisor", name, *self.flags, *arguments]

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *arguments),
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
            cwd=ROOT,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("start", "--bind", "127.0.0.1:0", "--runners", "1", *arguments)

    def status(self) -> dict[str, Any]:
        found = self.run("status", "--json")
        assert found.returncode == 0, found.stderr
        answer: dict[str, Any] = json.loads(found.stdout)
        return answer

    def pid_in_lock(self) -> int:
        return int(json.loads((self.state_dir / "lock").read_text())["pid"])

    def log(self) -> str:
        path = self.state_dir / "bulkhead.log"
        return path.read_text(errors="replace") if path.exists() else ""


@pytest.fixture
def daemon(leaves_nothing: None, tmp_state_dir: Path) -> Iterator[Daemon]:
    """Give a command line without a tree; what runs at the end is killed."""
    daemon = Daemon(tmp_state_dir)
    yield daemon
    left = helpers.processes_of(tmp_state_dir)
    helpers.kill(left)
    helpers.wait_until_gone(left, 5)
    helpers.reap_children()


def test_start_returns_when_ready_and_stop_when_gone(daemon: Daemon) -> None:
    started = daemon.start()
    assert started.returncode == 0, started.stderr + daemon.log()
    status = daemon.status()  # at once: READY is READY
    assert (status["running"], status["state"]) == (True, "RUNNING")
    assert {"gateway", "zygote", "courier"} <= {child["kind"] for child in status["children"]}
    assert status["url"] in started.stdout
    assert status["pid"] == daemon.pid_in_lock()
    assert f"pid {status['pid']}" in started.stdout
    assert str(daemon.state_dir / "bulkhead.log") in started.stdout
    with socket.create_connection(("127.0.0.1", int(status["url"].rpartition(":")[2])), timeout=5):
        pass

    tree = [psutil.Process(status["pid"]), *helpers.descendants(psutil.Process(status["pid"]))]
    stopped = daemon.run("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "Stopped." in stopped.stdout
    assert helpers.wait_until_gone(tree, 0.5) == []
    assert (daemon.state_dir / "lock").read_text().strip() == ""
    assert not [path for path in daemon.state_dir.rglob("*") if path.is_socket()]
    assert daemon.run("status").returncode == 1
    assert daemon.run("stop").returncode == 0, "nothing to stop is no failure"


def test_a_second_start_is_told_that_one_runs(daemon: Daemon) -> None:
    assert daemon.start().returncode == 0
    pid = daemon.pid_in_lock()
    second = daemon.start()
    assert second.returncode == 3
    assert f"pid {pid}" in second.stderr
    foreground = daemon.run("run", "--bind", "127.0.0.1:0")
    assert foreground.returncode == 3
    assert f"pid {pid}" in foreground.stderr
    assert daemon.status()["pid"] == pid, "and goes on"


def test_restart_is_another_tree_with_the_same_arguments(daemon: Daemon) -> None:
    assert daemon.start().returncode == 0
    before = daemon.status()
    restarted = daemon.run("restart")
    assert restarted.returncode == 0, restarted.stderr + daemon.log()
    after = daemon.status()
    assert after["pid"] != before["pid"]
    assert after["settings_module"] == SETTINGS
    default = [child for child in after["children"] if child["kind"] == "runner (default)"]
    assert len(default) == len([c for c in before["children"] if c["kind"] == "runner (default)"])


def test_it_survives_the_terminal_it_was_started_from(daemon: Daemon) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", TERMINAL, *daemon.command("start", "--bind", "127.0.0.1:0", "--runners", "1")],
        capture_output=True,
        text=True,
        timeout=90,
        env=daemon.environment,
        cwd=ROOT,
        check=False,
    )
    assert "code 0" in finished.stdout, finished.stdout + finished.stderr
    assert "shell ended by signal 1" in finished.stdout, "the terminal has hung up"
    status = daemon.status()
    supervisor = psutil.Process(status["pid"])
    assert supervisor.terminal() is None
    assert os.getsid(supervisor.pid) == supervisor.pid
    assert all(helpers.is_alive(psutil.Process(child["pid"])) for child in status["children"])
    assert daemon.run("stop").returncode == 0


def test_the_service_manager_is_told(daemon: Daemon) -> None:
    path = daemon.state_dir / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(10)
        daemon.environment["NOTIFY_SOCKET"] = str(path)
        assert daemon.start().returncode == 0
        fields = manager.recv(4096).decode().splitlines()
        assert "READY=1" in fields
        assert f"MAINPID={daemon.pid_in_lock()}" in fields
        assert f"STATUS=serving {daemon.status()['url']}" in fields
        assert daemon.run("stop").returncode == 0
        fields = manager.recv(4096).decode().splitlines()
        assert "STOPPING=1" in fields
        assert "STATUS=stopping" in fields
    path.unlink()


def test_broken_settings_are_told_in_full(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "half_edited.py").write_text("def careless():\n    return 1 / 0\n\ncareless()\n")
    daemon.environment["PYTHONPATH"] += f":{tmp_path}"
    daemon.flags = ["--settings", "half_edited", "--state-dir", str(daemon.state_dir)]
    started = daemon.start()
    assert started.returncode == 2
    for words in ("ZeroDivisionError: division by zero", "Traceback", "in careless"):
        assert words in started.stderr
    assert str(daemon.state_dir / "bulkhead.log") in started.stderr
    assert helpers.processes_of(daemon.state_dir) == set()


def test_a_zygote_that_comes_back_is_not_taken_for_a_stray(daemon: Daemon) -> None:
    assert daemon.start().returncode == 0
    status = daemon.status()
    (old,) = (child["pid"] for child in status["children"] if child["kind"] == "zygote")
    idle = [child["pid"] for child in status["children"] if child["kind"] == "runner (default)"]
    supervisor = psutil.Process(status["pid"])
    before = set(supervisor.children())
    os.kill(old, signal.SIGKILL)
    # The only child that is made now; it takes half a second and more to import the project. Meanwhile a death has
    # the supervisor look for strays.
    (successor,) = eventually(lambda: set(supervisor.children()) - before, 10, "another zygote")
    os.kill(idle[0], signal.SIGKILL)

    def running() -> int:
        children = daemon.status()["children"]
        return sum(
            child["pid"] for child in children if (child["kind"], child["state"]) == ("zygote", "RUNNING")
        )

    assert eventually(running, 20, "a zygote that runs") == successor.pid, daemon.log()
    assert "left behind" not in daemon.log()
