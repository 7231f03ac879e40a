"""The write end of the events pipe: whole frames in order, whatever interrupts the writer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import threading
import time
import uuid
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from taskkit import failpoints, linux
from taskkit.runner.encode import failure_of
from taskkit.wire.codec import pack_runner_frame
from taskkit.wire.framing import HEADER_SIZE, max_frame
from taskkit.wire.messages import Event, Finished, Progress, RunnerMessage, TaskFailure

_Sent = TypeVar("_Sent", bound=RunnerMessage)

#: Bytes that an event's frame has beyond name and data: header, map keys, token. Measured 98; rounded up.
_OVERHEAD: Final = HEADER_SIZE + 128

#: Seconds to wait for room on the disk for a large result, and between two tries. The task's work is done, and a disk
#: that is full may be so for a moment; longer than this, its process is of more use elsewhere.
RESULT_PATIENCE: Final = 30.0
_RESULT_PAUSE: Final = 0.2

#: Exit code of a runner that cannot write any more because user code closed its descriptors.
LOST_DESCRIPTORS: Final = 71  # EX_OSERR of sysexits.h


class Emitter:
    """Writes frames to the gateway. Any thread may call; a forked child of user code may not.

    A write blocks while the pipe is full: that is the back-pressure on the task. An exception that a signal handler
    raises in the middle leaves the rest of the frame to the next call, which writes it first.

    Args:
      fd: write end, blocking.
      pipe_size: its granted size in bytes.
      blobs: descriptor of the directory for large values.
    """

    def __init__(self, fd: int, pipe_size: int, blobs: int) -> None:
        self._fd = fd
        self._blobs = blobs
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._limit = max_frame(pipe_size)
        self._room = pipe_size * 3 // 4
        self._seq = 0
        self._frame = b""
        self._written: list[int] = []
        self._held: dict[str, Progress] = {}
        self._owner = 0
        self._after: Callable[[], None] | None = None

    @property
    def inline_limit(self) -> int:
        """Largest JSON in bytes that fits a frame; a larger one goes to a blob."""
        return self._limit - _OVERHEAD - 256

    def send(self, message: RunnerMessage) -> None:
        """Write `message`; when it returns, the kernel has all of it.

        Raises:
          RuntimeError: called in a forked child, or from a signal handler inside another call.
          OSError: the descriptor is gone.
        """
        self._alone(self._send, message)

    def _send(self, message: RunnerMessage) -> None:
        self._flush()
        while self._held:
            self._write(self._held.pop(next(iter(self._held))))
        self._write(message)

    def send_progress(self, message: Progress) -> None:
        """Write `message`, or keep only the attempt's newest one while the pipe is more than three quarters full."""
        self._alone(self._send_progress, message)

    def _send_progress(self, message: Progress) -> None:
        self._held.pop(message.token, None)
        if self._frame or self._is_filling():
            self._held[message.token] = message
        else:
            self._write(message)

    def _is_filling(self) -> bool:
        """Whether a small frame might have to wait.

        A write does not share a page that it does not fit: frames of 2.1 KB fill all pages with half the bytes.
        """
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return not poll.poll(0) or linux.bytes_to_read(self._fd) > self._room

    def blob(self, data: bytes) -> tuple[str, int, str]:
        """Store a value too large for a frame; return (name, bytes, sha256 in hex). On disk when it returns.

        Raises:
          OSError: the disk does not take it; the message names the directory. Nothing is left there.
        """
        try:
            name = self._store(data)
        except OSError as error:
            why = f"a value of {len(data)} bytes cannot be stored in the state directory: {error.strerror}"
            raise OSError(error.errno, why, self._folder()) from error
        failpoints.hit("runner.blob")
        return name, len(data), hashlib.sha256(data).hexdigest()

    def _folder(self) -> str | None:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{self._blobs}")
        return None

    def _store(self, data: bytes) -> str:
        name = str(uuid.uuid4())
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._blobs)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
            os.fsync(self._blobs)
        except BaseException:
            os.unlink(name, dir_fd=self._blobs)
            raise
        finally:
            os.close(fd)
        return name

    def event(self, token: str, type: str, data: bytes) -> None:
        """Write an event whose JSON is `data`."""
        failpoints.hit("runner.event")
        if len(data) + 4 * len(type) <= self.inline_limit:
            self.send(Event(token=token, type=type, data=data))
        else:
            name, size, digest = self.blob(data)
            self.send(Event(token=token, type=type, blob=name, size=size, sha256=digest))

    def finished(self, message: Finished) -> None:
        """Write the end of an attempt. A large result goes to a blob, a long failure is cut: it must be told."""
        failpoints.hit("runner.finishing")
        if message.failure is not None:
            failure = _cut(message.failure, self.inline_limit)
            message = msgspec.structs.replace(message, failure=failure)
        elif len(message.result) > self.inline_limit:
            message = self._with_blob(message)
        self.send(message)
        failpoints.hit("runner.finished")

    def _with_blob(self, message: Finished) -> Finished:
        """Return `message` with its result in a blob, or with the failure to store it: its work is done by now."""
        until = time.monotonic() + RESULT_PATIENCE
        while True:
            try:
                name, size, digest = self.blob(message.result)
            except OSError as error:
                if time.monotonic() >= until:
                    return Finished(token=message.token, ending="raised", failure=failure_of(error))
                time.sleep(_RESULT_PAUSE)
            else:
                return Finished(
                    token=message.token, ending=message.ending, blob=name, size=size, sha256=digest
                )

    def defer(self, action: Callable[[], None]) -> bool:
        """Have `action` called when this thread's call under way ends; return False when there is none.

        For a signal handler that wants to raise: the call's frame is then told wholly, with nothing left to flush.
        A call of another thread is no reason to wait.
        """
        if self._owner != threading.get_ident():
            return False
        self._after = action
        return True

    def _alone(self, write: Callable[[_Sent], None], message: _Sent) -> None:
        """Call `write(message)` under the lock.

        `with` stands on the lock itself: CPython lets no signal handler in between its acquisition and the body.
        Behind a context manager written in Python, an exception from a handler could keep the lock for ever.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(
                "a child that a task has forked cannot speak for its run; speak from the task's process"
            )
        me = threading.get_ident()
        if self._owner == me:
            raise RuntimeError("emit() was called from a signal handler in the middle of another emit()")
        action = None
        try:
            with self._lock:
                self._owner = me
                try:
                    write(message)
                finally:
                    self._owner = 0
                    action, self._after = self._after, None
        finally:
            if action is not None:
                action()

    def _write(self, message: RunnerMessage) -> None:
        frame = pack_runner_frame(message, self._seq + 1, self._limit)
        self._seq += 1
        self._written = []
        self._frame = frame
        self._flush()

    def _flush(self) -> None:
        # `list.extend(map(os.write, …))` runs in C from the system call to the list: an exception raised by a
        # signal handler cannot come between a write and the record of how much it wrote.
        while (done := sum(self._written)) < len(self._frame):
            rest = memoryview(self._frame)[done:] if done else self._frame
            self._written.extend(map(os.write, (self._fd,), (rest,)))
        self._frame = b""
        self._written = []


def _cut(failure: TaskFailure, room: int) -> TaskFailure:
    """Return `failure` in at most `room` bytes, roughly: the end of a traceback says most, then its beginning."""
    return TaskFailure(
        exception=_cut_text(failure.exception, room // 8),
        message=_cut_text(failure.message, room // 4),
        traceback=_cut_text(failure.traceback, room // 2),
    )


def _cut_text(text: str, room: int) -> str:
    data = text.encode()
    if len(data) <= room:
        return text
    head, tail = data[: room // 3], data[-(room // 2) :]
    return f"{head.decode(errors='ignore')}\n…\n{tail.decode(errors='ignore')}"
