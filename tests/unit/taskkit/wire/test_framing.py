"""Frames taken apart at every cut, with every damage."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskkit.errors import CorruptFrame, FrameTooLarge, LocalWireError, RemoteWireError, VersionMismatch
from taskkit.wire.framing import (
    HEADER_SIZE,
    MAX_FRAME,
    Frame,
    find_resync,
    max_frame,
    pack_frame,
    read_frames,
)

BODIES = (b"", b"x", b"BH", b"\x00" * 30, bytes(range(256)), b"BH\x01\x03" * 20, b"long" * 500)


def stream_of(bodies: Iterable[bytes], first: int = 1) -> tuple[bytes, list[Frame]]:
    """Return the bytes of a pipe with these bodies, and the frames a reader must find."""
    frames = [Frame(seq % 250 + 1, seq, body) for seq, body in enumerate(bodies, first)]
    return b"".join(pack_frame(frame.kind, frame.seq, frame.body) for frame in frames), frames


class Pipe:
    """A reader as the gateway is one: what is not consumed is offered again."""

    def __init__(self) -> None:
        self.waiting = b""
        self.frames: list[Frame] = []

    def receive(self, data: bytes) -> None:
        self.waiting += data
        consumed = 0
        try:
            for frame in read_frames(self.waiting):
                self.frames.append(frame)
                consumed += frame.size
        finally:
            self.waiting = self.waiting[consumed:]


def received(parts: Iterable[bytes]) -> list[Frame]:
    """Return the frames of a stream that arrives in `parts`, and check that nothing is left."""
    pipe = Pipe()
    for part in parts:
        pipe.receive(part)
    assert pipe.waiting == b""
    return pipe.frames


def test_the_header_is_for_ever() -> None:
    assert pack_frame(3, 7, b"hello") == bytes.fromhex("4248 01 03 00000005 0000000000000007") + (
        0xADF2ADD7.to_bytes(4, "big") + b"hello"
    )


def test_whole() -> None:
    data, frames = stream_of(BODIES)
    assert received([data]) == frames


def test_byte_by_byte() -> None:
    data, frames = stream_of(BODIES)
    assert received(data[at : at + 1] for at in range(len(data))) == frames


def test_every_single_cut() -> None:
    data, frames = stream_of(BODIES)
    for at in range(len(data) + 1):
        assert received([data[:at], data[at:]]) == frames


def test_200_random_cuts(rng: random.Random) -> None:
    data, frames = stream_of(BODIES * 3)
    for _ in range(200):
        cuts = sorted(rng.choices(range(len(data)), k=rng.randrange(1, 30)))
        parts = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert received(parts) == frames


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_any_bodies_at_any_cut(bodies: list[bytes], data: st.DataObject) -> None:
    whole, frames = stream_of(bodies)
    at = data.draw(st.integers(0, len(whole)))
    assert received([whole[:at], whole[at:]]) == frames


def test_reading_begins_anywhere() -> None:
    data, frames = stream_of(BODIES)
    assert list(read_frames(b"rest of a frame" + data, position=15)) == frames


def test_a_memoryview_is_as_good() -> None:
    data, frames = stream_of(BODIES)
    assert list(read_frames(memoryview(data))) == frames


def test_a_frame_does_not_keep_the_read_buffer() -> None:
    buffer = bytearray(pack_frame(3, 1, b"keep me"))
    (frame,) = read_frames(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert frame.body == b"keep me"


def test_size_counts_what_to_consume() -> None:
    data, frames = stream_of(BODIES)
    assert sum(frame.size for frame in frames) == len(data)


def filler(size: int) -> bytes:
    """Return sound frames of `size` bytes and more: whatever a damaged length announces has arrived then."""
    body = b"f" * 1000
    return b"".join(pack_frame(3, seq, body) for seq in range(100, 101 + size // 1020))


@pytest.mark.parametrize("body", [b"", b"abc", bytes(range(40))], ids=len)
def test_every_bit_flip_is_refused(body: bytes) -> None:
    """A flip may look like a longer frame for a while; once its bytes are there it is refused."""
    before, sound = stream_of([b"before"])
    damaged = pack_frame(3, 2, body)
    after = filler(MAX_FRAME)
    for bit in range(8 * len(damaged)):
        flipped = bytearray(damaged)
        flipped[bit // 8] ^= 1 << bit % 8
        pipe = Pipe()
        with pytest.raises(RemoteWireError):
            pipe.receive(before + bytes(flipped) + after)
        assert pipe.frames == sound, f"what preceded bit {bit} stays valid, nothing else comes through"


def test_a_random_burst_of_damage_is_refused(rng: random.Random) -> None:
    after = filler(MAX_FRAME)
    for _ in range(300):
        frame = bytearray(pack_frame(3, 1, rng.randbytes(60)))
        for at in rng.sample(range(len(frame)), rng.randrange(1, 12)):
            frame[at] ^= rng.randrange(1, 256)
        with pytest.raises(RemoteWireError):
            list(read_frames(bytes(frame) + after))


@pytest.mark.parametrize("size", range(1, 40))
def test_garbage_is_refused_from_its_first_byte(size: int) -> None:
    with pytest.raises(CorruptFrame):
        list(read_frames(b"#" * size))


def test_garbage_after_sound_frames_leaves_them_valid() -> None:
    data, frames = stream_of(BODIES)
    pipe = Pipe()
    with pytest.raises(CorruptFrame):
        pipe.receive(data + b"garbage")
    assert pipe.frames == frames
    assert pipe.waiting == b"garbage"


def test_oversize_is_refused_on_the_announcement() -> None:
    header = pack_frame(3, 1, bytes(500))[:HEADER_SIZE]
    with pytest.raises(FrameTooLarge, match="520"):
        list(read_frames(header, limit=519))
    assert list(read_frames(header, limit=520)) == []


def test_another_version_is_refused_on_the_header() -> None:
    frame = bytearray(pack_frame(3, 1, b""))
    frame[2] = 2
    with pytest.raises(VersionMismatch, match="2"):
        list(read_frames(bytes(frame)))


def test_packing_keeps_the_limit() -> None:
    assert len(pack_frame(3, 1, bytes(MAX_FRAME - HEADER_SIZE))) == MAX_FRAME
    with pytest.raises(LocalWireError):
        pack_frame(3, 1, bytes(MAX_FRAME - HEADER_SIZE + 1))
    with pytest.raises(LocalWireError):
        pack_frame(3, 1, b"12345", limit=HEADER_SIZE + 4)


@pytest.mark.parametrize(("pipe", "limit"), [(256 * 1024, 60 * 1024), (65536, 16384), (4096, 1024)])
def test_a_frame_fits_its_pipe_four_times(pipe: int, limit: int) -> None:
    assert max_frame(pipe) == limit


def test_resync_finds_the_next_frame_behind_the_rest_of_one() -> None:
    torn = pack_frame(3, 8, b"torn by a kill" * 9)
    rest, _ = stream_of(BODIES, first=9)
    for cut in range(1, len(torn)):
        data = torn[cut:] + rest
        assert find_resync(data, stored_seq=8) == len(torn) - cut
        assert next(iter(read_frames(data[len(torn) - cut :]))).seq == 9


def test_resync_at_the_head_is_zero() -> None:
    data, _ = stream_of(BODIES)
    assert find_resync(data, stored_seq=0) == 0


def test_resync_takes_duplicates_but_no_frame_behind_a_hole() -> None:
    assert find_resync(b"??" + pack_frame(3, 5, b""), stored_seq=7) == 2
    assert find_resync(b"??" + pack_frame(3, 8, b""), stored_seq=7) == 2
    assert find_resync(b"??" + pack_frame(3, 9, b""), stored_seq=7) is None


def test_resync_passes_over_what_only_looks_like_a_header() -> None:
    lure = b'{"text": "BH"}' + pack_frame(3, 1, b"damaged")[:-1] + b"X" + b"BH\x01\x03" + bytes(16)
    data = lure + pack_frame(3, 2, b"sound")
    assert find_resync(data, stored_seq=1) == len(lure)


@pytest.mark.parametrize("data", [b"", b"B", b"no frame here", b"BH" * 50, pack_frame(3, 1, b"half")[:-1]])
def test_resync_without_a_sound_frame(data: bytes) -> None:
    assert find_resync(data, stored_seq=1) is None


def test_resync_never_raises(rng: random.Random) -> None:
    for _ in range(300):
        data = b"".join(
            rng.choices([b"BH", b"BH\x01", b"\0", rng.randbytes(9), pack_frame(3, 3, b"z")], k=30)
        )
        found = find_resync(data, stored_seq=3)
        assert found is None or next(iter(read_frames(data[found:]))).seq <= 4
