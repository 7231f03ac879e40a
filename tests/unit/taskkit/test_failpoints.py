"""Moments: armed by a file, acted upon once, in a process of their own."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from taskkit import failpoints
from tests.helpers import eventually

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("supervisor", "gateway", "taskkit")


def passed(directory: Path | None, times: int = 1) -> subprocess.CompletedProcess[str]:
    """Have a process pass `accept.asked`, then say so."""
    code = (
        "from taskkit import failpoints\n"
        f"for _ in range({times}):\n"
        "    try:\n"
        "        failpoints.hit('accept.asked')\n"
        "        print('passed', flush=True)\n"
        "    except failpoints.Injected as error:\n"
        "        print(error, flush=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != failpoints.VARIABLE}
    if directory is not None:
        environment[failpoints.VARIABLE] = str(directory)
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )


def test_without_the_variable_a_moment_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "accept.asked").write_text("kill")
    assert passed(None).stdout == "passed\n"


def test_kill(tmp_path: Path) -> None:
    (tmp_path / "accept.asked").write_text("kill")
    ended = passed(tmp_path)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")


def test_error_acts_once_and_leaves_the_pid(tmp_path: Path) -> None:
    (tmp_path / "accept.asked").write_text("error")
    ended = passed(tmp_path, times=2)
    assert ended.stdout == "[Errno 5] failpoint accept.asked\npassed\n"
    assert not (tmp_path / "accept.asked").exists()
    assert int((tmp_path / f"accept.asked{failpoints.ACTED}").read_text()) > 0


def test_stop(tmp_path: Path) -> None:
    (tmp_path / "accept.asked").write_text("stop")
    pid = os.fork()
    if pid == 0:
        os._exit(passed(tmp_path).returncode)
    acted = tmp_path / f"accept.asked{failpoints.ACTED}"
    eventually(lambda: acted.exists() and acted.read_text().strip().isdecimal(), 10, "the pid of who stops")
    stopped = psutil.Process(int(acted.read_text()))
    eventually(lambda: stopped.status() == psutil.STATUS_STOPPED, 10, "a stopped process")
    stopped.send_signal(signal.SIGCONT)
    assert os.waitpid(pid, 0)[1] == 0


def named() -> Iterator[str]:
    """Yield the literal names of all moments in the code."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.hit":
                    (argument,) = node.args
                    if isinstance(argument, ast.Constant):
                        yield argument.value


def test_every_moment_of_the_table_is_in_the_code_once_and_no_other() -> None:
    rounds = {f"{phase}.{kind}" for phase in failpoints.ROUND_PHASES for kind in failpoints.ROUND_KINDS}
    assert sorted(named()) == sorted(failpoints.POINTS.keys() - rounds)


@pytest.mark.parametrize("action", failpoints.ACTIONS)
def test_the_actions_are_those_tested_here(action: str) -> None:
    assert f"def test_{action}" in Path(__file__).read_text()
