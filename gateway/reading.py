"""What a request says: its body, its parameters, what it accepts.

Rule: whatever is wrong leaves as a Refusal that names the part, before anything has an effect.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response

from gateway.fields import read
from gateway.problems import CODES, document, problem
from taskkit.errors import InvalidArguments
from taskkit.settings import LimitSettings

#: A query parameter that any GET may have: what lets a browser in (gateway.auth).
TICKET: Final = "ticket"

#: Longest wait that a client may ask for, seconds: common proxies give up on a silent answer after 60.
MAX_WAIT: Final = 60.0

_WAIT: Final = re.compile(r'(?:^|,)\s*wait\s*=\s*"?(\d{1,6})"?\s*(?=;|,|$)', re.IGNORECASE)


#: Most bytes of a body that is small by nature: a choice of runs, a wish for a ticket. Parsing it takes 1 ms.
SMALL_BYTES: Final = 64 * 1024

#: Numbers with an exponent of three digits in one body. Some doubles near the ends of their range take the parser 50 µs
#: each (measured: `17976931348623157081e289`), so a MiB of them would hold everybody up for 2 s; these for 10 ms.
MAX_EXTREME: Final = 200
_EXTREME: Final = re.compile(rb"(?<=[0-9.])[eE][+-]?[0-9]{3}(?=[\s,\]}])")
_FEW_BYTES: Final = 4 * 1024


class Refusal(Exception):
    """A request cannot be served as it is; becomes the problem `code` with further members `extra`."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.headers = headers
        self.extra = extra


async def on_refusal(request: Request, error: Exception) -> Response:
    """Return the problem document of a Refusal, for Starlette's table of exception handlers."""
    assert isinstance(error, Refusal)
    return problem(
        None,
        error.code,
        str(error),
        instance=request.url.path,
        headers=error.headers,
        **error.extra,
    )


def document_of(error: Refusal, instance: str, **extra: Any) -> bytes:
    """Return the same problem as a document, for an answer that holds others beside it."""
    status = CODES[error.code].status
    return document(status, error.code, str(error), instance=instance, **error.extra, **extra)


async def read_object(request: Request, limits: LimitSettings) -> dict[str, Any]:
    """Return the JSON object in the request's body; an absent body is an empty object.

    For what is small by nature: it is parsed on the spot, so it may have SMALL_BYTES at most.

    Raises:
      Refusal: as `read_body_of_json` and `parse_object` do.
      ClientDisconnect: the client left within its body.
    """
    if request.headers.get("content-length") == "0":
        return {}
    body = await read_body_of_json(request, limits, most=SMALL_BYTES)
    return parse_object(body) if body else {}


async def read_nothing(request: Request, limits: LimitSettings) -> None:
    """Refuse a body that says something: nothing of it would have an effect. An empty object is nothing.

    Raises:
      InvalidArguments: it has fields; `errors` names them. Refusal: as `read_object`.
    """
    errors: dict[str, str] = {}
    read(await read_object(request, limits), {}, errors)
    if errors:
        raise InvalidArguments("this request takes no fields", errors=errors)


async def read_body_of_json(
    request: Request, limits: LimitSettings, bound: str = "body_bytes", *, most: int | None = None
) -> bytes:
    """Return the body of a request that says it is JSON, or says nothing; `bound` names the limit of its length.

    With `most` it may not have more bytes than that, whatever the limit allows. Whoever lets somebody do something
    because of a token looks at it once more afterwards (Authenticator.recheck): a body may take LIMITS.body_seconds.

    Raises:
      Refusal: 415, 413 (as soon as it is too long, or announced so), 408 after LIMITS.body_seconds: who sends a
        byte a minute would hold a connection for ever (Slowloris). The client's fault.
      ClientDisconnect: the client left within its body.
    """
    _check_type(request)
    max_bytes: int = getattr(limits, bound)
    if most is not None and most < max_bytes:
        max_bytes, bound = most, ""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes, bound)
    body = bytearray()
    with trio.move_on_after(limits.body_seconds) as scope:
        # Closed at once when it is left early: trio warns of generators that only the collector ends.
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes, bound)
    if scope.cancelled_caught:
        raise Refusal(
            "slow-body",
            f"the body did not arrive within LIMITS.body_seconds = {limits.body_seconds:g}",
            headers={"Connection": "close"},
        )
    return bytes(body)


