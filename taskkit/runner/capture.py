"""What a task prints or logs, as lines on the output pipe.

The pipe is descriptor 1 and 2 of the runner, so that C libraries and child processes land in it as they are. Lines
written through Python carry a record header, which tells them apart:

    RS o <token> US <text> LF        sys.stdout
    RS e <token> US <text> LF        sys.stderr
    RS l <token> US <json> LF        logging: {"level", "logger", "text"}
    RS B <token> US LF               from here on, plain lines belong to this attempt
    RS E <token> US LF               … up to here

Any other line is what it is ("output": whether stdout or stderr is not known).
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from contextvars import ContextVar
from typing import Final

RS: Final = "\x1e"
US: Final = "\x1f"

#: Longest line kept together, characters; tqdm's bar, which never ends its line, is cut here.
_MAX_LINE: Final = 8_192

#: Longest name of a logger, characters.
_MAX_NAME: Final = 500

#: Token of the attempt whose code is running, for lines of shared pools.
attempt_token: ContextVar[str] = ContextVar("bulkhead_attempt_token", default="")


def _write(text: str) -> None:
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        return  # user code closed descriptor 1: what it prints is lost, which is what it asked for


class CapturedStream(io.TextIOBase):
    """Stands for sys.stdout or sys.stderr: whole lines become records; `buffer` writes to the pipe as it is."""

    def __init__(self, kind: str, name: str) -> None:
        self._kind = kind
        # By attempt and thread: print() writes a line and its end one after the other.
        self._partial: dict[tuple[str, int], str] = {}
        self._lock = threading.RLock()
        self.name = name
        self.buffer = open(1, "wb", buffering=0, closefd=False)

    encoding = "utf-8"
    errors = "backslashreplace"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() takes str, not {type(text).__name__}")
        key = attempt_token.get(), threading.get_ident()
        with self._lock:
            *lines, partial = (self._partial.pop(key, "") + text).split("\n")
            while len(partial) > _MAX_LINE:
                lines.append(partial[:_MAX_LINE])
                partial = partial[_MAX_LINE:]
            if partial:
                self._partial[key] = partial
            if lines:
                self._records(key[0], lines)
        return len(text)

    def finish_lines(self, token: str | None) -> None:
        """Write out what has no line end yet, of one attempt or of all."""
        with self._lock:
            for key in [key for key in self._partial if token is None or key[0] == token]:
                self._records(key[0], [self._partial.pop(key)])

    def _records(self, token: str, lines: list[str]) -> None:
        head = f"{RS}{self._kind}{token}{US}"
        starts = ((line, start) for line in lines for start in range(0, len(line) or 1, _MAX_LINE))
        _write("".join(f"{head}{line[start : start + _MAX_LINE]}\n" for line, start in starts))


class CaptureHandler(logging.Handler):
    """Turns log records into lines, whatever handlers the project has besides."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        # The reader keeps 64 KiB together: 8,192 characters of 4 bytes fit, or of 6 where JSON escapes one.
        text = text[:_MAX_LINE].encode("utf-8", "backslashreplace").decode()
        values = {"level": record.levelname, "logger": record.name[:_MAX_NAME], "text": text}
        line = json.dumps(values, ensure_ascii=False)
        _write(f"{RS}l{attempt_token.get()}{US}{line}\n")


def install(output: int) -> None:
    """Make `output` descriptors 1 and 2 of this process, and catch what Python writes."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = CapturedStream("o", "<stdout>")
    sys.stderr = CapturedStream("e", "<stderr>")
    logging.getLogger().addHandler(CaptureHandler())


def begin(token: str) -> None:
    """Plain lines belong to this attempt from here on."""
    attempt_token.set(token)
    _write(f"\n{RS}B{token}{US}\n")


def finish_lines(token: str | None = None) -> None:
    """Write out what has been printed without a line end, by one attempt or by whomever."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, CapturedStream):
            stream.finish_lines(token)


def end(token: str) -> None:
    """All lines of this attempt are in the pipe when this returns."""
    finish_lines()  # threads that the task started have no token in their context
    # The line break in front ends a plain line that has none; an empty line is dropped by the reader.
    _write(f"\n{RS}E{token}{US}\n")
