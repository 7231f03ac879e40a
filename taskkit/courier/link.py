"""One end of a SEQPACKET socket that never blocks: messages wait in a bounded queue instead."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from taskkit import seqpacket
from taskkit.wire import codec
from taskkit.wire.messages import Message

#: Bytes that may wait to be sent before the owner stops reading. Everything the courier sends answers
#: something that it read or polled, so this bounds it; an answer may have the 8 MiB of a result once more.
BACKLOG_LIMIT: Final = 1024 * 1024


class LinkBroken(Exception):
    """The other side is gone (end of file, EPIPE, ECONNRESET); a new link has to come."""


class Received(NamedTuple):
    """A message, the descriptors that came along (the receiver's to close), its size in bytes."""

    message: Any
    fds: list[int]
    size: int


class Link:
    """Sends and receives messages without waiting.

    Args:
      sock: connected SEQPACKET socket; the link makes it non-blocking and owns it.
      expected: struct or union of what may come.
    """

    def __init__(self, sock: socket.socket, expected: Any) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._expected = expected
        self._waiting: deque[bytes] = deque()
        self._backlog = 0

    @property
    def wants_write(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._waiting)

    @property
    def is_congested(self) -> bool:
        """Whether so much waits that its owner should read nothing more from this peer."""
        return self._backlog >= BACKLOG_LIMIT

    def send(self, message: Message) -> None:
        """Send `message` now or when there is room.

        Raises:
          LinkBroken: nobody will read it.
          LocalWireError: it cannot be packed.
        """
        payload = codec.pack(message)
        self._waiting.append(payload)
        self._backlog += len(payload)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as there is room.

        Raises:
          LinkBroken: nobody will read it.
        """
        while self._waiting:
            try:
                seqpacket.send(self.sock, self._waiting[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkBroken(str(error)) from error
            self._backlog -= len(self._waiting.popleft())

    def receive(self, limit: int) -> Iterator[Received]:
        """Yield up to `limit` messages that are there.

        Raises:
          LinkBroken: end of file, or the socket failed.
          RemoteWireError: the peer broke the protocol. Drop the link.
        """
        for _ in range(limit):
            try:
                packet = seqpacket.receive(self.sock)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkBroken(str(error)) from error
            if packet is None:
                raise LinkBroken("end of file")
            yield self._unpack(*packet)

    def _unpack(self, payload: bytes, fds: list[int]) -> Received:
        try:
            return Received(codec.unpack(payload, self._expected), fds, len(payload))
        except BaseException:
            seqpacket.close_all(fds)
            raise

    def close(self) -> None:
        """Close the socket; what waits is lost."""
        self.sock.close()
        self._waiting.clear()
        self._backlog = 0
