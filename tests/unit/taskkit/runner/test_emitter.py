"""Whole frames in order: through signals, threads, full pipes, forked children."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from taskkit import linux
from taskkit.runner import emitter
from taskkit.runner.emitter import Emitter
from taskkit.wire.codec import pack_runner_frame, unpack_runner_frame
from taskkit.wire.framing import MAX_FRAME, Frame, max_frame, read_frames
from taskkit.wire.messages import Event, Finished, Progress, RunnerMessage, Started, TaskFailure

PIPE = 64 * 1024


class Pipe:
    """An events pipe whose other end is read here, all at once or by a thread."""

    def __init__(self, blobs: Path, size: int = PIPE) -> None:
        self.read, self.write = os.pipe()
        self.size = linux.set_pipe_size(self.write, size)
        self.directory = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY)
        self.blobs = blobs
        self.emitter = Emitter(self.write, self.size, self.directory)
        self.data = bytearray()
        self._reader: threading.Thread | None = None

    def take(self) -> list[RunnerMessage]:
        """Return what is in the pipe now."""
        while linux.bytes_to_read(self.read):
            self.data += os.read(self.read, 1 << 20)
        return self.messages()

    def frames(self) -> list[Frame]:
        """Return every frame so far; the last one is whole as well."""
        found = list(read_frames(bytes(self.data), max_frame(self.size)))
        assert sum(frame.size for frame in found) == len(self.data), "half a frame is left"
        assert [frame.seq for frame in found] == list(range(1, len(found) + 1))
        return found

    def messages(self) -> list[RunnerMessage]:
        """Return every message so far."""
        return [unpack_runner_frame(frame) for frame in self.frames()]

    def read_slowly(self, rng: random.Random) -> None:
        """Read in a thread, in random pieces with pauses, so that writes block in their middle."""

        def read() -> None:
            while part := os.read(self.read, rng.choice((1, 7, 100, 4096, 65536))):
                self.data.extend(part)
                if rng.random() < 0.05:
                    time.sleep(rng.random() / 2000)

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def finish(self) -> list[RunnerMessage]:
        """Close the write end, wait for the thread; return every message."""
        os.close(self.write)
        self.write = -1
        if self._reader is not None:
            self._reader.join(30)
            assert not self._reader.is_alive()
            self._reader = None
        return self.messages()

    def close(self) -> None:
        for fd in (self.write, self.read, self.directory):
            if fd != -1:
                os.close(fd)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    made = Pipe(tmp_path)
    yield made
    if made.write != -1:
        made.finish()
    made.close()


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.alarm(0)
        signal.signal(number, before)


def _event(n: int, size: int = 0) -> Event:
    return Event(token="tok", type="tick", data=b'{"n":%d,"x":"%s"}' % (n, b"x" * size))


# --- plain


def test_a_message_is_in_the_pipe_when_send_returns(pipe: Pipe) -> None:
    pipe.emitter.send(Started(token="tok"))
    pipe.emitter.send(_event(1))
    assert pipe.take() == [Started(token="tok"), _event(1)]


def test_a_value_too_large_for_a_frame_goes_to_a_blob_with_its_digest(pipe: Pipe) -> None:
    data = b'{"x":"' + os.urandom(200_000).hex().encode() + b'"}'
    pipe.emitter.event("tok", "big", data)
    (event,) = pipe.take()
    assert isinstance(event, Event)
    assert event.blob is not None
    assert (event.data, event.size, event.sha256) == (b"", len(data), hashlib.sha256(data).hexdigest())
    assert uuid.UUID(event.blob)
    assert (pipe.blobs / event.blob).read_bytes() == data
    assert (pipe.blobs / event.blob).stat().st_mode & 0o777 == 0o600


def test_every_size_around_the_limit_fits_a_frame_or_goes_to_a_blob(tmp_path: Path) -> None:
    for size in (4096, 8192, 65536, 262144):
        pipe = Pipe(tmp_path, size)
        try:
            limit = pipe.emitter.inline_limit
            for length in range(limit - 20, limit + 3):
                data = b"1" * length
                name = "é" * 5
                pipe.emitter.event("t" * 16, name, data)
                event = pipe.take()[-1]
                assert isinstance(event, Event)
                assert (event.blob is None) == (length + 4 * len(name) <= limit)
        finally:
            pipe.close()


def test_a_blob_that_cannot_be_written_is_an_error_and_leaves_nothing(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="100000 bytes cannot be stored in the state directory: No space"
    ) as error:
        pipe.emitter.event("tok", "big", b"1" * 100_000)
    assert (error.value.errno, error.value.filename) == (28, str(pipe.blobs)), "it says where"
    monkeypatch.undo()
    assert list(pipe.blobs.iterdir()) == []
    pipe.emitter.send(_event(1))
    assert pipe.take() == [_event(1)]


def test_a_large_result_goes_to_a_blob_a_small_one_does_not(pipe: Pipe) -> None:
    pipe.emitter.finished(Finished(token="tok", ending="returned", result=b"1" * 1000))
    pipe.emitter.finished(Finished(token="tok", ending="returned", result=b"1" * 50_000))
    small, large = pipe.take()
    assert isinstance(small, Finished)
    assert isinstance(large, Finished)
    assert small.result == b"1" * 1000
    assert large.blob is not None
    assert (large.size, (pipe.blobs / large.blob).stat().st_size) == (50_000, 50_000)


def test_a_large_result_waits_for_room(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real, full = os.fsync, [OSError(28, "No space left on device")] * 3

    def fsync(fd: int) -> None:
        if full:
            raise full.pop()
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(emitter, "_RESULT_PAUSE", 0.001)
    pipe.emitter.finished(Finished(token="tok", ending="returned", result=b"1" * 50_000))
    (told,) = pipe.take()
    assert isinstance(told, Finished)
    assert (told.ending, told.size) == ("returned", 50_000)
    assert [path.name for path in pipe.blobs.iterdir()] == [told.blob]


def test_a_large_result_that_finds_no_room_is_a_failure_that_says_so(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(emitter, "RESULT_PATIENCE", 0.01)
    monkeypatch.setattr(emitter, "_RESULT_PAUSE", 0.001)
    pipe.emitter.finished(Finished(token="tok", ending="returned", result=b"1" * 50_000))
    (told,) = pipe.take()
    assert isinstance(told, Finished)
    assert told.failure is not None
    assert (told.ending, told.failure.exception) == ("raised", "builtins.OSError")
    assert str(pipe.blobs) in told.failure.message
    assert list(pipe.blobs.iterdir()) == []


@pytest.mark.parametrize("size", [4096, 8192, 65536, 262144])
@pytest.mark.parametrize("letter", ["a", "é", "漢", "😀"])
def test_a_failure_is_told_whatever_its_length(tmp_path: Path, size: int, letter: str) -> None:
    pipe = Pipe(tmp_path, size)
    try:
        failure = TaskFailure(
            exception="a.B" + letter * 500, message=letter * 200_000, traceback=letter * 900_000 + "the end"
        )
        message = Finished(token="tok", ending="raised", failure=failure, retry_in=3.0)
        pipe.emitter.finished(message)
        (told,) = pipe.take()
        assert isinstance(told, Finished)
        assert told.failure is not None
        assert told.failure.exception.startswith("a.B")
        assert told.failure.traceback.endswith("the end")
        assert told.retry_in == 3.0
    finally:
        pipe.close()


def test_a_short_failure_is_told_as_it_is(pipe: Pipe) -> None:
    failure = TaskFailure(exception="builtins.ValueError", message="no", traceback="Traceback …")
    pipe.emitter.finished(Finished(token="tok", ending="raised", failure=failure))
    assert pipe.take() == [Finished(token="tok", ending="raised", failure=failure)]


def test_the_announced_overhead_of_an_event_is_enough() -> None:
    event = Event(token="t" * 16, type="x" * 200, data=b"1" * 60_000)
    assert len(pack_runner_frame(event, 2**63, MAX_FRAME + 10_000)) - 60_200 <= 148


def test_a_closed_descriptor_is_an_oserror(pipe: Pipe) -> None:
    copy = os.dup(pipe.write)
    broken = Emitter(copy, pipe.size, pipe.directory)
    os.close(copy)
    with pytest.raises(OSError, match="Bad file descriptor"):
        broken.send(_event(1))


# --- progress


def _fill(pipe: Pipe) -> int:
    sent = 0
    while linux.bytes_to_read(pipe.read) <= pipe.size * 3 // 4:
        sent += 1
        pipe.emitter.send_progress(Progress(token="tok", data=b'{"n":%d}' % sent))
    return sent


def test_progress_is_coalesced_when_the_pipe_is_three_quarters_full(pipe: Pipe) -> None:
    sent = _fill(pipe)
    for n in range(sent + 1, sent + 1001):
        pipe.emitter.send_progress(Progress(token="tok", data=b'{"n":%d}' % n))
    assert len(pipe.take()) == sent
    pipe.emitter.send(_event(1))
    held, event = pipe.take()[sent:]
    assert held == Progress(token="tok", data=b'{"n":%d}' % (sent + 1000)), "the newest one, before the event"
    assert event == _event(1)


def test_a_newer_progress_makes_the_held_one_void(pipe: Pipe) -> None:
    sent = _fill(pipe)
    pipe.emitter.send_progress(Progress(token="tok", data=b'"held"'))
    pipe.take()
    pipe.emitter.send_progress(Progress(token="tok", data=b'"newer"'))
    assert pipe.take()[sent:] == [Progress(token="tok", data=b'"newer"')]


def test_progress_of_another_attempt_is_not_lost_to_a_newer_one(pipe: Pipe) -> None:
    """In a shared pool two attempts speak through one pipe: each keeps its own newest progress."""
    sent = _fill(pipe)
    pipe.emitter.send_progress(Progress(token="one", data=b"1"))
    pipe.emitter.send_progress(Progress(token="two", data=b"2"))
    pipe.take()
    pipe.emitter.finished(Finished(token="one", ending="returned"))
    pipe.emitter.finished(Finished(token="two", ending="returned"))
    rest = pipe.take()[sent:]
    for token in ("one", "two"):
        mine = [type(message) for message in rest if getattr(message, "token", "") == token]
        assert mine == [Progress, Finished]


@pytest.mark.parametrize("size", [0, 1_000, 2_000, 2_100, 4_000, 9_000])
def test_progress_never_blocks(pipe: Pipe, size: int) -> None:
    """Writes of 2.1 KB take a page each: such a pipe is full with half its bytes."""
    _stuff(pipe, size)
    with _handling(signal.SIGALRM, _give_up):
        signal.alarm(20)
        for n in range(1_000):
            pipe.emitter.send_progress(Progress(token="tok", data=b'{"n":%d}' % n))
    pipe.take()


def _give_up(*_: object) -> None:
    raise AssertionError("it blocks")


def _stuff(pipe: Pipe, size: int) -> None:
    """Write events of `size` until another one would block, or nearly so."""
    poll = select.poll()
    poll.register(pipe.write, select.POLLOUT)
    while poll.poll(0) and linux.bytes_to_read(pipe.read) + size + 200 < pipe.size - 8192:
        pipe.emitter.send(_event(1, size))
    while poll.poll(0):
        pipe.emitter.send(_event(1))


# --- who may speak


def test_a_forked_child_may_not_speak(pipe: Pipe) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            pipe.emitter.send(_event(1))
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    pipe.emitter.send(_event(2))
    assert pipe.take() == [_event(2)]


def test_a_signal_handler_may_not_speak_inside_a_call(pipe: Pipe) -> None:
    """The pipe is full, the call blocks, the handler speaks: refused, and the blocked frame stays whole."""
    pipe.read_slowly(random.Random(1))
    complaints: list[str] = []

    def speak(*_: object) -> None:
        try:
            pipe.emitter.send(_event(-1))
        except RuntimeError as error:
            complaints.append(str(error))

    with _handling(signal.SIGALRM, speak):
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for n in range(3_000):
            pipe.emitter.send(_event(n, 2_000))
            if len(complaints) > 20:
                break
    messages = pipe.finish()
    assert complaints
    assert all("signal handler" in complaint for complaint in complaints)
    assert [message for message in messages if message != _event(-1)] == [
        _event(i, 2_000) for i in range(n + 1)
    ]


def test_threads_take_turns(pipe: Pipe) -> None:
    pipe.read_slowly(random.Random(2))

    def speak(thread: int) -> None:
        for n in range(300):
            pipe.emitter.event(f"t{thread}", "tick", b"%d" % n + b" " * (n % 50) * 20)

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found: dict[str, list[int]] = {}
    for message in pipe.finish():
        assert isinstance(message, Event)
        found.setdefault(message.token, []).append(int(message.data))
    assert found == {f"t{number}": list(range(300)) for number in range(6)}


# --- interrupted


class Interrupted(BaseException):
    """What the test's signal handler raises."""


