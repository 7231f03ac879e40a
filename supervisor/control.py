"""The operator socket: what the command line asks of a running supervisor."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Awaitable, Callable

import trio

from taskkit.channel import Channel
from taskkit.errors import RemoteWireError
from taskkit.wire.messages import Operation, Status

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds a client has to ask; the connection ends then.
_PATIENCE = 60.0


class OperatorSocket:
    """Answers operations. Only this user's processes may ask: the socket is 0600, and the peer's uid is checked.

    Args:
      operate: carries out an operation and returns the status afterwards; it has a deadline of its own.
    """

    def __init__(
        self, listener: socket.socket, uid: int, operate: Callable[[Operation], Awaitable[Status]]
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._uid = uid
        self._operate = operate

    @property
    def descriptor(self) -> int:
        """Of the listening socket."""
        return self._listener.fileno()

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._listener)
                try:
                    sock, _ = self._listener.accept()
                except (
                    OSError
                ):  # the client has gone already, or descriptors are short: the next may fare better
                    await trio.sleep(0.05)
                    continue
                if _peer_uid(sock) not in (0, self._uid):
                    sock.close()
                    continue
                nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        channel: Channel[Operation] = Channel(sock, Operation)
        try:
            while True:
                with trio.fail_after(_PATIENCE):
                    operation, fds = await channel.receive()
                for fd in fds:
                    socket.close(fd)
                channel.send(await self._operate(operation))
        except (trio.EndOfChannel, trio.TooSlowError, RemoteWireError) as error:
            logger.debug("operator connection ended: %r", error)
        finally:
            channel.close()


def _peer_uid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)
