"""A pipe between a writer and readers that are killed anywhere: every frame is stored once, in order, unchanged."""

from __future__ import annotations

import json

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from taskkit.wire.framing import MAGIC, VERSION, Frame, find_resync, pack_frame, read_frames

#: As events have it: JSON text, here with everything in it that looks like a header. A real header cannot be part
#: of it, as JSON escapes control characters, of which the version is one.
BODIES = st.lists(
    st.sampled_from([MAGIC.decode(), MAGIC.decode() + chr(VERSION) + "\x03", "B", "H", "x", "é", "\0" * 12]),
    max_size=12,
).map(lambda parts: json.dumps("".join(parts), ensure_ascii=False).encode())


class Pipe(RuleBasedStateMachine):
    """Bytes in a pipe; the rules are those of the gateway's round and of what can kill either side.

    Attributes:
      pipe: what the kernel holds.
      half: the rest of a frame of which the beginning is in the pipe.
      written, stored: bodies; the store has committed the latter, and their number is that of the newest frame.
      committed: bytes of the pipe that a round may consume.
      adopted: the reader is new and may stand in the middle of a frame.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pipe = bytearray()
        self.half = b""
        self.written: list[bytes] = []
        self.stored: list[bytes] = []
        self.adopted = False
        self.dead = False
        self.committed = 0

    @precondition(lambda self: not self.dead and not self.half)
    @rule(body=BODIES)
    def write(self, body: bytes) -> None:
        self.written.append(body)
        self.pipe += pack_frame(3, len(self.written), body)

    @precondition(lambda self: not self.dead and not self.half)
    @rule(body=BODIES, data=st.data())
    def write_a_part(self, body: bytes, data: st.DataObject) -> None:
        """The pipe is full in the middle of a frame."""
        frame = pack_frame(3, len(self.written) + 1, body)
        cut = data.draw(st.integers(1, len(frame) - 1))
        self.pipe += frame[:cut]
        self.half = frame[cut:]
        self.written.append(body)

    @precondition(lambda self: self.half and not self.dead)
    @rule()
    def write_the_rest(self) -> None:
        self.pipe += self.half
        self.half = b""

    @precondition(lambda self: not self.dead)
    @rule()
    def kill_the_writer(self) -> None:
        self.dead = True
        if self.half:
            self.written.pop()  # nobody was told that it had been said
            self.half = b""

    def peek(self) -> list[Frame]:
        """Return the whole frames at the head; `committed` says how many bytes they take."""
        data = bytes(self.pipe)
        skipped = 0
        if self.adopted and data:
            position = find_resync(data, len(self.stored))
            if position is None:
                return []  # the next frame has not come yet, or not wholly
            skipped, self.adopted = position, False
        frames = list(read_frames(memoryview(data)[skipped:]))
        self.committed = skipped + sum(frame.size for frame in frames)
        return frames

    def commit(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame.seq > len(self.stored):
                assert frame.seq == len(self.stored) + 1, "no hole"
                self.stored.append(frame.body)

    @rule()
    def round(self) -> None:
        self.commit(self.peek())
        del self.pipe[: self.committed]
        self.committed = 0

    @rule()
    def kill_the_reader_before_its_commit(self) -> None:
        self.peek()
        self.adopted, self.committed = True, 0

    @rule(data=st.data())
    def kill_the_reader_while_it_consumes(self, data: st.DataObject) -> None:
        """The commit is done; any number of the committed bytes have left the pipe."""
        self.commit(self.peek())
        del self.pipe[: data.draw(st.integers(0, self.committed))]
        self.adopted, self.committed = True, 0

    @invariant()
    def nothing_is_changed_doubled_or_out_of_order(self) -> None:
        assert self.stored == self.written[: len(self.stored)]

    def teardown(self) -> None:
        """In the end everything that was said is there."""
        if self.half:
            self.write_the_rest()
        self.round()
        assert self.stored == self.written


TestPipe = Pipe.TestCase
