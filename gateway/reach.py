"""What a token's reach means for a look into the store. Pure."""

from __future__ import annotations

from gateway.store.rows import RunFilter, RunRow
from taskkit.tokens import OWN, Claims


def limit_to_reach(which: RunFilter, claims: Claims) -> None:
    """Have a look find only what the token reaches; see Claims.sees_run."""
    if claims.runs == "*":
        return
    which.tasks = claims.tasks
    if claims.runs == OWN:
        which.owner, which.ids = claims.subject or None, ()
    else:
        which.ids = tuple(sorted(claims.runs))


def reaches(claims: Claims, run: RunRow) -> bool:
    """Whether a run is within a token's reach."""
    return claims.sees_run(run.id, run.task, run.subject)
