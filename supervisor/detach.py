"""A supervisor started in the background: spawn it, wait until it is READY.

The child writes a newline to a pipe when it is READY and closes it; end of file without one: it has died.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from taskkit import linux

#: How this program is called again; the interpreter decides which installation that is.
COMMAND: Final = (sys.executable, "-m", "supervisor")

LOG_NAME: Final = "bulkhead.log"

#: A log beyond this many bytes is put aside as `bulkhead.log.1` at the next start, so that the two together
#: stay small on any disk; whoever needs more history has a journal.
LOG_LIMIT: Final = 10 * 1024 * 1024

#: How much of the log is shown when a start fails: a Django traceback has some thirty lines.
_TAIL_BYTES: Final = 16 * 1024
_TAIL_LINES: Final = 40


@dataclass(slots=True)
class Background:
    """A supervisor in the background.

    Attributes:
      process: its handle.
      log: where its standard output and error go.
      log_start: size of the log before it wrote its first byte.
      ready_fd: read end of its pipe; -1 once waited for.
      late: it was alive when the wait for it timed out.
    """

    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    ready_fd: int
    late: bool = False

    def wait_ready(self, timeout: float) -> bool:
        """Wait until it is READY; False when it died first, or when `timeout` seconds have passed.

        May be called once: the pipe is closed on return.
        """
        poll = select.poll()
        poll.register(self.ready_fd, select.POLLIN)
        try:
            self.late = not poll.poll(timeout * 1000)
            return not self.late and os.read(self.ready_fd, 1) == b"\n"
        finally:
            os.close(self.ready_fd)
            self.ready_fd = -1

    def end(self, grace: float) -> int:
        """Terminate it, after `grace` seconds kill it; return its exit code, negative for a signal."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def reap(self, grace: float) -> int:
        """Return the exit code of one that is about to leave by itself; it is ended after `grace` seconds."""
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            return self.end(grace)

    def last_words(self) -> str:
        """Return the end of what it has logged since its start."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, size - _TAIL_BYTES))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])


def say_ready(fd: int) -> None:
    """Tell whoever waits at the other end of the pipe `fd` that the tree is READY; it may have left."""
    with contextlib.suppress(OSError):
        os.write(fd, b"\n")
    os.close(fd)


def rotate(log: Path) -> None:
    """Put a log beyond LOG_LIMIT aside, over the one put aside before."""
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_name(log.name + ".1"))


def _die_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        linux.set_death_signal(signal.SIGTERM)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return prepare


def spawn(
    command: Sequence[str],
    log: Path,
    *,
    cwd: str | None = None,
    environment: Mapping[str, str] | None = None,
    dies_with_caller: bool = False,
) -> Background:
    """Start `COMMAND --ready-fd N` in a session of its own, logging to `log`.

    Args:
      dies_with_caller: it is terminated when this thread ends, however it ends; otherwise it survives caller
        and terminal.

    Raises:
      OSError: log, folder or process cannot be made.
    """
    rotate(log)
    read_end, write_end = os.pipe()
    try:
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                [*command, "--ready-fd", str(write_end)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=None if environment is None else dict(environment),
                pass_fds=(write_end,),
                start_new_session=True,
                # Safe here: the command line has one thread. There is no other way to set PDEATHSIG.
                preexec_fn=_die_with(os.getpid()) if dies_with_caller else None,
            )
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    return Background(process, log, log_start, read_end)
