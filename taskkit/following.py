"""What one follower of a run's stream knows: decoder, cursor, patience. Does no I/O.

Rule 1: the cursor is the id of the last event that was complete; a block cut by a lost connection counts for
nothing, so the gateway sends it again.

Rule 2: time comes in as monotonic seconds; this module never sleeps and never asks a clock.

Source of the format: WHATWG HTML §9.2.6, "Interpreting an event stream".
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from taskkit.credentials import Credentials
from taskkit.errors import GatewayError

#: Largest block of a stream that is held in memory, bytes. A result may have LIMITS.result_bytes (8 MiB
#: unless set) and travels inside `stream.end`; eight times that leaves room for a generous setting.
MAX_BLOCK: Final = 64 * 1024 * 1024

#: First and longest pause after a broken connection, seconds. A gateway is back about half a second after a
#: crash, so the first tries are quick; the cap keeps a long outage to one request in five seconds per client.
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0

#: Longest pause that a server's `retry:` or Retry-After can impose, seconds.
LONGEST_RETRY: Final = 60.0

#: Statuses that pass: overload, and what a reverse proxy says while the gateway restarts.
TRY_AGAIN: Final = frozenset({429, 502, 503, 504})

_BREAK: Final = re.compile(rb"\r\n|\r|\n")
_BOM: Final = b"\xef\xbb\xbf"
_DIGITS: Final = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event of a run.

    Attributes:
      id: the cursor to continue after it, opaque; "1", "2", "3" … per run, behind a power cut "e1-1", "e1-2" ….
      type: name of the event; "stream.end" is always the last.
      data: the event's JSON, decoded; the text itself when it is no JSON.
    """

    id: str
    type: str
    data: Any


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class EventDecoder:
    """Collects received bytes and hands out complete events, however the bytes are cut.

    It never reads: give it what you received. An unfinished block at the end is never handed out.

    Args:
      last_id: id in force before the first byte.
    """

    def __init__(self, last_id: str = "") -> None:
        #: id of the newest complete block
        self.last_id = last_id
        #: seconds between reconnections that the server asked for, or None
        self.retry: float | None = None
        self._parts: list[bytes] = []
        self._part_bytes = 0
        self._data_chars = 0
        self._after_cr = False
        self._first_line = True
        self._id, self._type, self._data = last_id, "", list[str]()

    def receive_data(self, data: bytes) -> list[StreamEvent]:
        """Add `data`; return the events it completed, oldest first.

        Raises:
          GatewayError: a block exceeds MAX_BLOCK bytes. The server's fault; close the connection.
        """
        return [event for line in self._lines(data) if (event := self._line(line)) is not None]

    def _lines(self, data: bytes) -> list[bytes]:
        if not data:
            return []
        if self._after_cr and data.startswith(b"\n"):  # the other half of a CRLF that was cut
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        lines = _BREAK.split(data)
        if len(lines) == 1:  # no joining here: a long line in many small pieces would cost its length squared
            self._keep(lines[0])
            return []
        lines[0] = b"".join((*self._parts, lines[0]))
        self._parts.clear()
        self._part_bytes = 0
        self._keep(lines.pop())
        return lines

    def _keep(self, part: bytes) -> None:
        self._part_bytes += len(part)
        if self._part_bytes + self._data_chars > MAX_BLOCK:
            raise GatewayError(f"the stream has a block of more than {MAX_BLOCK} bytes")
        self._parts.append(part)

    def _line(self, raw: bytes) -> StreamEvent | None:
        if self._first_line:
            self._first_line = False
            raw = raw.removeprefix(_BOM)
        if not raw:
            return self._dispatch()
        name, _, value = raw.decode("utf-8", "replace").partition(":")
        self._field(name, value.removeprefix(" "))  # a comment has the empty name
        return None

    def _field(self, name: str, value: str) -> None:
        if name == "data":
            self._data.append(value)
            self._data_chars += len(value)
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and _DIGITS.fullmatch(value):
            self.retry = min(int(value[:9]) / 1000, LONGEST_RETRY)

    def _dispatch(self) -> StreamEvent | None:
        self.last_id = self._id
        type_, data = self._type or "message", self._data
        self._type, self._data, self._data_chars = "", [], 0
        if not data or data == [""]:
            return None
        return StreamEvent(self.last_id, type_, _value("\n".join(data)))


class Pauses:
    """How long to wait before each new try, and when to give up.

    Exponential backoff with jitter, so that a thousand clients of one gateway do not return at once.

    Args:
      patience: seconds without any sign of life after which to give up.
      now: monotonic seconds.
      chance: returns a float in [0, 1).
    """

    def __init__(self, patience: float, now: float, chance: Callable[[], float] = random.random) -> None:
        self._patience = patience
        self._alive_at = now
        self._failures = 0
        self._chance = chance

    def alive(self, now: float) -> None:
        """The other side gave a sign of life."""
        self._alive_at = now
        self._failures = 0

    def next(self, now: float, at_least: float = 0.0) -> float | None:
        """Return the seconds to wait before the next try, or None when patience is at an end."""
        if now - self._alive_at >= self._patience:
            return None
        ceiling = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 16))
        self._failures += 1
        jittered: float = ceiling * (0.5 + self._chance() / 2)
        return max(at_least, jittered)


def parse_retry_after(text: str | None) -> float:
    """Return the seconds that a Retry-After header asks for; 0.0 without one, or for its date form."""
    return min(float(text), LONGEST_RETRY) if text and _DIGITS.fullmatch(text.strip()) else 0.0


