"""The thin wrappers around Linux, against the kernel that runs the tests."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskkit import linux
from tests.helpers import eventually

Pipe = tuple[int, int]


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    """Give two pipes that do not block."""
    found = [os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(2)]
    yield found[0], found[1]
    for pipe in found:
        for fd in pipe:
            os.close(fd)


def test_tee_copies_and_does_not_consume(pipes: tuple[Pipe, Pipe]) -> None:
    source, target = pipes
    os.write(source[1], b"0123456789")
    assert linux.tee(source[0], target[1], 100) == 10
    assert os.read(target[0], 100) == b"0123456789"
    assert linux.bytes_to_read(source[0]) == 10
    assert os.read(source[0], 100) == b"0123456789"


def test_tee_copies_the_whole_of_many_small_writes(pipes: tuple[Pipe, Pipe]) -> None:
    source, target = pipes
    for number in range(12):
        os.write(source[1], b"%03d" % number)
    assert linux.tee(source[0], target[1], 65536) == 36
    assert os.read(target[0], 100) == b"".join(b"%03d" % number for number in range(12))


def test_tee_takes_no_more_than_asked(pipes: tuple[Pipe, Pipe]) -> None:
    source, target = pipes
    os.write(source[1], b"0123456789")
    assert linux.tee(source[0], target[1], 4) == 4
    assert os.read(target[0], 100) == b"0123"


def test_tee_with_nothing_to_copy_does_not_block(pipes: tuple[Pipe, Pipe]) -> None:
    source, target = pipes
    with pytest.raises(BlockingIOError):
        linux.tee(source[0], target[1], 100)


def test_tee_without_room_does_not_block(pipes: tuple[Pipe, Pipe]) -> None:
    source, target = pipes
    os.write(source[1], b"x")
    os.write(target[1], bytes(linux.set_pipe_size(target[1], 4096)))
    with pytest.raises(BlockingIOError):
        linux.tee(source[0], target[1], 100)


def test_tee_at_end_of_file_is_zero(pipes: tuple[Pipe, Pipe]) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    try:
        assert linux.tee(reader, pipes[0][1], 100) == 0
    finally:
        os.close(reader)


def test_an_error_carries_errno_and_call(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match="tee") as caught:
        linux.tee(file.fileno(), file.fileno(), 1)
    assert caught.value.errno == errno.EINVAL


def test_a_pipe_has_the_size_that_is_reported(pipes: tuple[Pipe, Pipe]) -> None:
    reader, writer = pipes[0]
    size = linux.set_pipe_size(writer, 256 * 1024)
    assert size in (256 * 1024, 65536, 4096), "granted, or what an ordinary user past the soft limit keeps"
    for _ in range(size // 4096):
        os.write(writer, bytes(4096))
    with pytest.raises(BlockingIOError):
        os.write(writer, b"x")
    assert linux.bytes_to_read(reader) == linux.bytes_to_read(writer) == size


def test_a_size_the_kernel_refuses_leaves_the_pipe_as_it_is(pipes: tuple[Pipe, Pipe]) -> None:
    before = linux.set_pipe_size(pipes[0][0], 65536)
    assert linux.set_pipe_size(pipes[0][0], 1 << 31) == before


def test_a_sealed_memfd_cannot_be_changed() -> None:
    fd = linux.sealed_memfd("test", b"for ever")
    try:
        assert linux.read_from_start(fd, 100) == b"for ever"
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 100),
        ):
            with pytest.raises(PermissionError):
                change()
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_read_from_start_ignores_the_position_and_keeps_the_limit() -> None:
    data = os.urandom(3 << 20)
    fd = linux.sealed_memfd("test", data)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        assert linux.read_from_start(fd, 1 << 30) == data
        assert linux.read_from_start(fd, (1 << 20) + 1) == data[: (1 << 20) + 1]
        assert linux.read_from_start(fd, 0) == b""
    finally:
        os.close(fd)


def test_clocks_and_boot_id() -> None:
    first = linux.boottime()
    assert first <= linux.boottime() < first + 60
    assert linux.boot_id() == linux.boot_id()
    assert len(linux.boot_id()) == 36


def test_a_short_socket_path_is_left_alone(tmp_state_dir: Path) -> None:
    with linux.short_socket_path(tmp_state_dir / "s") as path:
        assert path == str(tmp_state_dir / "s")


def test_a_socket_in_a_directory_of_200_characters(tmp_state_dir: Path) -> None:
    deep = tmp_state_dir / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    address = deep / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(OSError, match="too long"):
            listener.bind(str(address))
        with linux.short_socket_path(address) as path:
            assert len(path.encode()) < 108
            listener.bind(path)
        assert address.is_socket()
        listener.listen()
        with linux.short_socket_path(address) as path:
            client.connect(path)
        peer, _ = listener.accept()
        peer.close()


@pytest.mark.parametrize("size", [106, 107, 108])
def test_the_limit_of_107_bytes_counts_bytes(tmp_state_dir: Path, size: int) -> None:
    name = "ü" * 20
    room = size - len(str(tmp_state_dir)) - 2 - len(name.encode())
    folder = tmp_state_dir / ("d" * room)
    folder.mkdir()
    address = folder / name
    assert len(str(address).encode()) == size
    with socket.socket(socket.AF_UNIX) as listener, linux.short_socket_path(address) as path:
        listener.bind(path)
        assert (path == str(address)) == (size <= 107)


def test_short_socket_path_closes_its_descriptor(tmp_state_dir: Path) -> None:
    deep = tmp_state_dir / ("d" * 120)
    deep.mkdir()
    before = set(os.listdir("/proc/self/fd"))
    with linux.short_socket_path(deep / "s"):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


def test_children_counts_those_of_every_thread_and_zombies() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

    thread = threading.Thread(target=start)
    start()
    thread.start()
    thread.join()
    pids = {process.pid for process in started}
    assert pids <= linux.children()
    for process in started:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert pids <= linux.children(), "a zombie is a child still"
    for process in started:
        process.communicate()
    assert not pids & linux.children()


def forked(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that changes its process for good, in one of its own."""
    program = "import os, signal, sys, time\nfrom taskkit import linux\n" + code
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )


