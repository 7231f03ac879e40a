"""The state directory: one owner at a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from supervisor import state
from supervisor.child import tree_mark
from supervisor.state import StateDirectory
from taskkit.errors import AlreadyRunning, SettingsError
from tests import helpers

pytestmark = pytest.mark.usefixtures("leaves_nothing")

HOLDER = """
import pathlib, signal, sys
from supervisor.child import tree_mark
from supervisor.state import StateDirectory
StateDirectory(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
signal.pause()
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_directory_is_ours_alone(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "deep" / "state")
    directory.acquire()
    assert mode(directory.path) == 0o700
    assert mode(directory.path / state.BLOBS) == 0o700
    assert mode(directory.path / state.LOCK) == 0o600
    directory.release()


def test_the_lock_file_names_its_holder(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.acquire()
    record = json.loads((tmp_path / state.LOCK).read_text())
    assert record["pid"] == os.getpid()
    assert record["started"] == psutil.Process().create_time()
    assert record["mark"] == tree_mark()
    directory.release()
    assert (tmp_path / state.LOCK).read_text().strip() == ""


def test_a_second_supervisor_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    first, second = StateDirectory(tmp_path), StateDirectory(tmp_path)
    first.acquire()
    with pytest.raises(AlreadyRunning, match=rf"\(pid {os.getpid()}\).*{tmp_path}") as caught:
        second.acquire()
    assert "bulkhead stop" in str(caught.value)
    assert "--state-dir" in str(caught.value)
    assert caught.value.exit_code == 3
    first.release()


def test_one_that_was_refused_takes_nothing_from_the_holder(tmp_path: Path) -> None:
    first, second = StateDirectory(tmp_path), StateDirectory(tmp_path)
    first.acquire()
    (tmp_path / state.CONTROL_SOCKET).touch()
    with pytest.raises(AlreadyRunning):
        second.acquire()
    second.release()
    assert (tmp_path / state.CONTROL_SOCKET).exists()
    assert json.loads((tmp_path / state.LOCK).read_text())["pid"] == os.getpid()
    first.release()


@pytest.mark.parametrize("content", ["", "garbage", "[]", '{"pid"', '{"other": 1}', "7"])
def test_a_lock_file_that_says_nothing_still_locks(tmp_path: Path, content: str) -> None:
    first = StateDirectory(tmp_path)
    first.acquire()
    (tmp_path / state.LOCK).write_text(content)
    with pytest.raises(AlreadyRunning, match="a supervisor is running"):
        StateDirectory(tmp_path).acquire()
    first.release()


def test_whoever_removes_the_lock_file_lets_nobody_in(tmp_path: Path) -> None:
    first, second = StateDirectory(tmp_path), StateDirectory(tmp_path)
    first.acquire()
    (tmp_path / state.LOCK).unlink()
    with pytest.raises(AlreadyRunning):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_who_holds_a_directory(tmp_path: Path) -> None:
    assert state.holder_of(tmp_path / "missing") is None
    assert state.holder_of(tmp_path) is None
    directory = StateDirectory(tmp_path)
    directory.acquire()
    assert state.holder_of(tmp_path) == os.getpid()
    (tmp_path / state.LOCK).unlink()
    assert state.holder_of(tmp_path) == 0
    directory.release()
    assert state.holder_of(tmp_path) is None


def test_release_lets_the_next_one_in_and_removes_the_sockets(tmp_path: Path) -> None:
    first, second = StateDirectory(tmp_path), StateDirectory(tmp_path)
    first.acquire()
    for name in (state.CONTROL_SOCKET, state.POKE_SOCKET):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(tmp_path / name))
    first.release()
    assert sorted(os.listdir(tmp_path)) == [state.BLOBS, state.LOCK]
    first.release()  # again: nothing happens
    second.acquire()
    second.release()


def test_the_lock_goes_with_a_killed_holder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(helpers.ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AlreadyRunning, match=rf"pid {holder.pid}"):
            StateDirectory(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    directory = StateDirectory(tmp_path)
    directory.acquire()
    directory.release()


def test_a_longer_record_of_a_predecessor_leaves_no_rest(tmp_path: Path) -> None:
    (tmp_path / state.LOCK).write_text("x" * 5000)
    directory = StateDirectory(tmp_path)
    directory.acquire()
    assert json.loads((tmp_path / state.LOCK).read_text())["pid"] == os.getpid()
    directory.release()


@pytest.mark.parametrize("path", ["/proc/nothing/state", "/dev/null/state", "{file}/state", "{file}"])
def test_a_directory_that_cannot_be_made_is_named_with_a_remedy(tmp_path: Path, path: str) -> None:
    file = tmp_path / "file"
    file.touch()
    wanted = Path(path.format(file=file))
    with pytest.raises(SettingsError) as caught:
        StateDirectory(wanted).acquire()
    for words in (f"STATE_DIR = '{wanted}'", "--state-dir", "TASKKIT_STATE_DIR"):
        assert words in str(caught.value)


def test_a_full_disk_is_no_bad_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(state.NoRoom, match="make room") as caught:
        StateDirectory(tmp_path).acquire()
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    directory = StateDirectory(tmp_path)
    directory.acquire()
    assert (tmp_path / state.LOCK).stat().st_size == state.RECORD_BYTES
    directory.release()
    assert (tmp_path / state.LOCK).stat().st_size == state.RECORD_BYTES, "the next record needs no room"
