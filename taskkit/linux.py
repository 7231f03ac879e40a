"""The Linux calls that Python's standard library lacks, or spells at length.

Everything here is a thin wrapper: it raises OSError with the kernel's errno and decides nothing.
Sources: prctl(2), clone(2), tee(2), memfd_create(2), fcntl(2), unix(7), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_TID_ADDRESS: Final = 40
_CLONE_PARENT: Final = 0x00008000
_CLONE_CHILD_CLEARTID: Final = 0x00200000
_CLONE_CHILD_SETTID: Final = 0x01000000
_SPLICE_F_NONBLOCK: Final = 2
_F_SETSIG: Final = 10

#: Environment variable that names the tree a process belongs to, so that what tasks have started can be found when
#: nobody is left who was its parent.
TREE_MARK: Final = "BULKHEAD_TREE"

#: Number of clone(2) by machine; elsewhere `fork_sibling` does not exist.
_SYS_CLONE: Final = {"x86_64": 56, "aarch64": 220, "riscv64": 220}.get(os.uname().machine)

_libc = ctypes.CDLL(None, use_errno=True)
#: The same with the GIL held during the call: a fork without it would leave a child in which nobody holds it.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_libc.tee.restype = ctypes.c_ssize_t


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    _check(_libc.prctl(ctypes.c_int(option), argument, 0, 0, 0), "prctl")


def fork_sibling() -> int:
    """Fork, as `os.fork` does, a child of this process's *parent*; return 0 in it, its pid here.

    One fork instead of the two that reparenting takes: with a project of 60 MB each costs some 3 ms of CPU. Call it
    in a process with one thread. The libraries' own handlers (pthread_atfork) are not called, Python's are.

    Raises:
      OSError: ENOSYS: not on this machine; EINVAL, EPERM: not allowed here; EAGAIN, ENOMEM: not now.
    """
    if _SYS_CLONE is None:
        raise OSError(errno.ENOSYS, "clone: not known on this machine")
    flags, tid = _CLONE_PARENT | signal.SIGCHLD, ctypes.c_ulong(0)
    if _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid), 0, 0, 0) == 0:
        # Where the C library keeps the thread's number, which it would otherwise take for the parent's.
        flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    # Fourth or fifth, by machine; the other one is not looked at (CLONE_SETTLS).
    arguments = [ctypes.c_ulong(value) for value in (flags, 0, 0, tid.value, tid.value)]
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = _libc_with_gil.syscall(ctypes.c_long(_SYS_CLONE), *arguments)
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return int(pid)


def set_death_signal(number: signal.Signals) -> None:
    """Have the kernel send `number` to this process when its parent's *thread* dies. Cleared by fork."""
    _prctl(_PR_SET_PDEATHSIG, number)


def set_subreaper() -> None:
    """Become the parent of every descendant that loses its own. Kept by execve, not inherited by fork."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_not_dumpable() -> None:
    """Keep other processes of this user out of /proc/self/{fd,mem}; call after writing /proc/self files."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_no_new_privileges() -> None:
    """No execve from here on gains privileges (setuid files have no effect)."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_comm(name: str) -> None:
    """Set the name that `ps` shows by default; the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def tee(source: int, target: int, size: int) -> int:
    """Copy up to `size` bytes from pipe to pipe without consuming them; return how many.

    Raises:
      BlockingIOError: nothing to copy, or no room in `target`.
    """
    return _check(_libc.tee(source, target, size, _SPLICE_F_NONBLOCK), "tee")


def set_pipe_size(fd: int, size: int) -> int:
    """Ask for a pipe of `size` bytes; return what it has now, which may be less (pipe-user-pages-soft)."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def bytes_to_read(fd: int) -> int:
    """Return how many bytes wait in the pipe (asked at either end) or in the socket."""
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))
    return int(count)


def signal_on_input(fd: int, number: signal.Signals) -> None:
    """Have the kernel send `number` to this process whenever something arrives on the socket `fd`.

    So a synchronous task can be interrupted without a thread of ours in its process.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, _F_SETSIG, number)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)


def sealed_memfd(name: str, data: bytes) -> int:
    """Return a descriptor of an anonymous file with `data` that nobody can change any more."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_from_start(fd: int, limit: int) -> bytes:
    """Return up to `limit` bytes of the file behind `fd`, whatever its position."""
    parts = []
    at = 0
    while at < limit and (part := os.pread(fd, min(limit - at, 1 << 20), at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


@functools.cache
def boot_id() -> str:
    """Return the kernel's name for the time since the last boot. Read once: later there may be no descriptor for it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def boottime() -> float:
    """Return seconds since boot, time in suspend included. Never steps; the same for all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def children() -> set[int]:
    """Return the pids of this process's children, whichever thread made them, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def processes_of_tree(mark: str) -> set[int]:
    """Return the pids of living processes that were started below the tree of this mark.

    A fork inherits the environment, a program started by exec keeps it unless it is given another one. Other users'
    processes are not seen.
    """
    wanted = f"{TREE_MARK}={mark}".encode()
    found: set[int] = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended, or is not ours to look into
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
    return found


def kill_tree(mark: str) -> set[int]:
    """Send SIGKILL to every process of `processes_of_tree` but this one; return their pids."""
    found = processes_of_tree(mark) - {os.getpid()}
    for pid in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return found


@contextlib.contextmanager
def short_socket_path(path: Path) -> Iterator[str]:
    """Yield a spelling of `path` that fits the 107 bytes of a Unix socket's address.

    A deep directory is reached through a descriptor in /proc/self/fd instead.
    """
    text = os.fspath(path)
    if len(text.encode()) < 108:
        yield text
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep message boundaries and carry descriptors."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
