"""Rows of model tasks, saved by runners of their own.

Promise: a row exists exactly if its run does, sooner or later. The runner saves the row together with an outbox
entry of the submission, in one transaction, so whatever fails between the save and the commit of the run (the store,
this process, the answer), the courier submits that entry. The same submission again, by its id or its idempotency
key, finds the row that was saved. Nothing is saved while the store is known not to take a run, or the queue is full.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from gateway.submission import Submission
from taskkit.errors import InvalidArguments, NotWritable, QueueFull
from taskkit.identifiers import NAME_FILE, new_token
from taskkit.wire.messages import LIMITS, Create, Created, Kill, Submit

if TYPE_CHECKING:
    from gateway.engine import Engine

#: Role of the runners that take these orders.
ROLE: Final = "intake"

#: Seconds for one row, waiting for a free runner included; then the runner is killed and the client gets 503.
_SECONDS: Final = 5.0


class Intake:
    """Hands rows to intake runners, one at a time each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._busy: dict[str, str] = {}  # ask by runner
        self._answers: dict[str, Created] = {}
        self._changed = trio.Event()

    def created(self, answer: Created) -> None:
        """A runner has answered. An answer that nobody waits for any more is dropped: it would be kept for good."""
        if answer.ask in self._busy.values():
            self._answers[answer.ask] = answer
        self.look()

    def look(self) -> None:
        """Something has changed: those who wait look again."""
        self._changed.set()
        self._changed = trio.Event()

    def _free(self) -> str | None:
        for id, runner in self._engine.book.runners.items():
            seat = runner.seat
            if runner.spec.role == ROLE and seat.left > 0 and id not in self._busy:
                return id
        return None

    async def create(self, submission: Submission, fields: dict[str, Any]) -> Created:
        """Have a row saved; see `Engine.create_row`."""
        self._check_room()
        ask = secrets.token_hex(8)
        # Noted with the row, so that no other node takes the entry for its own meanwhile.
        claim = msgspec.structs.replace(_entry(submission), node=self._node(), fence=new_token())
        order = Create(ask=ask, task=submission.task.name, fields=fields, submission=claim)
        runner: str | None = None
        try:
            with trio.fail_after(_SECONDS):
                runner = await self._give(order)
                while ask not in self._answers:
                    if runner not in self._engine.book.runners:
                        raise NotWritable("the process that saves rows died over this one", retry_after=2)
                    await self._wait()
        except trio.TooSlowError:
            if runner is None:
                raise NotWritable("no process is free to save rows", retry_after=2) from None
            self._engine.tell(Kill(runner=runner, kind="timeout", detail="saving a row took too long"))
            raise NotWritable(f"saving the row took longer than {_SECONDS:.0f} s", retry_after=5) from None
        finally:
            if runner is not None and self._busy.get(runner) == ask:
                del self._busy[runner]
            answer = self._answers.pop(ask, None)
            self.look()
        assert answer is not None
        created = _checked(answer)
        if created.node not in ("", claim.node):  # an earlier try of the same submission, there
            raise NotWritable("another node has it, and is just taking it in", retry_after=1)
        return created

    def _node(self) -> str:
        """Return the name that the courier has given to this tree."""
        with contextlib.suppress(OSError):
            return (self._engine.directory / NAME_FILE).read_text(encoding="utf-8").strip()
        return ""

    def _check_room(self) -> None:
        """Refuse before anything is saved what could not become a run now."""
        if self._engine.store_error:
            raise NotWritable(self._engine.store_error, retry_after=2)
        limit = self._engine.settings.limits.queued_runs
        if self._engine.book.waiting >= limit:
            raise QueueFull(f"{limit} runs wait already (LIMITS.queued_runs)", retry_after=5)

    async def _give(self, order: Create) -> str:
        while True:
            runner = self._free()
            if runner is not None:
                self._busy[runner] = order.ask
                self._engine.book.runners[runner].given += 1
                if self._engine.order(runner, order):
                    return runner
            await self._wait()

    async def _wait(self) -> None:
        with trio.move_on_after(0.1):  # a runner's hello is no event of ours
            await self._changed.wait()


def _checked(answer: Created) -> Created:
    if answer.row is not None:
        return answer
    if answer.errors:
        raise InvalidArguments("the row is not valid", errors=answer.errors)
    failure = answer.failure
    raise NotWritable(failure.message if failure else "the row could not be saved", retry_after=2)


def _entry(submission: Submission) -> Submit:
    """Return the submission as its outbox entry has it; the row is still to come."""
    return Submit(
        id=submission.id,
        task=submission.task.name,
        pool=submission.pool,
        priority=submission.priority,
        run_after=submission.run_after,
        timeout=submission.timeout,
        **{name: getattr(submission, name) for name in LIMITS},
        max_attempts=submission.max_attempts,
        metadata=msgspec.json.decode(submission.metadata),
        tags=list(submission.tags),
        subject=submission.subject,
        concurrency_key=submission.concurrency_key,
        parent=submission.parent,
        after=list(submission.after),
        key=submission.key,
        digest=submission.digest,
    )