def _interrupting(rng: random.Random, emit: Callable[[int], None], wanted: int) -> tuple[int, set[int]]:
    """Call `emit(n)` under a raising alarm until it hit `wanted` times.

    Returns (calls, numbers whose call was interrupted).
    """
    interrupted: set[int] = set()
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupted

    number = 0
    with _handling(signal.SIGALRM, interrupt):
        while len(interrupted) < wanted:
            assert number < 500_000, "the alarm hits too rarely to prove anything"
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.0004 + 0.000001)
                emit(number)
                armed = False
            except Interrupted:
                armed = False
                interrupted.add(number)
            number += 1
    return number, interrupted


def test_frames_stay_whole_when_handlers_raise_in_the_middle(pipe: Pipe, rng: random.Random) -> None:
    """A frame is told wholly or not at all; what was not interrupted is told, in order, once."""
    pipe.read_slowly(random.Random(3))
    size = random.Random(rng.random())
    calls, interrupted = _interrupting(
        rng, lambda n: pipe.emitter.send(_event(n, size.choice((0, 10, 1_000, 9_000)))), 400
    )
    pipe.emitter.send(_event(calls))
    told = [msgspec.json.decode(message.data)["n"] for message in pipe.finish() if isinstance(message, Event)]
    assert told == sorted(set(told)), "in order, none twice"
    assert set(range(calls + 1)) - set(told) <= interrupted


