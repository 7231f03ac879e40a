"""Submissions become runs: once each, whatever is repeated, whoever dies in between.

Rule: nobody is told of a run that is not committed. The book knows a run as soon as a round has decided on it, and
that round may never be committed; what only the book knows is answered by a round of its own.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Final

from gateway.store.protocol import StoreError
from gateway.store.rows import KeyRow, RunRow
from gateway.submission import Submission
from taskkit.errors import IdempotencyConflict, NotWritable, QueueFull

if TYPE_CHECKING:
    from gateway.engine import Engine

#: Seconds for which an idempotency key counts although the store may not have it: a commit takes a millisecond.
_KEY_MEMORY: Final = 60.0


class Acceptance:
    """Takes submissions in."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        keep = engine.settings.retention
        ages = (_KEY_MEMORY, keep.key_age_seconds, keep.run_age_seconds)
        self._key_memory = min(age for age in ages if age is not None)

    async def submit(self, submission: Submission) -> tuple[RunRow, bool]:
        """Make a run of `submission`; return (run, whether it was there before), committed to disk.

        Raises:
          QueueFull: as many runs wait as LIMITS.queued_runs allows.
          IdempotencyConflict: the key was used with another body.
          NotWritable: the store cannot be written now; `run` is the id to try again with.
        """
        try:
            known = await self._known(submission)
            if known is not None:
                return known, True
            self._engine.check_store()
            run, replayed = await self._engine.decide(functools.partial(self._accept, submission))
            if run is None:  # it was made and has ended since `_known` looked
                run = await self._known(submission)
            if run is None:
                raise NotWritable(
                    "its run has ended a moment ago and was removed (RETENTION.run_age_seconds)"
                )
        except (StoreError, NotWritable) as error:
            raise NotWritable(
                f"the outcome is unknown, send it again with this id: {error}",
                retry_after=2,
                run=submission.id,
            ) from error
        return run, replayed

    async def _known(self, submission: Submission) -> RunRow | None:
        """Return the run that this submission made before, if it is committed."""
        id = submission.id
        if submission.key is not None:
            key = await self._engine.store.key(submission.subject, submission.key)
            if key is not None:
                if key.digest != submission.digest:
                    raise IdempotencyConflict(
                        "this Idempotency-Key was used with another body; use a new key"
                    )
                id = key.run
        return await self._engine.store.run(id)

    def _recent_key(self, subject: str, name: str) -> KeyRow | None:
        """Return a key that the store may not have yet. An older one counts only if `_known` has found it there:
        retention removes keys, and what it has removed must not live on here."""
        key = self._engine.book.find_key(subject, name)
        if key is None or self._engine.book.find(key.run) is not None:
            return key
        return key if time.time() - key.created_at < self._key_memory else None

    def _accept(self, submission: Submission) -> tuple[RunRow | None, bool]:
        """Decide on a submission, in a round: look once more, as another may have come in between.

        None is a run that has come and gone in between: it is in the store.
        """
        key = None
        if submission.key is not None:
            key = self._recent_key(submission.subject, submission.key)
            if key is not None and key.digest != submission.digest:
                raise IdempotencyConflict("this Idempotency-Key was used with another body; use a new key")
        id = submission.id if key is None else key.run
        if self._engine.book.has_ended(id):
            return None, True
        known = self._engine.book.find(id)
        if known is None and submission.row is not None:
            known = self._engine.book.find_row(submission.row.key)
        if known is not None:
            return known, True
        limit = self._engine.settings.limits.queued_runs
        if len(self._engine.book.queues) >= limit:
            raise QueueFull(f"{limit} runs wait already (LIMITS.queued_runs)", retry_after=5)
        return self._engine.book.accept(submission, time.time()), False
