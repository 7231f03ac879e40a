"""Rows of model tasks, saved by runners of their own."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

import trio

from taskkit.errors import InvalidArguments, NotWritable
from taskkit.wire.messages import Create, Created, Kill, Row, TaskInfo

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

    async def create(self, task: TaskInfo, fields: dict[str, Any]) -> Row:
        """Have a row saved; see `Engine.create_row`."""
        ask = secrets.token_hex(8)
        runner: str | None = None
        try:
            with trio.fail_after(_SECONDS):
                runner = await self._give(Create(ask=ask, task=task.name, fields=fields))
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
        return _row_of(answer)

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


def _row_of(answer: Created) -> Row:
    if answer.row is not None:
        return answer.row
    if answer.errors:
        raise InvalidArguments("the row is not valid", errors=answer.errors)
    failure = answer.failure
    raise NotWritable(failure.message if failure else "the row could not be saved", retry_after=2)
