"""One child process, from its birth to the exit status."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from supervisor.causes import signal_name
from taskkit import linux
from taskkit.lifecycle import ProcessEvent, ProcessState, next_process_state

#: Seconds until a child of the zygote's is ours: the process between has one system call left to make.
_ADOPTION_SECONDS: Final = 5.0
_ADOPTION_LOOK: Final = 0.002

#: Status of a child that somebody else has reaped: it left with 70, which says that it never came up.
_NEVER_OURS: Final = 70 << 8


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process left: `status` as from waitpid, `max_rss` in bytes, `cpu` in seconds."""

    status: int
    max_rss: int
    cpu: float

    def __str__(self) -> str:
        if os.WIFSIGNALED(self.status):
            return signal_name(os.WTERMSIG(self.status))
        return f"exit code {os.waitstatus_to_exitcode(self.status)}"

    @property
    def may_pass(self) -> bool:
        """Whether a start may succeed after this without anybody's help: it was killed, or said to try again."""
        return os.WIFSIGNALED(self.status) or os.waitstatus_to_exitcode(self.status) == os.EX_TEMPFAIL


class Child:
    """A process whose parent is this one. Owns the pidfd, so the pid cannot become another's unnoticed.

    Args:
      name: for status and log.
      group: whether it leads a process group that is to be ended with it.
    """

    def __init__(self, name: str, pid: int, pidfd: int, *, group: bool = False) -> None:
        self.name = name
        self.pid = pid
        self.started_at = trio.current_time()
        self.state = ProcessState.STARTING
        self.exit: Exit | None = None
        self.pidfd = pidfd
        self.group = group
        self._watched: trio.Event | None = None

    def happen(self, event: ProcessEvent) -> None:
        """Move to the next state."""
        self.state = next_process_state(self.state, event)

    def ready(self) -> bool:
        """It says that it is ready; return whether that counts.

        It does not when the word comes late: the process has died since, or was told to leave. Its end is then the
        next thing that is heard of it.
        """
        if self.state is not ProcessState.STARTING:
            return False
        self.happen(ProcessEvent.READY)
        return True

    async def wait(self) -> Exit:
        """Wait for the end, kill what its group left behind, reap. Any number of tasks may wait.

        One of them watches the pidfd; when it is cancelled, another takes over.
        """
        while self.exit is None:
            if self._watched is not None:
                await self._watched.wait()
                continue
            self._watched = trio.Event()
            try:
                await trio.lowlevel.wait_readable(self.pidfd)
                await self._await_adoption()
                self._reap()
            finally:
                watched, self._watched = self._watched, None
                watched.set()
        return self.exit

    async def _await_adoption(self) -> None:
        """Return when it is ours to reap; one that died at birth may still be its parent's."""
        with trio.move_on_after(_ADOPTION_SECONDS):
            while not self._is_ours():  # noqa: ASYNC110 - the kernel tells nobody
                await trio.sleep(_ADOPTION_LOOK)

    def _is_ours(self) -> bool:
        try:  # the zombie stays: only whether there is one to wait for is asked
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _reap(self) -> None:
        if self.group:
            # Before reaping: as long as the leader is a zombie, its group's number cannot be taken by another.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        try:
            _, status, usage = os.wait4(self.pid, 0)
            self.exit = _exit_of(status, usage)
        except ChildProcessError:
            self.exit = Exit(_NEVER_OURS, 0, 0.0)
        with contextlib.suppress(Exception):
            self.happen(ProcessEvent.EXIT)
        trio.lowlevel.notify_closing(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process; nothing happens when it has ended."""
        if self.exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def end(self, grace: float) -> Exit:
        """TERM, then KILL after `grace` seconds; return when it is gone. A stopped process dies of KILL, too."""
        self.terminate()
        with trio.move_on_after(grace):
            return await self.wait()
        self.send_signal(signal.SIGKILL)
        with trio.move_on_after(10, shield=True):  # SIGKILL cannot be refused, only delayed by the kernel
            return await self.wait()
        raise OSError(f"{self.name} (pid {self.pid}) does not die of SIGKILL: it waits inside the kernel")

    def terminate(self) -> None:
        """Ask the process to leave."""
        with contextlib.suppress(Exception):
            self.happen(ProcessEvent.TERMINATE)
        self.send_signal(signal.SIGTERM)


def _exit_of(status: int, usage: resource.struct_rusage) -> Exit:
    return Exit(status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


_mark: list[str] = []


def tree_mark() -> str:
    """Return the name of this supervisor's tree, in the environment of whatever it starts for user code."""
    if not _mark:
        _mark.append(f"{os.getpid()}-{secrets.token_hex(8)}")
    return _mark[0]


def keep_mark(mark: str) -> None:
    """Go on with the tree of the image before."""
    _mark[:] = [mark]


def spawn(name: str, module: str, arguments: Sequence[str], fds: Sequence[int], *, session: bool) -> Child:
    """Start `python -m module arguments` with only `fds` open besides the standard ones.

    Must be called in the main thread: a child's PDEATHSIG is bound to the thread that made it, and trio's own
    open_process uses a worker thread that ends after ten idle seconds and would take the child along.

    Args:
      session: it imports user code: it leads a session, and is marked together with all that it will start.

    Raises:
      OSError: the system has no room for another process.
    """
    environment = {key: value for key, value in os.environ.items() if key != linux.TREE_MARK}
    # Otherwise a process title is written over what /proc shows as the environment, and with it over the mark.
    environment["SPT_NOENV"] = "1"
    if session:
        environment[linux.TREE_MARK] = tree_mark()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=tuple(fds),
        start_new_session=session,
        env=environment,
    )
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:  # no descriptor is left
        process.kill()
        process.wait()
        raise
    child = Child(name, process.pid, pidfd, group=session)
    # Popen would reap it behind our back at garbage collection, and warn.
    process.returncode = 0
    return child
