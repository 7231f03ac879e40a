"""What one round writes down for the store, then for the world. Pure.

The book decides; here its decisions become rows, events, messages. Nothing of them counts before the batch is
committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgspec

from gateway.endings import last_event, rfc3339
from gateway.output import Line
from gateway.state import After, OpenAttempt
from gateway.store.rows import Batch, EventRow, OutputRow, RunRow
from gateway.untold import Untold
from taskkit.wire.messages import Message, Order, Row


class Plan:
    """The round that is being planned.

    Args:
      next_pos: position of the next event in the store.
      untold: runs that Django has to be told of.

    Attributes:
      watched: whether anybody wants pictures of runs that change.
    """

    def __init__(self, next_pos: int, untold: Untold) -> None:
        self.watched: Callable[[], bool] = lambda: False
        self._next_pos = next_pos
        self._untold = untold
        self.batch = Batch()
        self.after = After()

    def take(self) -> tuple[Batch, After]:
        """Return what has been planned, and begin the next plan."""
        planned = self.batch, self.after
        self.batch, self.after = Batch(), After()
        return planned

    # --- messages -------------------------------------------------------------------------------------------

    def tell(self, message: Message) -> None:
        """Send to the supervisor."""
        self.after.control.append(message)

    def order(self, runner: str, order: Order) -> None:
        """Give a runner an order."""
        self.after.orders.append((runner, order))

    # --- what is said on a stream ---------------------------------------------------------------------------

    def append(
        self, run: RunRow, attempt: int, type: str, data: bytes, now: float, blob: str | None = None
    ) -> None:
        """Append an event; `data` is one line of JSON."""
        run.tail += 1
        self.batch.events.append(EventRow(self._next_pos, run.no, run.tail, attempt, type, data, now, blob))
        self.batch.spoken[run.no] = run
        self._next_pos += 1

    def say(self, run: RunRow, type: str, now: float, **data: Any) -> None:
        """Append an event of the gateway's own."""
        body = {**data, "_run": run.id, "_attempt": run.attempt, "_timestamp": rfc3339(now)}
        if run.row is not None:
            row = msgspec.json.decode(run.row, type=Row)
            body |= {"_task_id": row.pk, "_app": row.app, "_model": row.model}
        self.append(run, run.attempt, type, msgspec.json.encode(body), now)

    def end(self, run: RunRow, error: dict[str, Any] | None, now: float) -> None:
        """Append `stream.end`: the run has ended as its status says."""
        if error is not None:
            run.error = msgspec.json.encode(error)
            self._tell_seed_clients(run, error, now)
        self.say(run, "stream.end", now, **last_event(run, error))
        self.batch.ends.append(run.no)
        self.changed(run)
        self.after.ended.append(run.no)

    def _tell_seed_clients(self, run: RunRow, error: dict[str, Any], now: float) -> None:
        """Say in the seed's words that a row's task raised (CONTRACT §2.4)."""
        if run.row is None or "exception" not in error:
            return
        seen = {"message": error["message"], "error_type": error["exception"].rpartition(".")[2]}
        # The seed's clients listen for `error`; browsers raise an event of that name themselves.
        self.say(run, "error", now, **seen)
        self.say(run, "task_error", now, **seen)

    def output(self, attempt: OpenAttempt, lines: Iterable[Line], now: float) -> None:
        """Append what an attempt has printed."""
        run, number = attempt.run, attempt.row.number
        for line in lines:
            run.lines += 1
            told = (line.stream, line.text, now, line.level, line.logger)
            self.batch.outputs.append(OutputRow(run.no, run.lines, run.tail, number, *told))
        self.batch.spoken[run.no] = run

    # --- runs -----------------------------------------------------------------------------------------------

    def changed(self, run: RunRow, *, full: bool = True) -> None:
        """Write a run as it is when this round is committed, and tell Django.

        Without `full` a power cut may undo it: enough where what it undoes would be done again.
        """
        run.version += 1
        self.batch.changed[run.no] = run
        self.batch.full |= full
        self._untold.add(run)
        self.picture(run)

    def picture(self, run: RunRow, *, always: bool = False) -> None:
        """Keep the run as it is now for those who watch, or `always`: for those who begin to before this round ends."""
        if always or self.watched():
            self.after.changed.append(replace(run))
