"""The pieces of one run's stream, as each kind of client gets them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gateway import sse
from gateway.fanout import Entry
from gateway.following import Line, Piece, Reset
from gateway.lagging import Lag


def _as_sse(piece: Piece | Lag, run: str) -> bytes:
    if isinstance(piece, Reset):
        return sse.reset_event(piece.start, piece.reason, piece.epoch)
    return piece.sse if isinstance(piece, Entry) else sse.event_bytes(*parts(piece, run))


def _as_ndjson(piece: Piece | Lag, run: str) -> bytes:
    return sse.ndjson_line(*parts(piece, run))


def _as_text(piece: Piece | Lag, run: str) -> bytes:
    if isinstance(piece, Entry):
        return sse.plain_text(piece.row.data)
    return sse.plain_line(piece.row.text) if isinstance(piece, Line) else b""


def parts(piece: Piece | Lag, run: str) -> tuple[str | None, str, bytes]:
    """Return id, type and data of a piece."""
    if isinstance(piece, Entry):
        return piece.id, piece.row.type, piece.row.data
    if isinstance(piece, Line):
        return piece.id, "log", piece.data(run)
    if isinstance(piece, Lag):
        return None, "stream.lag", sse.lag_data(piece.skipped, run)
    return piece.id, "stream.reset", sse.reset_data(piece.start, piece.reason)


def type_of(piece: Piece) -> str:
    """Return the type of the event that a piece becomes."""
    if isinstance(piece, Entry):
        return piece.row.type
    return "log" if isinstance(piece, Line) else "stream.reset"


RENDER: Final[dict[str, Callable[[Piece | Lag, str], bytes]]] = {
    sse.EVENT_STREAM: _as_sse,
    sse.NDJSON: _as_ndjson,
    sse.PLAIN: _as_text,
}