def _check_type(request: Request) -> None:
    header = request.headers.get("content-type")
    if header is None:
        return
    kind = header.partition(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[a-z0-9.-]+\+json", kind):
        raise Refusal(
            "unsupported-media-type",
            f"a body of type {kind[:100]!r} is not understood; send `Content-Type: application/json`",
            headers={"Accept-Post": "application/json"},
        )


def _too_large(max_bytes: int, bound: str) -> Refusal:
    # The rest of the body is not read: the connection cannot serve another request.
    return Refusal(
        "too-large",
        f"the body exceeds LIMITS.{bound} = {max_bytes}" if bound else f"the body exceeds {max_bytes} bytes",
        headers={"Connection": "close"},
        max_bytes=max_bytes,
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`.

    Raises:
      Refusal: it is no JSON (NaN, lone surrogates and numbers beyond a double are none either), no object, or takes
        too long to parse.
    """
    _check_numbers(body)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("bad-json", f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal("bad-json", "the body must be a JSON object")
    return value


def _check_numbers(body: bytes) -> None:
    """Refuse a body whose numbers would keep the parser, which lets nobody else run meanwhile, for seconds."""
    if len(body) <= _FEW_BYTES:
        return
    found = 0
    for start in range(0, len(body), SMALL_BYTES):  # in pieces, between which others have their turn
        found += sum(1 for _ in _EXTREME.finditer(body, start, start + SMALL_BYTES + 8))
        if found > MAX_EXTREME:
            raise Refusal(
                "bad-json",
                f"the body has more than {MAX_EXTREME} numbers with an exponent of three digits; send them as text",
            )


class Parameters:
    """The query of a request, read by name; what is not read at the end is refused."""

    def __init__(self, request: Request, allowed: Iterable[str]) -> None:
        self._query = request.query_params
        allowed = tuple(allowed)
        tickets = (TICKET,) if request.method in ("GET", "HEAD") else ()
        for name in self._query:
            if name not in (*allowed, *tickets):
                there = f"there are {', '.join(allowed)}" if allowed else "there is none"
                raise self.refusal(name, f"is no parameter here; {there}")

    @staticmethod
    def refusal(name: str, complaint: str) -> Refusal:
        """Return the refusal of one parameter."""
        return Refusal("bad-parameter", f"{name[:100]}: {complaint}", parameter=name[:100])

    def text(self, name: str) -> str | None:
        """Return a parameter that must not be empty or repeated."""
        values = self._query.getlist(name)
        if len(values) > 1 or values == [""]:
            raise self.refusal(name, "must be given once, with a value")
        return values[0] if values else None

    def texts(self, name: str) -> list[str]:
        """Return every value of a parameter that may be repeated, empty ones included."""
        return self._query.getlist(name)

    def number(self, name: str, low: int, high: int, default: int) -> int:
        """Return a whole number from `low` to `high`."""
        text = self.text(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
            raise self.refusal(name, f"must be a whole number from {low} to {high}")
        return int(text)

    def seconds(self, name: str) -> float:
        """Return how long the client wants to wait: 0 to MAX_WAIT, 0 when absent."""
        text = self.text(name)
        try:
            value = 0.0 if text is None else float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= MAX_WAIT:
            raise self.refusal(name, f"must be a number of seconds from 0 to {MAX_WAIT:g}")
        return value

    def choice(self, name: str, values: Sequence[str]) -> str | None:
        """Return one of `values`, or None when absent."""
        text = self.text(name)
        if text is not None and text not in values:
            raise self.refusal(name, f"must be {' or '.join(values)}")
        return text


def preferred_wait(header: str) -> float | None:
    """Return the seconds in `Prefer: wait=N` (RFC 7240 §4.3), at most MAX_WAIT; None: it does not say."""
    match = _WAIT.search(header)
    return min(float(match[1]), MAX_WAIT) if match else None


def negotiate(accept: str | None, offers: Sequence[str]) -> str | None:
    """Return the offer that an Accept header likes best, or None when it likes none.

    By quality, then by how exactly it is named, then by the order of `offers`: a client that lists
    `application/json, text/plain, */*` gets JSON. Source: RFC 9110 §12.5.1.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [_media_range(part) for part in accept.split(",")]
    best: tuple[float, int] = (0.0, 0)
    chosen: str | None = None
    for offer in offers:
        # The most exact range that matches decides on an offer's quality.
        exact, quality = max(
            ((_exactness(kind, offer), quality) for kind, quality in ranges), default=(0, 0.0)
        )
        if exact and quality and (quality, exact) > best:
            best, chosen = (quality, exact), offer
    return chosen


def _media_range(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return kind, 0.0
            return kind, quality if 0 <= quality <= 1 else 0.0
    return kind, 1.0


def _exactness(kind: str, offer: str) -> int:
    """Return 3 for the very type, 2 for its family, 1 for anything, 0 for no match."""
    if kind == offer:
        return 3
    if kind == offer.partition("/")[0] + "/*":
        return 2
    return 1 if kind == "*/*" else 0


def asks_for(accept: str | None, kind: str) -> bool:
    """Whether an Accept header names this very media type and does not refuse it."""
    return any(
        found == kind and quality > 0 for found, quality in map(_media_range, (accept or "").split(","))
    )


def page_cursor(number: int) -> str:
    """Return the opaque cursor of a page that ends with run number `number`."""
    return base64.urlsafe_b64encode(b"r%d" % number).rstrip(b"=").decode()


def parse_page_cursor(text: str) -> int | None:
    """Return the run number in a page's cursor, or None when it is none of ours."""
    try:
        plain = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    match = re.fullmatch(rb"r([0-9]{1,18})", plain)
    return int(match[1]) if match else None