def test_one_may_speak_while_the_interruption_is_handled(pipe: Pipe, rng: random.Random) -> None:
    """`except Timeout: emit("too late")` is what tasks do: the interrupted call has let go of everything."""
    pipe.read_slowly(random.Random(4))
    said: list[int] = []

    def emit(n: int) -> None:
        try:
            pipe.emitter.send(_event(n, 3_000))
        except Interrupted:
            pipe.emitter.send(_event(1_000_000 + n))
            said.append(n)
            raise

    _interrupting(rng, emit, 400)
    told = [msgspec.json.decode(message.data)["n"] for message in pipe.finish() if isinstance(message, Event)]
    assert said
    assert [n - 1_000_000 for n in told if n >= 1_000_000] == said


def test_a_deferred_action_waits_for_the_end_of_the_call(pipe: Pipe, rng: random.Random) -> None:
    """What the orders socket's handler does: in the middle of a call it raises behind it, so no frame is cut off."""
    pipe.read_slowly(random.Random(5))
    armed = False

    def again() -> None:
        signal.raise_signal(signal.SIGIO)

    def handler(*_: object) -> None:
        if armed and not pipe.emitter.defer(again):
            raise Interrupted

    deferred = number = 0
    with (
        _handling(signal.SIGIO, handler),
        _handling(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGIO)),
    ):
        while deferred < 300:
            assert number < 500_000, "the alarm hits too rarely to prove anything"
            armed = True
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.0004 + 0.000001)
                pipe.emitter.send(_event(number, 2_000))
                armed = False
            except Interrupted:
                armed = False
                deferred += 1
            number += 1
    told = [msgspec.json.decode(message.data)["n"] for message in pipe.finish() if isinstance(message, Event)]
    assert told == sorted(set(told))
    assert not pipe.emitter._lock.locked()


def test_nothing_is_deferred_outside_a_call(pipe: Pipe) -> None:
    assert not pipe.emitter.defer(lambda: None)


def test_a_call_of_another_thread_is_no_reason_to_wait(pipe: Pipe) -> None:
    """The main thread may be asleep: whoever ended that call could not wake it."""
    _stuff(pipe, 2_000)
    blocked = threading.Thread(target=pipe.emitter.send, args=(_event(2, 9_000),), daemon=True)
    blocked.start()
    end = time.monotonic() + 10
    while not pipe.emitter._lock.locked() and time.monotonic() < end:
        time.sleep(0.001)
    assert not pipe.emitter.defer(lambda: None)
    pipe.read_slowly(random.Random(6))
    blocked.join(10)
    assert not blocked.is_alive()
