"""The run that a request names, if its token reaches it."""

from __future__ import annotations

from gateway.reach import reaches
from gateway.reading import Refusal
from gateway.store.protocol import Store
from gateway.store.rows import RunRow
from taskkit.identifiers import parse_run_id
from taskkit.tokens import Claims


async def find_run(store: Store, id: str, claims: Claims) -> RunRow:
    """Return the run with this id, as it was written.

    Raises:
      Refusal: there is none; one beyond the token's reach is as unknown as one that is not there.
      StoreError: the disk does not answer.
    """
    canonical = parse_run_id(id)
    run = None if canonical is None else await store.run(canonical)
    if run is None or not reaches(claims, run):
        raise unknown_run()
    return run


def unknown_run() -> Refusal:
    """Return what whoever may not know of a run is told."""
    return Refusal("unknown-run", "there is no such run, or the token does not reach it")
