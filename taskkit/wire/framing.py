"""Frames on the events pipe: header, checksum, taking them apart again.

A frame is a 20-byte header and a body:

     0      2      3      4           8                16          20
    +------+------+------+-----------+----------------+-----------+----------
    | BH   | ver  | kind | length    | seq            | crc32     | body ...
    +------+------+------+-----------+----------------+-----------+----------

All numbers are big-endian. `length` counts the body only. `seq` counts the frames of one pipe from 1 without
holes. The checksum covers the first 16 bytes and the body, so that a damaged length or number is noticed, too.

The reader holds no state between calls: what it does not consume stays in the kernel's pipe, which is the resend
buffer (DESIGN §3.1).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from taskkit.errors import CorruptFrame, FrameTooLarge, LocalWireError, VersionMismatch

MAGIC: Final = b"BH"
VERSION: Final = 1
_HEADER: Final = struct.Struct(">2sBBIQ")
_CHECKSUM: Final = struct.Struct(">I")
HEADER_SIZE: Final = _HEADER.size + _CHECKSUM.size  # 20

#: Bytes of events pipe to ask for. 256 KiB buffers about half a second of a busy task across a gateway restart;
#: past a per-user limit the kernel grants less (pipe(7), pipe-user-pages-soft), so read the size back.
PIPE_SIZE: Final = 256 * 1024

#: Largest frame, header included, on a pipe of full size. A frame must fit the pipe several times over, or tee
#: would never see it whole: at most a quarter of the granted size and 60 KiB.
MAX_FRAME: Final = 60 * 1024


def max_frame(pipe_size: int) -> int:
    """Return the largest frame in bytes, header included, for a pipe of `pipe_size` bytes."""
    return min(pipe_size // 4, MAX_FRAME)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came: `seq` counts from 1 per pipe, `body` is still packed."""

    kind: int
    seq: int
    body: bytes

    @property
    def size(self) -> int:
        """Bytes on the pipe, header included."""
        return HEADER_SIZE + len(self.body)


def pack_frame(kind: int, seq: int, body: bytes, limit: int = MAX_FRAME) -> bytes:
    """Return the bytes of one frame.

    Raises:
      LocalWireError: the frame would exceed `limit` bytes.
    """
    if HEADER_SIZE + len(body) > limit:
        raise LocalWireError(f"a frame may have {limit} bytes, this one has {HEADER_SIZE + len(body)}")
    head = _HEADER.pack(MAGIC, VERSION, kind, len(body), seq)
    return b"".join((head, _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(head))), body))


def _read_frame(data: memoryview, limit: int) -> Frame | None:
    if len(data) < HEADER_SIZE:
        if bytes(data[:2]) != MAGIC[: len(data)]:
            raise CorruptFrame(f"expected a frame, found {bytes(data[:16])!r}")
        return None
    magic, version, kind, length, seq = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise CorruptFrame(f"expected a frame, found {bytes(data[:16])!r}")
    if version != VERSION:
        raise VersionMismatch(f"frame of version {version}, this side speaks {VERSION}")
    end = HEADER_SIZE + length
    if end > limit:
        # Refused on the announcement: waiting for a body that cannot come would block the pipe for good.
        raise FrameTooLarge(f"frame announces {end} bytes, {limit} are allowed")
    if len(data) < end:
        return None
    body = bytes(data[HEADER_SIZE:end])
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if zlib.crc32(body, zlib.crc32(data[: _HEADER.size])) != checksum:
        raise CorruptFrame(f"checksum of frame {seq} is wrong")
    return Frame(kind, seq, body)


def read_frames(data: bytes | memoryview, limit: int = MAX_FRAME) -> Iterator[Frame]:
    """Yield the complete frames at the start of `data`, oldest first.

    The caller adds up `Frame.size` to know how much to consume. A half frame at the end yields nothing: offer the
    bytes again when more have come.

    Raises:
      RemoteWireError: what follows the frames yielded so far is no frame. What was yielded stays valid.
    """
    view = memoryview(data)
    while view:
        frame = _read_frame(view, limit)
        if frame is None:
            return
        yield frame
        view = view[frame.size :]


def find_resync(data: bytes | memoryview, stored_seq: int, limit: int = MAX_FRAME) -> int | None:
    """Return the position of the first sound frame with `seq` ≤ `stored_seq` + 1, or None.

    For adoption only: a gateway that was killed inside its one consuming read may leave the rest of a frame at the
    head of the pipe. Only a frame with a valid checksum counts, so that event data which looks like a header is
    passed over.
    """
    view = memoryview(data)
    whole = bytes(view)
    position = whole.find(MAGIC)
    while position != -1:
        try:
            frame = _read_frame(view[position:], limit)
        except (CorruptFrame, FrameTooLarge, VersionMismatch):
            frame = None
        if frame is not None and frame.seq <= stored_seq + 1:
            return position
        position = whole.find(MAGIC, position + 1)
    return None
