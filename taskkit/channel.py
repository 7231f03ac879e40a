"""A trio end of a SEQPACKET socket that carries typed messages.

Sending never waits: what the kernel does not take now is queued, in order, up to a bound. So two processes that send
to each other cannot block each other (DESIGN §3.2). One task may receive; anybody may send.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import trio

from taskkit import seqpacket
from taskkit.errors import RemoteWireError
from taskkit.wire.codec import pack, unpack
from taskkit.wire.messages import Message

_M = TypeVar("_M")

#: Messages taken in at once: waiting for each by itself takes the loop 40 µs.
_AT_ONCE: Final = 64

#: Messages that may wait for a peer that does not read. A gateway with 1,000 runners repeats 2,000 messages to its
#: successor; ten times that is a peer that hangs, and the link is given up.
MAX_QUEUED: Final = 20_000


class Channel(Generic[_M]):
    """Messages to and from one peer.

    Args:
      sock: connected SEQPACKET socket; the channel owns it and makes it non-blocking.
      expected: struct or union of structs that the peer may send.

    Attributes:
      broken: nothing more is sent.
      size: bytes of the message that `receive` has returned last.
    """

    def __init__(self, sock: socket.socket, expected: Any) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._expected = expected
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._more = trio.Event()
        self._received: deque[tuple[_M, list[int], int] | RemoteWireError] = deque()
        self.broken = False
        self.size = 0

    @property
    def descriptor(self) -> int:
        """Of the socket; still the channel's."""
        return self._sock.fileno()

    @property
    def is_calm(self) -> bool:
        """Whether nothing waits to be sent, or has been taken in and not been returned."""
        return not self._queue and not self._received

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send `message`, now or as soon as the peer reads; the descriptors stay the caller's.

        After the peer has gone the message is dropped: `receive` is who tells.
        """
        if self.broken:
            return
        payload = pack(message)
        if not self._queue:
            try:
                seqpacket.send(self._sock, payload, tuple(fds))
                return
            except BlockingIOError:
                pass
            except OSError:
                self._give_up()
                return
        if len(self._queue) >= MAX_QUEUED:
            self._give_up()
            return
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))  # noqa: PERF401 - those made so far are closed when the next one fails
        except (
            OSError
        ):  # no descriptor is left: the link is given up, and its successor is told everything anew
            seqpacket.close_all(copies)
            self._give_up()
            return
        self._queue.append((payload, tuple(copies)))
        self._more.set()

    def _give_up(self) -> None:
        self.broken = True
        while self._queue:
            seqpacket.close_all(list(self._queue.popleft()[1]))
        # Wakes our own receiver with an end of file, whoever is to blame.
        with_socket = self._sock
        try:
            with_socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    async def run(self) -> None:
        """Send what had to wait, until cancelled."""
        while True:
            await self._more.wait()
            while self._queue and not self.broken:
                payload, fds = self._queue[0]
                try:
                    seqpacket.send(self._sock, payload, fds)
                except BlockingIOError:
                    # Closed while it waited: `broken` ends the loop.
                    with contextlib.suppress(trio.ClosedResourceError):
                        await trio.lowlevel.wait_writable(self._sock)
                    continue
                except OSError:
                    self._give_up()
                    break
                self._queue.popleft()
                seqpacket.close_all(list(fds))
            self._more = trio.Event()
            await trio.lowlevel.checkpoint()

    async def receive(self) -> tuple[_M, list[int]]:
        """Return the next message and the descriptors that came along; they are the caller's to close.

        Raises:
          trio.EndOfChannel: the peer has closed or died, or this side has given it up.
          RemoteWireError: the peer broke the protocol.
        """
        if self._received:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._received:
            if self._sock.fileno() == -1:
                raise trio.EndOfChannel
            try:
                await trio.lowlevel.wait_readable(self._sock)
            except trio.ClosedResourceError:  # closed by another task of ours while this one waited
                raise trio.EndOfChannel from None
            self._take_in()
        found = self._received.popleft()
        if isinstance(found, RemoteWireError):
            raise found
        message, fds, self.size = found
        return message, fds

    def _take_in(self) -> None:
        """Take in what is there, up to the first packet that breaks the protocol.

        Raises:
          trio.EndOfChannel: nothing is there, and nothing will be.
        """
        for _ in range(_AT_ONCE):
            try:
                received = seqpacket.receive(self._sock)
            except BlockingIOError:
                return
            except RemoteWireError as error:
                self._received.append(error)
                return
            except OSError:
                received = None
            if received is None:
                if self._received:
                    return  # the end is found again
                raise trio.EndOfChannel
            payload, fds = received
            try:
                self._received.append((unpack(payload, self._expected), fds, len(payload)))
            except RemoteWireError as error:
                seqpacket.close_all(fds)
                self._received.append(error)
                return

    def close(self) -> None:
        """Close the socket; the peer sees an end of file. What is queued is dropped."""
        self._give_up()
        for found in self._received:
            if not isinstance(found, RemoteWireError):
                seqpacket.close_all(found[1])
        self._received.clear()
        if self._sock.fileno() != -1:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
