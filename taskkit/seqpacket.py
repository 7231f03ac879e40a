"""Messages over a SEQPACKET socket, for whoever has no event loop.

One message is one packet. A message above INLINE_LIMIT crosses as a sealed memfd instead, so that a packet always
fits the socket's buffer. Descriptors come along by SCM_RIGHTS.
"""

from __future__ import annotations

import array
import os
import socket
import stat
from typing import Final

from taskkit import linux
from taskkit.errors import FrameTooLarge, LocalWireError, RemoteWireError

#: Largest packet, bytes. Linux's default SO_SNDBUF (212,992) holds three of them.
INLINE_LIMIT: Final = 64 * 1024

#: Largest message at all, bytes: a catalogue of 10,000 tasks, or the arguments of one run.
MESSAGE_LIMIT: Final = 64 * 1024 * 1024

#: Most descriptors in one packet (SCM_MAX_FD in the kernel's include/net/scm.h).
MAX_DESCRIPTORS: Final = 253

_PLAIN: Final = b"\x00"
_IN_MEMFD: Final = b"\x01"


def encode(payload: bytes, fds: tuple[int, ...] = ()) -> tuple[bytes, tuple[int, ...], int | None]:
    """Return (packet, descriptors to send, memfd to close after sending or None).

    Raises:
      LocalWireError: the message exceeds MESSAGE_LIMIT.
    """
    if len(payload) > MESSAGE_LIMIT:
        raise LocalWireError(f"a message may have {MESSAGE_LIMIT} bytes, this one has {len(payload)}")
    if len(payload) < INLINE_LIMIT:
        return _PLAIN + payload, fds, None
    memfd = linux.sealed_memfd("bulkhead-message", payload)
    return _IN_MEMFD, (memfd, *fds), memfd


def decode(packet: bytes, fds: list[int]) -> tuple[bytes, list[int]]:
    """Return (payload, descriptors that came along); takes ownership of `fds`.

    Raises:
      RemoteWireError: the packet is none of ours. The descriptors are closed.
    """
    kind, payload = packet[:1], packet[1:]
    if kind == _PLAIN:
        return payload, fds
    if kind == _IN_MEMFD and fds and not payload:
        memfd = fds.pop(0)
        try:
            status = os.fstat(memfd)
            if stat.S_ISREG(status.st_mode) and status.st_size <= MESSAGE_LIMIT:
                return linux.read_from_start(memfd, MESSAGE_LIMIT), fds
        finally:
            os.close(memfd)
        close_all(fds)
        raise FrameTooLarge(f"a message comes in a file of at most {MESSAGE_LIMIT} bytes")
    close_all(fds)
    raise RemoteWireError(f"a packet that starts with {packet[:8]!r}")


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody will use."""
    for fd in fds:
        os.close(fd)
    fds.clear()


def send(sock: socket.socket, payload: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send one message. Blocks while the peer's buffer is full, if `sock` blocks.

    Raises:
      BlockingIOError: `sock` does not block, and there is no room.
      OSError: the peer is gone (EPIPE, ECONNRESET).
    """
    packet, fds, memfd = encode(payload, fds)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
    finally:
        if memfd is not None:
            os.close(memfd)


def receive(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """Return the next message and its descriptors (close-on-exec, yours to close), or None at end of file.

    Raises:
      BlockingIOError: `sock` does not block, and nothing is there.
      RemoteWireError: the packet is too large, or none of ours.
    """
    size = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    packet, ancillary, flags, _ = sock.recvmsg(INLINE_LIMIT + 1, size, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            usable = array.array("i")
            usable.frombytes(data[: len(data) - len(data) % usable.itemsize])
            fds.extend(usable)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise RemoteWireError("a packet was cut: too large, or more descriptors than RLIMIT_NOFILE allows")
    if not packet:
        if fds:  # an end of file carries none
            close_all(fds)
            raise RemoteWireError("an empty packet with descriptors")
        return None
    return decode(packet, fds)
