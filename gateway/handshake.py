"""Which requests become a WebSocket, by RFC 6455 §4.2. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Final

import h11
from wsproto.utilities import generate_accept_token

VERSION: Final = b"13"

#: Headers of a 426: what a client should come back with (RFC 9110 §15.5.22, RFC 6455 §4.4).
OFFER: Final = (
    (b"connection", b"upgrade"),
    (b"upgrade", b"websocket"),
    (b"sec-websocket-version", VERSION),
)

#: Bytes of a key: a nonce that proves nothing but that both sides speak WebSocket.
_KEY_BYTES: Final = 16


def is_asked_for(request: h11.Request) -> bool:
    """Whether `request` asks for a WebSocket the way HTTP/1.1 has it; anything else is served as a plain request.

    One with a body is none: what follows its head could be taken for frames (request smuggling).
    """
    values = {name: _tokens(request, name) for name in (b"upgrade", b"connection")}
    return (
        request.method == b"GET"
        and request.http_version == b"1.1"
        and b"websocket" in values[b"upgrade"]
        and b"upgrade" in values[b"connection"]
        and not any(name in (b"content-length", b"transfer-encoding") for name, _ in request.headers)
    )


def complaint(request: h11.Request) -> tuple[str, str] | None:
    """Return code and detail of the problem of a request for a WebSocket that cannot become one; None: it can."""
    versions, keys = _values(request, b"sec-websocket-version"), _values(request, b"sec-websocket-key")
    if versions != [VERSION]:
        return "upgrade-required", "send `Sec-WebSocket-Version: 13`, once"
    if len(keys) != 1 or not _is_key(keys[0]):
        return "bad-request", "send one Sec-WebSocket-Key: 16 random bytes in base64"
    return None


def answer_to(request: h11.Request, subprotocol: str | None) -> list[tuple[bytes, bytes]]:
    """Return the headers of the 101 that accepts `request`, which has no `complaint`."""
    (key,) = _values(request, b"sec-websocket-key")
    chosen = [] if subprotocol is None else [(b"Sec-WebSocket-Protocol", subprotocol.encode("ascii"))]
    return [
        (b"Upgrade", b"websocket"),
        (b"Connection", b"Upgrade"),
        (b"Sec-WebSocket-Accept", generate_accept_token(key)),
        *chosen,
    ]


def subprotocols(request: h11.Request) -> list[str]:
    """Return what the client offers, in its order and letter case."""
    joined = b",".join(_values(request, b"sec-websocket-protocol"))
    return [part.decode("latin-1") for part in map(bytes.strip, joined.split(b",")) if part]


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False


def _values(request: h11.Request, name: bytes) -> list[bytes]:
    return [value.strip() for found, value in request.headers if found == name]


def _tokens(request: h11.Request, name: bytes) -> Iterable[bytes]:
    return [part.strip().lower() for value in _values(request, name) for part in value.split(b",")]
