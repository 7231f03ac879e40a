"""What one image of the supervisor leaves to the next: children by pidfd, everything else by descriptor.

execve(2) keeps the pid, the children, the descriptors that are not close-on-exec, the blocked signals. So the new
image is the same process to everybody, and goes on where the old one stopped.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from supervisor.child import Child
from supervisor.deadlines import Due
from taskkit import linux
from taskkit.channel import Channel
from taskkit.lifecycle import ProcessState
from taskkit.wire.messages import Exited, RunnerSpec, ZygoteReady

#: Environment variable with the number of the descriptor that holds all this.
VARIABLE: Final = "BULKHEAD_HANDOVER"

#: Bytes of a hand-over: a runner takes 300, a catalogue of 1,000 tasks a megabyte.
_LIMIT: Final = 64 * 1024 * 1024

#: Signals that may come while there is nobody to hear them: they wait.
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class HeldChild(Struct, frozen=True):
    """A living child, or one that nobody has reaped yet; `pidfd` is -1 when it is reaped."""

    name: str
    pid: int
    pidfd: int
    group: bool
    state: ProcessState

    def child(self) -> Child:
        """Return it as this image's."""
        child = Child(self.name, self.pid, self.pidfd, group=self.group)
        child.state = self.state
        return child


class HeldPeer(Struct, frozen=True):
    """Gateway, zygote or courier: the process and the descriptor of its control socket; `faults` is the courier's."""

    child: HeldChild
    control: int
    faults: int = -1

    def take(self, expected: Any) -> tuple[Child, Channel[Any]]:
        """Return the process, which is READY as soon as this image says so, and the channel to it.

        Args:
          expected: struct or union of what it may say.
        """
        child = Child(self.child.name, self.child.pid, self.child.pidfd, group=self.child.group)
        return child, Channel(socket.socket(fileno=self.control), expected)


class HeldRunner(Struct, frozen=True):
    """A runner that is not drained."""

    spec: RunnerSpec
    child: HeldChild
    near: tuple[int, int, int]
    faults: int
    pipe_size: int
    started_at: float
    retired: bool
    used: bool
    outdated: bool
    judged: bool
    ordered: str
    detail: str
    exited: Exited | None


class HandOver(Struct, frozen=True, kw_only=True):
    """Everything. `deadlines` hold readings of CLOCK_BOOTTIME, the same for both images; `notes` are the gateway's."""

    mark: str
    lock: int
    listener: int
    url: str
    poke: int
    operator: int
    ready: ZygoteReady
    zygote: HeldPeer
    gateway: HeldPeer
    courier: HeldPeer | None
    runners: list[HeldRunner]
    deadlines: list[tuple[float, Due]]
    stalled: bool
    notes: list[str] = []

    def descriptors(self) -> Iterator[int]:
        """Yield every descriptor that has to survive."""
        found = [self.lock, self.listener, self.poke, self.operator]
        for peer in filter(None, (self.zygote, self.gateway, self.courier)):
            found += (peer.child.pidfd, peer.control, peer.faults)
        for runner in self.runners:
            found += (runner.child.pidfd, *runner.near, runner.faults)
        yield from (fd for fd in found if fd >= 0)


def hold(child: Child) -> HeldChild:
    """Return a child as the next image finds it."""
    return HeldChild(child.name, child.pid, child.pidfd, child.group, child.state)


def command_line(argv: Sequence[str]) -> list[str]:
    """Return the command line of the next image: this one's, without the pipe whose other end has heard READY."""
    rest = list(argv[1:])
    if "--ready-fd" in rest:
        at = rest.index("--ready-fd")
        del rest[at : at + 2]
    return [sys.executable, *rest]


def written(handover: HandOver) -> int:
    """Return a descriptor of an anonymous file that holds it; the caller's to close."""
    return linux.sealed_memfd("bulkhead-handover", msgspec.msgpack.encode(handover))


def read(fd: int) -> HandOver:
    """Return what the file behind `fd` holds.

    Raises:
      msgspec.ValidationError: it is of a version that this one does not understand.
    """
    return msgspec.msgpack.decode(linux.read_from_start(fd, _LIMIT), type=HandOver)


def leave(handover: HandOver) -> OSError:
    """Become the next image of this program. Returns only when that failed, and then nothing has changed."""
    memory = written(handover)
    kept = [*handover.descriptors(), memory]
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for fd in kept:
            os.set_inheritable(fd, True)
        os.execve(
            sys.executable, command_line(sys.orig_argv), {**os.environ, VARIABLE: f"{memory} {os.getpid()}"}
        )
    except OSError as error:
        for fd in kept:
            os.set_inheritable(fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        os.close(memory)
        return error
    raise AssertionError("execve returned")


def take() -> HandOver | None:
    """Return what the image before left to this process, if there was one.

    Raises:
      msgspec.ValidationError: it was of a version that this one does not understand.
    """
    memory, _, pid = os.environ.pop(VARIABLE, "").partition(" ")
    if pid != str(os.getpid()):
        return None
    handover = read(int(memory))
    os.close(int(memory))
    for fd in handover.descriptors():
        os.set_inheritable(fd, False)
    return handover


def hear_signals() -> None:
    """Let through what has been sent since the image before stopped to hear; call with handlers in place."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
