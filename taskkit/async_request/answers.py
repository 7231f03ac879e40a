"""A view's answer as JSON can hold it. Does no I/O."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Iterator
from typing import Any, Final, Protocol

import msgspec
from django.http.response import HttpResponseBase

#: Bytes of one event's data: a view may yield a file at once, an event may not be as large.
_PIECE: Final = 256 * 1024

#: Answers that are text although their type does not begin with `text/`.
_TEXTUAL: Final = ("application/json", "application/xml", "application/javascript", "application/x-ndjson")


class Kept:
    """The beginning of a body, up to `limit` bytes.

    Attributes:
      truncated: there was more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self.truncated = False

    def add(self, chunk: bytes) -> None:
        """Add what came."""
        room = self._limit - len(self._data)
        self._data += chunk[:room]
        self.truncated |= len(chunk) > room

    @property
    def data(self) -> bytes:
        """What was kept."""
        return bytes(self._data)


class Spoken(Protocol):
    """Turns chunks of bytes into the data of events."""

    def __call__(self, chunk: bytes, *, final: bool = False) -> Iterator[dict[str, str]]: ...


def spoken(response: HttpResponseBase) -> Spoken:
    """Return what turns chunks of this answer into the data of events: `{text}`, or `{base64}` of what is no text.

    A character that two chunks share is told with the second.
    """
    if not _is_text(response):
        return _in_base64
    decode = codecs.getincrementaldecoder(_charset(response))("replace").decode

    def as_text(chunk: bytes, *, final: bool = False) -> Iterator[dict[str, str]]:
        for piece in _pieces(chunk) if chunk else (b"",):
            if text := decode(piece, final):
                yield {"text": text}

    return as_text


def _in_base64(chunk: bytes, *, final: bool = False) -> Iterator[dict[str, str]]:
    for piece in _pieces(chunk):
        yield {"base64": base64.b64encode(piece).decode()}


def _pieces(chunk: bytes) -> Iterator[bytes]:
    for begin in range(0, len(chunk), _PIECE):
        yield chunk[begin : begin + _PIECE]


def shown(response: HttpResponseBase, kept: Kept, *, endpoint: str) -> dict[str, Any]:
    """Return the answer as a run's result. Cookies that it sets are not in it: they may be credentials."""
    document: dict[str, Any] = {
        "status": response.status_code,
        "headers": [[name, value] for name, value in response.items() if name.lower() != "set-cookie"],
        "endpoint": endpoint,
        **_body(response, kept),
    }
    if kept.truncated:
        document["truncated"] = True
    return document


def _body(response: HttpResponseBase, kept: Kept) -> dict[str, Any]:
    kind = _kind(response)
    if (kind == "application/json" or kind.endswith("+json")) and not kept.truncated:
        try:
            return {"response": msgspec.json.decode(kept.data)}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
    try:
        text = codecs.getincrementaldecoder(_charset(response))("strict").decode(
            kept.data, not kept.truncated
        )
    except ValueError:
        return {"response": base64.b64encode(kept.data).decode(), "encoding": "base64"}
    return {"response": text}


def _kind(response: HttpResponseBase) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _charset(response: HttpResponseBase) -> str:
    try:
        "".encode(response.charset or "utf-8")  # refuses codecs of no text, such as hex
        return response.charset or "utf-8"
    except (LookupError, ValueError):
        return "utf-8"


def _is_text(response: HttpResponseBase) -> bool:
    kind = _kind(response)
    return not kind or kind.startswith("text") or kind in _TEXTUAL or kind.endswith(("+json", "+xml"))
