"""The client side of the operator socket: what a running supervisor can be asked."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from supervisor.cli.project import control_socket
from taskkit import linux, seqpacket
from taskkit.errors import SupervisorError, WireError
from taskkit.wire import codec
from taskkit.wire.messages import Operation, Status

#: Seconds for the supervisor to answer. It has one loop that never computes; five seconds mean that it is
#: stuck, or that the machine is.
ANSWER_DEADLINE: Final = 5.0

#: Seconds that children may outlive their supervisor: an orphaned gateway drains its pipes for at most 1.5 s.
ORPHAN_GRACE: Final = 2.0

_PEERCRED: Final = struct.Struct("3i")


class Unresponsive(SupervisorError):
    """A supervisor is there and does not answer; look at its log, or end it with `kill`."""

    exit_code = 1


class Operator:
    """A connection to a running supervisor. Close it, or use it as a context manager."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        self.pid: int = _PEERCRED.unpack(credentials)[0]

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the tree goes on."""
        self._sock.close()

    def ask(self, name: str, *, now: bool = False, timeout: float = ANSWER_DEADLINE) -> Status:
        """Send one operation, such as "status" or "stop"; return the answer.

        Raises:
          Unresponsive: there is no answer within `timeout` seconds, or one that makes no sense.
        """
        status = self.ask_to_leave(name, now=now, timeout=timeout)
        if status is None:
            raise Unresponsive(f"the supervisor (pid {self.pid}) closed the connection without an answer")
        return status

    def ask_to_leave(
        self, name: str, *, now: bool = False, timeout: float = ANSWER_DEADLINE
    ) -> Status | None:
        """Send one operation that ends the supervisor's program when it succeeds; return its answer, or None.

        Raises:
          Unresponsive: as `ask`.
        """
        self._sock.settimeout(timeout)
        try:
            seqpacket.send(self._sock, codec.pack(Operation(name=name, now=now)))
            received = seqpacket.receive(self._sock)
            if received is None:
                return None
            payload, fds = received
            seqpacket.close_all(fds)
            status: Status = codec.unpack(payload, Status)
        except (OSError, WireError) as error:
            text = "does not answer" if isinstance(error, TimeoutError) else f"failed to answer: {error}"
            raise Unresponsive(f"the supervisor (pid {self.pid}) {text}") from error
        return status


def connect(state_dir: Path) -> Operator | None:
    """Return a connection to the supervisor of this state directory, or None when none runs.

    Raises:
      Unresponsive: one seems to run, but not for this user.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(ANSWER_DEADLINE)
    try:
        with linux.short_socket_path(control_socket(state_dir)) as path:
            sock.connect(path)
        return Operator(sock)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise Unresponsive(f"{control_socket(state_dir)}: {error.strerror or error}") from error


@contextlib.contextmanager
def _watched(pids: list[int]) -> Iterator[dict[int, int]]:
    """Yield pid by pidfd for those that live; a pidfd names the process, whoever gets the number later."""
    watched: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                watched[os.pidfd_open(pid)] = pid
        yield watched
    finally:
        for fd in watched:
            os.close(fd)


def _await_ends(watched: dict[int, int], seconds: float) -> set[int]:
    """Wait up to `seconds` until all processes have ended; return the pids of those that have not."""
    deadline = time.monotonic() + seconds
    left = dict(watched)
    poll = select.poll()
    for fd in left:
        poll.register(fd, select.POLLIN)
    while left and (remaining := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(remaining * 1000):
            poll.unregister(fd)
            del left[fd]
    return set(left.values())


def stop(operator: Operator, *, now: bool, timeout: float) -> dict[int, str]:
    """Stop the tree; wait up to `timeout` seconds until its supervisor is gone, then 2 s for its children.

    Returns:
      what is left, name by pid; empty when all is gone.

    Raises:
      Unresponsive: the supervisor does not answer.
    """
    with _watched([operator.pid]) as root:
        status = operator.ask("stop", now=now)
        names = {child.pid: child.name for child in status.children if child.pid > 0}
        with _watched(list(names)) as children:
            left = _await_ends(root, timeout)
            left |= _await_ends(children, ORPHAN_GRACE)
    return {pid: names.get(pid, "supervisor") for pid in sorted(left)}
