"""Ours, with many submitted from Django: rows of the outbox, in one transaction."""

from __future__ import annotations

from django.db import transaction

from tests.bench.peers.apps.bulkhead import death, ended, first, one

__all__ = ["death", "ended", "first", "many", "one"]


def many(path: str, n: int) -> None:
    """Submit as one would in a view that starts many."""
    with transaction.atomic():
        for _ in range(n):
            one(path)
