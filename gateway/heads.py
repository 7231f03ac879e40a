"""What the head of a request may say, beyond the grammar that h11 checks.

Pure. Where HTTP/1 leaves it to a server how to understand something odd, two servers behind each other can understand
it differently, and a request slips past the first inside the body of another: such a head is refused, never guessed at.
Source: RFC 9112 §3.2 (targets), §6.1 (both lengths), §9.6 (after the last request).
"""

from __future__ import annotations

import re
from typing import Final

import h11

_VERSIONS: Final = frozenset({b"1.0", b"1.1"})

#: `http://HOST/PATH`, as a client of a proxy asks; user names in it are for nobody here.
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#@]+)([/?].*)?", re.IGNORECASE)


class Parser(h11.Connection):
    """h11, which takes bytes behind the last request of a connection for an error of that request.

    The answer is under way already then, and would be cut off. Whoever feeds the parser drops what comes later, see
    `is_through`.
    """

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return the next event; behind the last request there is none."""
        return h11.NEED_DATA if self.is_through else super().next_event()

    @property
    def is_through(self) -> bool:
        """Whether the client has sent the last request of this connection: nothing behind it has a meaning."""
        return self.their_state is h11.MUST_CLOSE


def refusal(request: h11.Request, max_bytes: int) -> str | None:
    """Return the code of the problem to refuse a request with, None when its head is sound.

    `max_bytes` bounds the head: h11 applies its own limit only to what is incomplete, and a head that comes in one
    piece passes it.
    """
    if request.http_version not in _VERSIONS:
        return "http-version"
    if _size(request) > max_bytes:
        return "headers-too-large"
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        return "ambiguous-length"  # the smuggler's: a proxy may have gone by the other length, or have found none
    if request.method != request.method.upper():
        return "not-implemented"  # a method is told by its letters' case; hypercorn would take `get` for GET
    return None


def in_origin_form(request: h11.Request) -> h11.Request | None:
    """Return the request with a path as its target, None when it has none that a server could serve.

    `GET http://host/path` has to be understood; its host stands over the header (RFC 9112 §3.2.2).
    """
    if request.target.startswith(b"/") or (request.method, request.target) == (b"OPTIONS", b"*"):
        return request
    match = _ABSOLUTE.fullmatch(request.target)
    if match is None:
        return None
    host, path = match[1], match[2] or b"/"
    headers = [(b"host", host), *((name, value) for name, value in request.headers if name != b"host")]
    return changed(request, target=path if path.startswith(b"/") else b"/" + path, headers=headers)


def without(request: h11.Request, header: bytes) -> h11.Request:
    """Return the request without a header, named in lower case."""
    kept = [pair for pair in request.headers if pair[0] != header]
    return request if len(kept) == len(request.headers) else changed(request, headers=kept)


def changed(
    request: h11.Request, *, target: bytes | None = None, headers: list[tuple[bytes, bytes]]
) -> h11.Request:
    """Return the request with other headers, perhaps another target."""
    return h11.Request(
        method=request.method,
        target=request.target if target is None else target,
        headers=headers,
        http_version=request.http_version,
    )


def _size(request: h11.Request) -> int:
    return len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
