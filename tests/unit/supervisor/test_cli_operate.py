"""The operator socket's client, the background start: against small real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor import detach
from supervisor.cli import operate
from supervisor.cli.project import control_socket

Fake = Callable[[str], "subprocess.Popen[str]"]
Start = Callable[[str], detach.Background]

FAKE = """
import os, socket, sys, subprocess, threading
from taskkit import seqpacket
from taskkit.wire import codec
from taskkit.wire.messages import ChildStatus, Operation, Status
path, behaviour = sys.argv[1:3]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(path)
listener.listen()
print("up", flush=True)
sock, _ = listener.accept()
operation = codec.unpack(seqpacket.receive(sock)[0], Operation)
if behaviour == "silent":
    threading.Event().wait(20)
if behaviour == "garbage":
    seqpacket.send(sock, b"garbage")
    threading.Event().wait(20)
if behaviour == "hang-up":
    sys.exit()
child = subprocess.Popen(["sleep", "20"]) if behaviour == "orphan" else None
status = Status(pid=os.getpid(), state=operation.name, url="u", state_dir="s", settings_module="m", uptime=1.0,
                children=[ChildStatus(name="sleeper", kind="k", state="RUNNING", pid=child.pid)] if child else [])
seqpacket.send(sock, codec.pack(status))
if behaviour == "stays":
    threading.Event().wait(20)
os._exit(0)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    made: list[subprocess.Popen[str]] = []

    def start(behaviour: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FAKE, str(control_socket(tmp_path)), behaviour]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        made.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in made:
        process.kill()
        process.communicate(timeout=10)


def connected(tmp_path: Path) -> operate.Operator:
    found = operate.connect(tmp_path)
    assert found is not None
    return found


def test_nobody_there_is_none(tmp_path: Path) -> None:
    assert operate.connect(tmp_path) is None
    assert operate.connect(tmp_path / "absent") is None
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(control_socket(tmp_path)))
    assert operate.connect(tmp_path) is None  # the file is still there, nobody listens


def test_status_comes_from_the_process_that_listens(tmp_path: Path, fake: Fake) -> None:
    process = fake("answers")
    with connected(tmp_path) as operator:
        status = operator.ask("status")
    assert (status.pid, operator.pid, status.state) == (process.pid, process.pid, "status")


def test_stop_returns_when_the_process_is_gone(tmp_path: Path, fake: Fake) -> None:
    process = fake("answers")
    with connected(tmp_path) as operator:
        assert operate.stop(operator, now=False, timeout=10) == {}
    assert process.wait(timeout=5) == 0


def test_stop_says_what_is_left(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    process = fake("stays")
    monkeypatch.setattr(operate, "ORPHAN_GRACE", 0.1)
    with connected(tmp_path) as operator:
        assert operate.stop(operator, now=True, timeout=0.2) == {process.pid: "supervisor"}


def test_stop_names_children_that_outlive_the_supervisor(
    tmp_path: Path,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake("orphan")
    monkeypatch.setattr(operate, "ORPHAN_GRACE", 0.2)
    with connected(tmp_path) as operator:
        left = operate.stop(operator, now=False, timeout=10)
    assert list(left.values()) == ["sleeper"]
    os.kill(next(iter(left)), signal.SIGKILL)


@pytest.mark.parametrize("behaviour", ["silent", "garbage", "hang-up"])
def test_a_supervisor_that_makes_no_sense_is_unresponsive(
    tmp_path: Path,
    fake: Fake,
    behaviour: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = fake(behaviour)
    monkeypatch.setattr(operate, "ANSWER_DEADLINE", 0.5)
    with connected(tmp_path) as operator, pytest.raises(operate.Unresponsive, match=str(process.pid)):
        operator.ask("status")


# --- background ---------------------------------------------------------------------------------------------

READY = "import os, sys; print('hello', flush=True); os.write(int(sys.argv[-1]), b'\\n'); sys.stdin.read(); "
WAIT = "import threading; threading.Event().wait(20)"


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Start]:
    made: list[detach.Background] = []

    def start(code: str) -> detach.Background:
        made.append(detach.spawn([sys.executable, "-c", code], tmp_path / "log"))
        return made[-1]

    yield start
    for one in made:
        one.end(5)


def test_ready_is_a_newline_on_the_pipe(background: Start) -> None:
    started = background(READY + WAIT)
    assert started.wait_ready(10)
    assert os.getsid(started.process.pid) == started.process.pid  # no terminal's hang-up reaches it
    assert started.last_words() == "hello"
    assert started.end(5) == -signal.SIGTERM


def test_a_death_before_ready_is_noticed_at_once(background: Start) -> None:
    started = background("import sys; print('why', file=sys.stderr); sys.exit(3)")
    assert not started.wait_ready(20)
    assert not started.late
    assert started.reap(5) == 3
    assert started.last_words() == "why"


def test_one_that_is_late_can_be_ended_even_if_it_ignores_term(background: Start) -> None:
    started = background(
        "import signal; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True);" + WAIT
    )
    assert not started.wait_ready(1.0)
    assert started.late
    assert started.end(0.2) == -signal.SIGKILL


def test_last_words_leave_out_what_earlier_starts_wrote(background: Start, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an earlier start\n")
    started = background("print('this start')")
    assert not started.wait_ready(10)
    started.reap(5)
    assert started.last_words() == "this start"
    assert (tmp_path / "log").read_text() == "an earlier start\nthis start\n"


def test_a_large_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detach, "LOG_LIMIT", 10)
    log = tmp_path / "log"
    detach.rotate(log)
    log.write_text("x" * 10)
    detach.rotate(log)
    assert log.exists()
    log.write_text("x" * 11)
    detach.rotate(log)
    assert not log.exists()
    assert (tmp_path / "log.1").stat().st_size == 11


def test_it_dies_with_its_caller_if_so_wished(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from supervisor import detach;"
        f"b = detach.spawn([sys.executable, '-c', {READY + WAIT!r}], pathlib.Path({str(tmp_path / 'log')!r}),"
        " dies_with_caller=True);"
        "print(b.wait_ready(10), b.process.pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=20)
    ready, pid = done.stdout.split()
    assert ready == "True"
    try:
        watch = os.pidfd_open(int(pid))
    except ProcessLookupError:
        return
    try:
        assert operate._await_ends({watch: int(pid)}, 5.0) == set()
    finally:
        os.close(watch)


def test_a_reader_that_left_does_not_hurt_who_is_ready() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    detach.say_ready(write_end)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(write_end)
