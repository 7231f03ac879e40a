"""Bytes of a stream: events in each rendering, control lines, cursors.

Pure. Sources: WHATWG HTML §9.2 (server-sent events); ndjson-spec 1.0.0 §3; the cursor's forms are CONTRACT
2.2.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from taskkit.identifiers import MAX_CURSOR

EVENT_STREAM: Final = "text/event-stream"
NDJSON: Final = "application/x-ndjson"
PLAIN: Final = "text/plain"
JSON: Final = "application/json"

#: A comment: it reaches the socket, and no listener.
HEARTBEAT: Final = b":\n\n"

#: Name of the last event of every run.
STREAM_END: Final = "stream.end"

#: Names of the query parameters that carry a cursor, in the order they are looked at. The later two are what
#: polyfills of EventSource send (Mercure issue #586).
CURSOR_PARAMETERS: Final = ("after", "last_event_id", "lastEventId")

# CR, LF and CRLF end a line (WHATWG HTML §9.2.5); nothing else does, not even U+2028.
_LINE_BREAK: Final = re.compile(rb"\r\n|\r|\n")
_UNSAFE_IN_FIELD: Final = re.compile(r"[\r\n\0]")
#: An id: `offset`, behind a power cut `eN-offset`; an output line adds `.line`. Epoch 0 is never written.
ID_PATTERN: Final = r"(?:e([1-9][0-9]{0,8})-)?([0-9]{1,18})(?:\.([0-9]{1,18}))?"
_ID: Final = re.compile(ID_PATTERN)


def _field(text: str) -> bytes:
    """Return `text` fit for one field: a break in it would let a task forge events, NUL voids an id."""
    return _UNSAFE_IN_FIELD.sub("", text).encode("utf-8", "replace")


def event_id(epoch: int, offset: int, line: int | None = None) -> str:
    """Return the id of an event, or of output line `line` behind it.

    The epoch of a run grows when its newest events may have been lost with the machine's power; only then is it
    written, so that an id of before cannot be taken for the event that has its offset now.
    """
    id = f"e{epoch}-{offset}" if epoch else str(offset)
    return id if line is None else f"{id}.{line}"


def event_bytes(offset: int | str | None, type: str, data: bytes) -> bytes:
    """Return one event block: `id`, `event`, `data`, blank line.

    `data` is expected on one line; a line break in it begins another `data:` field, so that the client sees
    it as it was instead of a torn event. Without an offset the block has no `id` and leaves the client's
    cursor alone.
    """
    head = b"" if offset is None else b"id: %s\n" % _field(str(offset))
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(_LINE_BREAK.split(data))
    return b"%sevent: %s\ndata: %s\n\n" % (head, _field(type), data)


def comment(text: str = "") -> bytes:
    """Return a comment block."""
    return b":%s\n\n" % (b" " + _field(text) if text else b"")


def retry(milliseconds: int) -> bytes:
    """Return the block that sets the client's reconnection time."""
    return b"retry: %d\n\n" % max(0, milliseconds)