def run_path(run: str, rest: str = "") -> str:
    """Return the path of a run, or of something below it."""
    return f"/api/v1/runs/{quote(run, safe='')}{rest}"


def stream_params(types: Sequence[str], output: bool) -> dict[str, str]:
    """Return the query for the events of some types, all when there are none, with output lines if wanted."""
    params = {"include": "log"} if output else {}
    if types:
        params["types"] = ",".join([*types, "log"] if output else types)
    return params


def page_events(page: Mapping[str, Any]) -> list[StreamEvent]:
    """Return the events on a page of a stream: `{events: [{id, type, data}], next, ended}`."""
    return [StreamEvent(event["id"], event["type"], event["data"]) for event in page["events"]]


def printed(event: StreamEvent) -> list[str]:
    """Return the lines of text that an event stands for: what was printed, or yielded as text."""
    key = "text" if event.type == "log" else "value"
    text = event.data.get(key) if isinstance(event.data, dict) else None
    return text.removesuffix("\n").split("\n") if isinstance(text, str) else []


def refusal(status: int, body: bytes, url: str) -> GatewayError:
    """Return the error for an answer that is no success: its problem, or a sentence about the status."""
    document = _value(body.decode("utf-8", "replace"))
    problem = document if isinstance(document, dict) else {}
    detail = problem.get("detail") or problem.get("title") or f"{url} answered with status {status}"
    fields = problem.get("errors")
    if isinstance(fields, dict):
        sentences = [f"{name}: {text}" for name, text in fields.items()]
        detail = "; ".join([str(detail), *(text for text in sentences if text not in str(detail))])
    return GatewayError(str(detail), {"status": status, **problem})


class Following:
    """Follows one run over any number of connections.

    For each connection: send `request`, pass the answer's head to `answered`. If True, pass what arrives to
    `receive_data`; else raise `refusal` if `is_refusal` says so. Set `lost` when the connection broke. When it is
    over and `ended` is False, wait for `pause` seconds.

    Args:
      after: cursor to continue after; "" from the start. "latest" and "now" are for `page_events` to resolve: a
        connection that broke in silence would forget where it began.
      types: names of the events wanted; empty: all.
      output: whether output lines are wanted, too.
      patience: seconds without a sign of the gateway after which to give up.
      now: monotonic seconds.
    """

    def __init__(
        self,
        run: str,
        after: str = "",
        *,
        types: Sequence[str] = (),
        output: bool = False,
        patience: float,
        now: float,
    ) -> None:
        self._path = run_path(run, "/events")
        self._params = stream_params(types, output)
        self._decoder = EventDecoder(after)
        self._pauses = Pauses(patience, now)
        self._retry_after = 0.0
        self._renewed = False
        #: no further event will come
        self.ended = False
        #: the connection broke; one that the gateway ended itself (age, shutdown) did not
        self.lost = False

    @property
    def cursor(self) -> str:
        """Id of the newest event that was handed out or skipped; "" before the first."""
        return self._decoder.last_id

    def request(self, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return what httpx is to send; forget the unfinished block of the last connection.

        Args:
          headers: those that every request has.
        """
        self.lost = False
        retry, self._decoder = self._decoder.retry, EventDecoder(self.cursor)
        self._decoder.retry = retry
        accept = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-store"}
        return {
            "method": "GET",
            "url": self._path,
            "params": self._params,
            "headers": {**accept, **headers, **({"Last-Event-ID": self.cursor} if self.cursor else {})},
        }

    def answered(self, status: int, headers: Mapping[str, str], now: float) -> bool:
        """Judge an answer's head; return whether its body is to be read as the stream.

        False: the run has ended (204), a later try may succeed, or the answer is a refusal (`is_refusal`).
        """
        self._retry_after = parse_retry_after(headers.get("retry-after"))
        kind = headers.get("content-type", "").partition(";")[0].strip()
        if status == 204:
            self.ended = True
        elif status == 200 and kind == "text/event-stream":
            self._pauses.alive(now)
            self._renewed = False
            return True
        self.lost = True
        return False

    def moved(self) -> None:
        """Another node has the run: it is asked next, after a pause, as it may have been named too early."""
        self.lost = True
        self._retry_after = 0.0

    def is_refusal(self, status: int, credentials: Credentials) -> bool:
        """Whether an answer without a stream is final: trying again, or with another token, would not help."""
        if not self._renewed and credentials.can_renew(status):
            self._renewed = True
            return False
        return status != 204 and status not in TRY_AGAIN

    def receive_data(self, data: bytes, now: float) -> list[StreamEvent]:
        """Add what arrived; return the events it completed. After `stream.end` there are none.

        Raises:
          GatewayError: see EventDecoder.
        """
        self._pauses.alive(now)
        events: list[StreamEvent] = []
        for event in self._decoder.receive_data(data):
            if self.ended or event.type == "stream.busy":  # the gateway's word to this client, not the run's
                continue
            events.append(event)
            self.ended = event.type == "stream.end"
        return events

    def pause(self, now: float) -> float:
        """Return how many seconds to wait before the next connection.

        Raises:
          GatewayError: there was no sign of life for as long as `patience`.
        """
        # `retry:` is the gateway's word for an end of its own making; after a break the first try is quick.
        at_least = max(self._retry_after, 0.0 if self.lost else (self._decoder.retry or 1.0))
        pause = self._pauses.next(now, at_least)
        if pause is None:
            raise GatewayError("the gateway did not come back; follow again later with the last cursor")
        return pause
