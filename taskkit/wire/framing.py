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
from typing import Final, NamedTuple

from taskkit.errors import CorruptFrame, FrameTooLarge, LocalWireError, VersionMismatch

MAGIC: Final = b"BH"
VERSION: Final = 1
_HEADER: Final = struct.Struct(">2sBBIQ")
_CHECKSUM: Final = struct.Struct(">I")
_WHOLE: Final = struct.Struct(">2sBBIQI")
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


class Frame(NamedTuple):
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


def _refuse(found: tuple[bytes, int, int, int, int, int], start: bytes, limit: int) -> None:
    """Raise what is wrong with a header, if anything is."""
    magic, version, _, length, _, _ = found
    if magic != MAGIC:
        raise CorruptFrame(f"expected a frame, found {start!r}")
    if version != VERSION:
        raise VersionMismatch(f"frame of version {version}, this side speaks {VERSION}")
    if HEADER_SIZE + length > limit:
        # Refused on the announcement: waiting for a body that cannot come would block the pipe for good.
        raise FrameTooLarge(f"frame announces {HEADER_SIZE + length} bytes, {limit} are allowed")


def read_frames(data: bytes | memoryview, limit: int = MAX_FRAME, position: int = 0) -> Iterator[Frame]:
    """Yield the complete frames in `data` from `position` on, oldest first.

    The caller adds up `Frame.size` to know how much to consume. A half frame at the end yields nothing: offer the
    bytes again when more have come.

    Raises:
      RemoteWireError: what follows the frames yielded so far is no frame. What was yielded stays valid.
    """
    # By position, not by slicing what is left: that takes twice as long per frame.
    whole = data if isinstance(data, bytes) else bytes(data)
    end = len(whole)
    room = limit - HEADER_SIZE
    while (body := position + HEADER_SIZE) <= end:
        found = _WHOLE.unpack_from(whole, position)
        magic, version, kind, length, seq, checksum = found
        if magic != MAGIC or version != VERSION or length > room:
            _refuse(found, whole[position : position + 16], limit)
        stop = body + length
        if stop > end:
            return
        packed = whole[body:stop]
        if zlib.crc32(packed, zlib.crc32(whole[position : position + _HEADER.size])) != checksum:
            raise CorruptFrame(f"checksum of frame {seq} is wrong")
        yield Frame(kind, seq, packed)
        position = stop
    rest = whole[position:end]
    if rest[:2] != MAGIC[: len(rest)]:
        raise CorruptFrame(f"expected a frame, found {rest[:16]!r}")


def find_resync(data: bytes | memoryview, stored_seq: int, limit: int = MAX_FRAME) -> int | None:
    """Return the position of the first sound frame with `seq` ≤ `stored_seq` + 1, or None.

    For adoption only: a gateway that was killed inside its one consuming read may leave the rest of a frame at the
    head of the pipe. Only a frame with a valid checksum counts, so that event data which looks like a header is
    passed over.
    """
    whole = bytes(data)
    position = whole.find(MAGIC)
    while position != -1:
        try:
            frame = next(read_frames(whole, limit, position), None)
        except (CorruptFrame, FrameTooLarge, VersionMismatch):
            frame = None
        if frame is not None and frame.seq <= stored_seq + 1:
            return position
        position = whole.find(MAGIC, position + 1)
    return None
