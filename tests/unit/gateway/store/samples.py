"""Rows for the tests of the store."""

from __future__ import annotations

from typing import Any

from gateway.store.rows import AttemptRow, Batch, EventRow, KeyRow, OutputRow, RunRow
from gateway.store.writer import Writer, prepare

BLOB = "0192d3a4-5b6c-7d8e-9fa0-b1c2d3e4f506"


def run(no: int, **changes: Any) -> RunRow:
    """Return run number `no`, Django told of it."""
    values: dict[str, Any] = {
        "no": no,
        "id": f"run-{no}",
        "task": "demo.count",
        "told": 1,
        "created_at": float(no),
    }
    return RunRow(**values | changes)


def attempt(run: int, number: int = 1, **changes: Any) -> AttemptRow:
    """Return an open attempt."""
    values: dict[str, Any] = {
        "run": run,
        "number": number,
        "runner": "r1",
        "pid": 4711,
        "token": f"token-{run}-{number}",
        "assigned_at": 1.5,
    }
    return AttemptRow(**values | changes)


def event(pos: int, run: int, offset: int, data: bytes = b'{"n":1}', blob: str | None = None) -> EventRow:
    """Return an event of the first attempt."""
    return EventRow(pos, run, offset, 1, "tick", data, 2.5, blob)


def output(run: int, offset: int, attempt: int = 1) -> OutputRow:
    """Return one printed line."""
    return OutputRow(run, offset, 0, attempt, "stdout", f"line {offset}", 3.5)


def key(name: str, subject: str = "ann") -> KeyRow:
    """Return an idempotency key."""
    return KeyRow(subject, name, b"\x00digest", "run-1", 4.5)


def write(writer: Writer, **changes: Any) -> None:
    """Commit a batch with these fields."""
    writer.commit(prepare(Batch(**changes)))
