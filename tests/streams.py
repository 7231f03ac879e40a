"""A stream reader of the tests' own, with the requests to feed it.

It shares no code with the product: a bug in the product's decoder must not hide one in its encoder.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from taskkit import linux


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event as a browser would see it; `at` is the monotonic time of its arrival."""

    id: str
    type: str
    data: str
    at: float = 0.0

    @property
    def json(self) -> Any:
        """The data, parsed."""
        return json.loads(self.data)


class SseDecoder:
    """Bytes of an event stream to events. Source: WHATWG HTML §9.2.6.

    Attributes:
      comments, retries: what else the stream said, in order.
      last_id: what a browser would send as Last-Event-ID.
    """

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.retries: list[int] = []
        self.last_id = ""
        self._rest = b""
        self._first = True
        self._type = ""
        self._data: list[str] = []

    def receive(self, data: bytes) -> list[SseEvent]:
        """Take bytes as they came; return the events that they complete."""
        found = []
        for line in self._lines(data):
            event = self._line(line)
            if event is not None:
                found.append(event)
        return found

    def _lines(self, data: bytes) -> Iterator[str]:
        buffer = self._rest + data
        held = b""
        if buffer.endswith(b"\r"):  # a LF that belongs to it may follow
            buffer, held = buffer[:-1], b"\r"
        parts = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = parts.pop() + held
        for part in parts:
            text = part.decode("utf-8", "replace")
            yield text.removeprefix("\ufeff") if self._first else text
            self._first = False

    def _line(self, line: str) -> SseEvent | None:
        if not line:
            return self._dispatch()
        field, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if colon and not field:
            self.comments.append(value)
        elif field == "data":
            self._data.append(value)
        elif field == "event":
            self._type = value
        elif field == "id" and "\0" not in value:
            self.last_id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            self.retries.append(int(value))
        return None

    def _dispatch(self) -> SseEvent | None:
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        return SseEvent(self.last_id, kind or "message", "\n".join(data), time.monotonic()) if data else None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        with linux.short_socket_path(Path(self._path)) as path:
            self.sock.connect(path)


class RawResponse:
    """An open response, read as it arrives.

    Attributes:
      status, headers: names of headers in lower case.
      seconds_to_headers: from before the connect to the end of the headers.
    """

    def __init__(self, connection: http.client.HTTPConnection, started: float) -> None:
        self._connection = connection
        self._response = connection.getresponse()
        self.seconds_to_headers = time.monotonic() - started
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}
        self.decoder = SseDecoder()

    def read(self) -> bytes:
        """Return what has arrived of the body, waiting for something; b"" at its proper end.

        Raises:
          OSError, http.client.HTTPException: the connection broke in the middle, or nothing came in time.
        """
        return self._response.read1(65536)

    def events(self) -> Iterator[SseEvent]:
        """Yield events until the response ends. Raises as `read` does."""
        while data := self.read():
            yield from self.decoder.receive(data)

    def close(self) -> None:
        """Close the connection, wherever the response stands."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def raw_get(
    url: str,
    *,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    body: bytes | None = None,
    timeout: float = 10.0,
    uds: str | None = None,
) -> RawResponse:
    """Send a request on a fresh connection; return when the headers have come. `timeout` is per read."""
    parts = urllib.parse.urlsplit(url)
    connection = (
        _UnixConnection(uds, timeout)
        if uds
        else http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    )
    sent = dict(headers or {})
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    started = time.monotonic()
    try:
        connection.request(method, urllib.parse.urlunsplit(("", "", *parts[2:4], "")) or "/", body, sent)
        return RawResponse(connection, started)
    except BaseException:
        connection.close()
        raise


def collect(url: str, token: str, *, after: str = "", timeout: float = 30.0) -> list[SseEvent]:
    """Follow a stream to its `stream.end` as a browser does: reconnect by Last-Event-ID when it breaks."""
    end = time.monotonic() + timeout
    found: list[SseEvent] = []
    last = after
    while time.monotonic() < end:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        with contextlib.suppress(OSError, http.client.HTTPException):
            with raw_get(url, token=token, headers=headers, timeout=end - time.monotonic() + 0.1) as response:
                if response.status == 204:
                    return found
                assert response.status in (200, 502, 503), (response.status, response.read())
                for event in response.events():
                    found.append(event)
                    last = event.id or last
                    if event.type == "stream.end":
                        return found
        time.sleep(0.02)
    raise AssertionError(f"no stream.end within {timeout} s; {len(found)} events, the last: {found[-1:]}")
