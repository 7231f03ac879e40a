"""The near ends of runners' pipes: look without taking, take what is committed, give orders.

The kernel pipe is the resend buffer (DESIGN §3.1). `peek` copies with tee(2) and leaves the pipe as it was; when the
store has what was peeked, `consume` takes exactly those bytes with one readv. A gateway that is killed in between
leaves the rest to its successor, who peeks the same frames again and knows their numbers.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import Final

from gateway.output import OutputParser
from taskkit import linux, seqpacket
from taskkit.errors import RemoteWireError
from taskkit.wire.codec import pack
from taskkit.wire.framing import Frame, find_resync, max_frame, read_frames
from taskkit.wire.messages import Order, RunnerSpec

#: Bytes looked at per runner and round, for fairness: a flooding task fills this much of each round and no more.
PEEK_SIZE: Final = 64 * 1024

#: The same beside a runner that has little to say: whoever speaks in between waits for the round under way and for its
#: own, and both are a quarter as long.
SMALL_PEEK_SIZE: Final = 16 * 1024

#: Reads of one output pipe per round, each of at most a pipe's size.
_OUTPUT_READS: Final = 4


class Scratch:
    """The pipe that tee copies into. Empty between calls, or made anew."""

    def __init__(self, size: int = 1024 * 1024) -> None:
        self._wanted = size
        self._ends: tuple[int, int] | None = None

    def copy(self, source: int, size: int) -> bytes:
        """Return up to `size` bytes at the head of `source` and leave them there; b"" when it is empty."""
        if self._ends is None:
            self._ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            linux.set_pipe_size(self._ends[1], self._wanted)
        read, write = self._ends
        try:
            count = linux.tee(source, write, size)
            parts = []
            while count:
                part = os.read(read, count)
                parts.append(part)
                count -= len(part)
        except BlockingIOError:
            return b""
        except BaseException:
            self.close()  # what is left in it would come in front of the next copy
            raise
        return b"".join(parts)

    def close(self) -> None:
        """Let go of the pipe."""
        if self._ends is not None:
            ends, self._ends = self._ends, None
            for fd in ends:
                os.close(fd)


class RunnerPipes:
    """One runner's near ends.

    Args:
      fds: events (read end), output (read end), orders (socket); owned from here on.
    """

    def __init__(self, spec: RunnerSpec, fds: list[int], *, adopted: bool, lines_per_second: int) -> None:
        self.id = spec.id
        self.events, self.output, orders = fds
        self._orders = socket.socket(fileno=orders)
        self._orders.setblocking(False)
        self._limit = max_frame(spec.pipe_size)
        self._unsynced = adopted
        # An adopted pipe may begin with the rest of one frame, and the whole next one has to come into sight.
        self._reach = 2 * PEEK_SIZE if adopted else PEEK_SIZE
        self._buffer = bytearray(self._reach)
        self.parser = OutputParser(lines_per_second)

    def peek(
        self, scratch: Scratch, stored_seq: int, share: int = PEEK_SIZE
    ) -> tuple[list[Frame], int, RemoteWireError | None]:
        """Return (complete frames, bytes they take in the pipe, what breaks the protocol behind them).

        They are looked for in the first `share` bytes; when these are part of one frame only, in all of a round's.
        """
        data = scratch.copy(self.events, self._reach if self._unsynced else share)
        skipped = 0
        if self._unsynced and data:
            position = find_resync(data, stored_seq, self._limit)
            if position is None and len(data) < self._reach:
                return [], 0, None  # the next frame has not come yet, or not wholly
            skipped = position or 0
            self._unsynced = False
            self._reach = PEEK_SIZE
        frames: list[Frame] = []
        size = skipped
        try:
            for frame in read_frames(data, self._limit, skipped):
                frames.append(frame)
                size += frame.size
        except RemoteWireError as error:
            return frames, size, error
        if not frames and share <= len(data) < PEEK_SIZE:
            return self.peek(scratch, stored_seq)
        return frames, size, None

    def consume(self, size: int) -> None:
        """Take `size` bytes that `peek` has shown, with one system call.

        A kill between two reads would leave half a frame at the head of the pipe.
        """
        if size:
            taken = os.readv(self.events, [memoryview(self._buffer)[:size]])
            if taken != size:
                raise RuntimeError(
                    f"pipe of runner {self.id} gave {taken} of {size} bytes: somebody else reads it"
                )

    def read_output(self) -> bytes:
        """Return what the output pipe holds, up to a few pipes' worth, without waiting."""
        parts = []
        for _ in range(_OUTPUT_READS):
            if not linux.bytes_to_read(self.output):
                break
            parts.append(os.read(self.output, PEEK_SIZE))
        return b"".join(parts)

    def at_end(self) -> bool:
        """Whether the events pipe is empty and nobody can write to it any more."""
        poll = select.poll()
        poll.register(self.events, select.POLLIN)
        found = poll.poll(0)
        return bool(found) and not found[0][1] & select.POLLIN

    def order(self, order: Order) -> bool:
        """Give an order; return whether the runner's socket took it."""
        try:
            seqpacket.send(self._orders, pack(order))
        except OSError:  # it is dead, or does not read: its exit or its deadline decides
            return False
        return True

    def close(self) -> None:
        """Let go of all ends."""
        os.close(self.events)
        os.close(self.output)
        self._orders.close()


class Poller:
    """Tells which pipes have something to read, in one wait for all; a bell ends that wait as well.

    The epoll descriptor is readable itself when one of its members is, so one task can wait for it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._rung = False
        self._epoll.register(self._bell, select.EPOLLIN)

    def fileno(self) -> int:
        """Descriptor to wait for."""
        return self._epoll.fileno()

    def watch(self, fd: int) -> None:
        """Tell of this one from here on."""
        with contextlib.suppress(FileExistsError):
            self._epoll.register(fd, select.EPOLLIN)

    def rest(self, fd: int) -> None:
        """Do not tell of this one, even though it is readable or has ended (a hang-up cannot be masked)."""
        with contextlib.suppress(FileNotFoundError, OSError):
            self._epoll.unregister(fd)

    def ring(self) -> None:
        """Be readable until `ready` is called."""
        if not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def ready(self) -> set[int]:
        """Return the descriptors that are readable now; the bell is silent again."""
        found = {fd for fd, _ in self._epoll.poll(0)}
        if self._rung:
            self._rung = False
            os.eventfd_read(self._bell)
            found.discard(self._bell)
        return found

    def close(self) -> None:
        """Close the epoll descriptor and the bell; `ring` does nothing from here on."""
        self._rung = True
        self._epoll.close()
        os.close(self._bell)
