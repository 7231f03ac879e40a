"""Submissions become runs: once each, whatever is repeated, whoever dies in between.

Rule: nobody is told of a run that is not committed. The book knows a run as soon as a round has decided on it, and
that round may never be committed; what only the book knows is answered by a round of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias

from gateway.store.protocol import StoreError
from gateway.store.rows import KeyRow, RunRow
from gateway.submission import Submission
from taskkit.errors import IdempotencyConflict, InvalidArguments, NotWritable, QueueFull, SubmitError
from taskkit.lifecycle import RunStatus

if TYPE_CHECKING:
    from gateway.engine import Engine

#: Seconds for which an idempotency key counts although the store may not have it: a commit takes a millisecond.
_KEY_MEMORY: Final = 60.0

#: How often a submission is decided on: a run that it names may end between the look into the store and the decision.
_TRIES: Final = 3

#: What became of a submission: its run and whether that was there before, or why there is none.
Outcome: TypeAlias = tuple[RunRow, bool] | SubmitError


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
        (outcome,) = await self.submit_all([submission])
        if isinstance(outcome, SubmitError):
            raise outcome
        return outcome

    async def submit_all(self, submissions: Sequence[Submission]) -> list[Outcome]:
        """Make a run of each submission, all in one commit; return what became of them, in their order.

        Each by itself may be refused, as `submit` says. A store that does not answer concerns all of them that
        were not committed before.
        """
        outcomes: list[Outcome | None] = [None] * len(submissions)
        try:
            await self._look(submissions, outcomes)
            for _ in range(_TRIES):
                if None not in outcomes:
                    break
                self._engine.check_store()
                await self._look_up_relatives(submissions, outcomes)
                decide = functools.partial(self._accept_all, submissions, outcomes)
                outcomes = await self._engine.decide(decide)
                if None in outcomes:  # made, and ended since the first look; or a relative has
                    await self._look(submissions, outcomes)
            gone: Exception = NotWritable(
                "its run has ended a moment ago and was removed (RETENTION.run_age_seconds)"
            )
        except (StoreError, NotWritable) as error:
            gone = error
        return [
            _unknown(submission, gone) if outcome is None else outcome
            for submission, outcome in zip(submissions, outcomes, strict=True)
        ]

    async def _look(self, submissions: Sequence[Submission], outcomes: list[Outcome | None]) -> None:
        """Find the runs that the submissions without an outcome made before, as far as they are committed."""
        # Most are new, and need no thread to read the store: 0.3 ms of a submission's way.
        new = self._engine.book.is_new
        open = [
            n
            for n, outcome in enumerate(outcomes)
            if outcome is None and (submissions[n].key is not None or not new(submissions[n].id))
        ]
        if not open:
            return
        keys = await self._keys([submissions[n] for n in open])
        used = {n: keys.get((submissions[n].subject, submissions[n].key)) for n in open}
        ids = {n: submissions[n].id if key is None else key.run for n, key in used.items()}
        runs = await self._engine.store.runs_by_id(list(ids.values()))
        gone = [key.run for key in used.values() if key is not None and key.run not in runs]
        if gone:  # another node has it by now, and is where its id leads to
            copies = await self._engine.store.copies(gone)
            runs |= {id: replace(copy, id=id, status=RunStatus.READY) for id, copy in copies.items()}
        for n in open:
            run = runs.get(ids[n])
            outcomes[n] = _conflict(submissions[n], used[n]) or (None if run is None else (run, True))

    async def _look_up_relatives(
        self, submissions: Sequence[Submission], outcomes: Sequence[Outcome | None]
    ) -> None:
        """Find the runs that have ended of those which the submissions without an outcome name."""
        find = self._engine.book.find
        for submission, outcome in zip(submissions, outcomes, strict=True):
            if outcome is None and (named := [id for id in named_by(submission) if find(id) is None]):
                submission.relatives = await self._engine.store.runs_by_id(named)

    async def _keys(self, submissions: Sequence[Submission]) -> dict[tuple[str, str | None], KeyRow]:
        """Return what the store knows of the submissions' keys, by subject and key."""
        found: dict[tuple[str, str | None], KeyRow] = {}
        for subject in {one.subject for one in submissions if one.key is not None}:
            names = [one.key for one in submissions if one.subject == subject and one.key is not None]
            rows = await self._engine.store.keys(subject, names)
            found |= {(subject, name): row for name, row in rows.items()}
        return found

    def _accept_all(
        self, submissions: Sequence[Submission], outcomes: Sequence[Outcome | None]
    ) -> list[Outcome | None]:
        """Decide on every submission without an outcome, in a round. One whose run has come and gone stays without.

        Returns a list of its own: what is decided here counts when the round is committed, and not before.
        """
        return [
            self._accept_one(submission) if outcome is None else outcome
            for submission, outcome in zip(submissions, outcomes, strict=True)
        ]

    def _accept_one(self, submission: Submission) -> Outcome | None:
        try:
            run, replayed = self._accept(submission)
        except SubmitError as error:
            return error
        return None if run is None else (run, replayed)

    def _recent_key(self, subject: str, name: str) -> KeyRow | None:
        """Return a key that the store may not have yet. An older one counts only if `_look` has found it there:
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
            if (conflict := _conflict(submission, key)) is not None:
                raise conflict
        id = submission.id if key is None else key.run
        if self._engine.book.has_ended(id):
            return None, True
        known = self._engine.book.find(id)
        if known is None and submission.row is not None:
            known = self._engine.book.find_row(submission.row.key)
        if known is not None:
            return known, True
        limit = self._engine.settings.limits.queued_runs
        if self._engine.book.waiting >= limit:
            raise QueueFull(f"{limit} runs wait already (LIMITS.queued_runs)", retry_after=5)
        if not self._check_relatives(submission):
            return None, False
        return self._engine.book.accept(submission, time.time()), False

    def _check_relatives(self, submission: Submission) -> bool:
        """Return whether all is known of the runs that a submission names; if not, one has ended since the look.

        Raises:
          InvalidArguments: there is no run that it comes after, or not yet; as `Flows.check`.
          QueueFull: as `Flows.check`.
        """
        book = self._engine.book
        for id in named_by(submission):
            known = submission.relatives.get(id)
            if book.find(id) is not None or (known is not None and known.status.is_terminal):
                continue
            if known is not None or book.has_ended(id):
                return False
            if id != submission.parent or id in submission.after:
                complaint = {"after": f"there is no run {id}"}
                raise InvalidArguments(f"the run comes after {id}, which there is not", errors=complaint)
        parent = None if submission.parent is None else book.find(submission.parent)
        book.flows.check(parent, submission.after, submission.id)
        return True


def named_by(submission: Submission) -> list[str]:
    """Return the ids of the runs that a submission names."""
    return [*submission.after, *([] if submission.parent is None else [submission.parent])]


def _conflict(submission: Submission, key: KeyRow | None) -> IdempotencyConflict | None:
    """Return what stands against a submission whose key was used, if anything."""
    if key is None or key.digest == submission.digest:
        return None
    return IdempotencyConflict("this Idempotency-Key was used with another body; use a new key")


def _unknown(submission: Submission, error: Exception) -> NotWritable:
    """Return the refusal of a submission of which nobody knows whether it was committed."""
    refusal = NotWritable(
        f"the outcome is unknown, send it again with this id: {error}", retry_after=2, run=submission.id
    )
    refusal.__cause__ = error
    return refusal