def chunk(data: bytes) -> bytes:
    """Return `data`, which must not be empty, as one chunk (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def reset_data(start: int, reason: str, run: str | None = None) -> bytes:
    """Return the data of `stream.reset`: what the client has is void, the stream goes on at `start`.

    `run` is named on a stream of many runs when no other one is concerned.
    """
    data: dict[str, int | str] = {"from": start, "reason": reason}
    return msgspec.json.encode(data if run is None else {**data, "_run": run})


def id_block(id: str) -> bytes:
    """Return the block that only moves the client's cursor: without data, nothing is dispatched.

    Source: WHATWG HTML §9.2.6, which sets the last event ID before it looks whether there is data.
    """
    return b"id: %s\n\n" % _field(id)


def reset_event(start: int, reason: str, epoch: int = 0) -> bytes:
    """Return `stream.reset`; its id is the cursor in front of `start`, so a reconnect continues there."""
    return event_bytes(event_id(epoch, max(0, start - 1)), "stream.reset", reset_data(start, reason))


def lag_data(skipped: int, run: str) -> bytes:
    """Return the data of `stream.lag`: so many `run.progress` of the run were left out."""
    return msgspec.json.encode({"skipped": skipped, "_run": run})


def ndjson_line(id: int | str | None, type: str, data: bytes) -> bytes:
    """Return one event as a line `{"id","type","data"}`; `data` is embedded as it is.

    Without an id the line has none: it leaves the client's cursor alone.
    """
    if b"\n" in data or b"\r" in data:
        data = _LINE_BREAK.sub(b" ", data)  # between tokens a space means the same
    # json.dumps escapes every control character, so the line stays one line.
    return b'{%s"type":%s,"data":%s}\n' % (
        b"" if id is None else b'"id":"%s",' % _field(str(id)),
        json.dumps(type).encode(),
        data or b"null",
    )


class _Value(msgspec.Struct):
    value: msgspec.UnsetType | object = msgspec.UNSET


_read_value: Final = msgspec.json.Decoder(_Value).decode


def plain_text(data: bytes) -> bytes:
    """Return what an event says as text, line break added: its `value` if that is a string, else nothing.

    A value that a task emits or yields and that is no object arrives as `{"value": …}`.
    """
    if b'"value"' not in data:
        return b""
    try:
        value = _read_value(data).value
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b""
    return plain_line(value) if isinstance(value, str) else b""


def plain_line(text: str) -> bytes:
    """Return `text` as bytes that end in exactly one added line break, unless it brings its own."""
    return (text if text.endswith("\n") else text + "\n").encode("utf-8", "replace")


class Origin(enum.Enum):
    """Where a subscriber begins."""

    #: after the offset that the cursor names; 0 is the start
    AFTER = enum.auto()
    #: with the newest event
    LATEST = enum.auto()
    #: with what is new
    NOW = enum.auto()


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in a stream: events up to `offset` and, if known, output lines up to `line` were seen.

    `epoch` is that of the run when they were seen.
    """

    origin: Origin = Origin.AFTER
    offset: int = 0
    line: int | None = None
    epoch: int = 0

    def resolve(self, tail: int) -> int:
        """Return the offset to read after when the newest event has offset `tail`."""
        if self.origin is Origin.NOW:
            return tail
        return max(0, tail - 1) if self.origin is Origin.LATEST else self.offset

    def is_of(self, epoch: int) -> bool:
        """Whether it means something in a run of this epoch; one in front of everything always does."""
        seen_nothing = self.offset == 0 and not self.line
        return self.origin is not Origin.AFTER or self.epoch == epoch or seen_nothing


def _parse(text: str) -> Cursor | None:
    if len(text) > MAX_CURSOR:
        return None
    match = _ID.fullmatch(text)
    if match is None:
        return None
    epoch, offset, line = match.groups()
    return Cursor(offset=int(offset), line=None if line is None else int(line), epoch=int(epoch or 0))


def parse_position(last_event_id: str | None, parameters: Mapping[str, str]) -> Cursor:
    """Return the cursor of a request for many runs: as `parse_cursor`, but its offset is a position in the store.

    Raises:
      ValueError: it is malformed, or of a stream of one run; the client's fault.
    """
    cursor = parse_cursor(last_event_id, parameters)
    if cursor.epoch or cursor.line is not None:
        raise ValueError("the cursor is of a stream of one run: use the id of an event of this one, a number")
    return cursor


def parse_cursor(last_event_id: str | None, parameters: Mapping[str, str]) -> Cursor:
    """Return the cursor of a request: Last-Event-ID, else a query parameter, else the start.

    An empty Last-Event-ID counts as absent (WHATWG HTML §9.2.3 never sends one).

    Raises:
      ValueError: it is malformed; the client's fault.
    """
    if last_event_id:
        text = last_event_id
    else:
        text = next((parameters[name] for name in CURSOR_PARAMETERS if name in parameters), "0")
        if text in ("latest", "now"):
            return Cursor(origin=Origin[text.upper()])
    cursor = _parse(text)
    if cursor is None:
        raise ValueError(
            f"the cursor {text[:40]!r} is malformed: use the id of an event of this stream, "
            "or ?after=latest, ?after=now"
        )
    return cursor
