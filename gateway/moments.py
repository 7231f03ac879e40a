"""Passes the moments of a round, by what it contains, for tests that arm them."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.store.rows import Batch
from taskkit import failpoints


def pass_round(phase: str, batch: Batch) -> None:
    """Pass the moments of a round, by what it contains."""
    if failpoints.enabled():
        for kind in _kinds(batch):
            failpoints.hit(f"{phase}.{kind}")


def _kinds(batch: Batch) -> Iterator[str]:
    """Yield what a round contains, as in `failpoints.ROUND_KINDS`."""
    changed = batch.changed_attempts
    found = {
        "accept": bool(batch.runs),
        "assign": bool(batch.attempts),
        "started": any(row.started_at is not None and row.ending is None for row in changed),
        "event": bool(batch.events),
        "end": bool(batch.ends),
        "told": bool(batch.told),
        "drained": bool(batch.forgotten),
    }
    yield from (kind for kind, there in found.items() if there)
