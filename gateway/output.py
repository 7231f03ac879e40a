"""The bytes of a runner's output pipe, as lines of its attempts. Pure; the form is taskkit.runner.capture's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import msgspec

#: Longest record that is kept together, bytes; a longer line becomes several. The runner cuts text at 8,192
#: characters, each of which may take six bytes of JSON.
MAX_LINE: Final = 64 * 1024

_RS: Final = b"\x1e"
_US: Final = b"\x1f"
_STREAMS: Final = {b"o": "stdout", b"e": "stderr"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line; `stream` is "stdout", "stderr", "logging" or "output" (which of the first two is not known)."""

    stream: str
    text: str
    level: str = ""
    logger: str = ""


@dataclass(slots=True)
class OutputParser:
    """Takes bytes apart, whatever cuts they come in.

    Args:
      lines_per_second: what is kept; the rest is dropped with a count.

    Attributes:
      plain: token of the attempt that plain lines belong to.
      ended: tokens whose end marker has been seen, and whose count of dropped lines has to be told.
    """

    lines_per_second: int
    plain: str = ""
    ended: set[str] = field(default_factory=set)
    _rest: bytes = b""
    _allowance: float = 0.0
    _refilled_at: float | None = None
    _dropped: dict[str, int] = field(default_factory=dict)

    def receive(self, data: bytes, now: float) -> dict[str, list[Line]]:
        """Take in bytes; return the lines they completed, by attempt token. `now` is monotonic seconds."""
        self._refill(now)
        found: dict[str, list[Line]] = {}
        *lines, self._rest = (self._rest + data).split(b"\n")
        for whole in lines:
            # In pieces counted from the line's start, so that it does not matter in what cuts it came.
            for start in range(0, len(whole), MAX_LINE):
                self._take(whole[start : start + MAX_LINE], found)
        while len(self._rest) > MAX_LINE:
            self._take(self._rest[:MAX_LINE], found)
            self._rest = self._rest[MAX_LINE:]
        self._tell_dropped(found)
        return found

    def _take(self, record: bytes, found: dict[str, list[Line]]) -> None:
        token, line = self._read(record)
        if line is not None:
            self._keep(token, line, found)

    def _refill(self, now: float) -> None:
        since = 1.0 if self._refilled_at is None else now - self._refilled_at
        self._refilled_at = now
        self._allowance = min(self._allowance + since * self.lines_per_second, float(self.lines_per_second))

    def _keep(self, token: str, line: Line, found: dict[str, list[Line]]) -> None:
        if self._allowance < 1:
            self._dropped[token] = self._dropped.get(token, 0) + 1
            return
        self._allowance -= 1
        found.setdefault(token, []).append(line)

    def _tell_dropped(self, found: dict[str, list[Line]]) -> None:
        for token in [t for t in self._dropped if self._allowance >= 1 or t in self.ended]:
            count = self._dropped.pop(token)
            self.ended.discard(token)
            text = f"… {count} lines dropped: more than {self.lines_per_second} a second"
            found.setdefault(token, []).append(Line("output", text))

    def _read(self, record: bytes) -> tuple[str, Line | None]:
        head, separator, body = record.partition(_US)
        if not separator or head[:1] != _RS:
            return self.plain, Line("output", _text(record)) if record else None
        kind, token = head[1:2], head[2:].decode("ascii", "replace")
        if kind in _STREAMS:
            return token or self.plain, Line(_STREAMS[kind], _text(body))
        if kind == b"l":
            return token or self.plain, _logged(body)
        if kind == b"B":
            self.plain = token
        elif kind == b"E":
            # Others have nothing left to tell, and forged markers must not pile up.
            if token in self._dropped:
                self.ended.add(token)
            self.plain = ""
        return token, None

    def forget(self, token: str) -> None:
        """The attempt is over."""
        self.ended.discard(token)
        self._dropped.pop(token, None)


class _Logged(msgspec.Struct):
    level: str = ""
    logger: str = ""
    text: str = ""


def _logged(body: bytes) -> Line:
    try:
        record = msgspec.json.decode(body, type=_Logged)
    except msgspec.DecodeError:  # cut, or forged by user code: keep what is there
        return Line("logging", _text(body))
    return Line("logging", _shown(record.text), record.level, record.logger)


def _text(data: bytes) -> str:
    return _shown(data.decode("utf-8", "replace"))


def _shown(text: str) -> str:
    # \r would end a line of server-sent events, and NUL ends text for some readers.
    return text.rstrip("\r").replace("\r", "␍").replace("\0", "␀")