def test_prctl_calls_take_effect() -> None:
    code = """
linux.set_comm("bulkhead-test-name-that-is-long")
linux.set_no_new_privileges()
linux.set_subreaper()
print(open("/proc/self/comm").read().strip())
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("NoNewPrivs")])
"""
    assert forked(code).stdout.splitlines() == ["bulkhead-test-n", "['1']"]


def test_a_subreaper_gets_orphans() -> None:
    code = """
linux.set_subreaper()
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
(orphan,) = linux.children()
os.kill(orphan, signal.SIGKILL)
print(os.wait()[0] == orphan)
"""
    assert forked(code).stdout.strip() == "True"


def test_the_death_signal_follows_the_parent() -> None:
    code = """
reader, writer = os.pipe()
if os.fork() == 0:
    child = os.fork()
    if child == 0:
        linux.set_death_signal(signal.SIGKILL)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os._exit(0)
linux.set_subreaper()
os.wait()
try:
    os.close(writer)
    print(os.read(reader, 1))
finally:
    pass
"""
    assert forked(code).stdout.strip() == "b''", "end of file: the grandchild that held the pipe is dead"


def test_a_process_that_is_not_dumpable_hides_its_files() -> None:
    code = """
linux.set_not_dumpable()
print(os.stat("/proc/self/fd").st_uid)
"""
    assert forked(code).stdout.strip() == "0", "its /proc files belong to root"


def test_input_on_a_socket_raises_a_signal() -> None:
    left, right = linux.seqpacket_pair()
    heard: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        linux.signal_on_input(left.fileno(), signal.SIGUSR1)
        assert heard == []
        right.send(b"x")
        eventually(lambda: heard, 5, "a signal")
        assert set(heard) == {signal.SIGUSR1}
    finally:
        signal.signal(signal.SIGUSR1, old)
        left.close()
        right.close()


def test_a_sibling_is_a_child_of_the_parent_and_a_whole_interpreter() -> None:
    code = """
import signal, threading
reader, writer = os.pipe()
me = os.getpid()
if (child := os.fork()) == 0:
    hooks = []
    os.register_at_fork(before=lambda: hooks.append("before"), after_in_child=lambda: hooks.append("child"))
    pid = linux.fork_sibling()
    if pid == 0:
        signal.signal(signal.SIGUSR1, lambda *_: hooks.append("raised"))
        signal.raise_signal(signal.SIGUSR1)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        thread = threading.Thread(target=hooks.append, args=("thread",))
        thread.start()
        thread.join()
        print(os.getppid() == me, threading.get_native_id() == os.getpid(), *hooks, flush=True)
        os._exit(7)
    os.write(writer, str(pid).encode())
    os._exit(0)
os.waitpid(child, 0)
pid, status = os.waitpid(int(os.read(reader, 20)), 0)
print(os.waitstatus_to_exitcode(status))
"""
    said = forked(code).stdout.split("\n")
    assert said[:2] == ["True True before child raised raised thread", "7"]
