"""What the gateway knows of one attempt, one runner, one round. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.dispatch import Seat
from gateway.store.rows import AttemptRow, RunRow
from taskkit.wire.messages import Cause, Created, Message, Order, RunnerSpec
from taskkit.wire.session import RunnerSession


@dataclass(slots=True)
class OpenAttempt:
    """An attempt that has not ended.

    Attributes:
      stopping: the tree stops, so its end is nobody's fault.
      spoke: moment of its newest event.
      listened: moment since when its `stall_timeout` counts, if it has one.
    """

    row: AttemptRow
    run: RunRow
    stopping: bool = False
    spoke: float = 0.0
    listened: float = 0.0

    def silence_left(self, moment: float) -> float:
        """Return seconds until it has been silent for too long; 0.0 when it has been, or has no such limit.

        An event before `listened` says nothing: by the supervisor's clock, which stands still while nobody reads what
        a task says, the whole time since then has passed in silence.
        """
        if self.run.stall_timeout is None or self.spoke <= self.listened:
            return 0.0
        return max(self.run.stall_timeout / 10, self.spoke + self.run.stall_timeout - moment)

    @property
    def overdue(self) -> bool:
        """Whether it has exceeded a limit of its time, and was asked to stop."""
        return self.row.cause is not None and self.row.ending is None


@dataclass(slots=True)
class RunnerState:
    """What the gateway knows of one runner.

    Attributes:
      given: runs it has been given.
      retiring: it gets no further run.
      exited: its cause of death.
      corrupt: what was wrong with its events pipe; nothing behind that is read.
      adopted: it was there before this gateway: its pipe may begin inside a frame.
      abandoned: attempts that were ended without it, and that it may still perform.
      progressed: moment of its last sign of progress, or of its first order after a rest.
      recalled: it was asked to give back what it has not begun.
    """

    spec: RunnerSpec
    pid: int
    started_at: float
    session: RunnerSession
    adopted: bool = False
    tokens: set[str] = field(default_factory=set)
    given: int = 0
    runs_done: int = 0
    last_ending: str | None = None
    retiring: bool = False
    exited: Cause | None = None
    corrupt: str = ""
    abandoned: int = 0
    progressed: float = 0.0
    recalled: bool = False

    @property
    def shared(self) -> bool:
        """Whether several runs are performed in this process."""
        return self.spec.concurrency > 1

    @property
    def seat(self) -> Seat:
        """What dispatch has to know."""
        usable = not self.retiring and self.exited is None and self.session.seq > 0
        left = self.spec.runs - self.given if usable else 0
        # What was given ahead waits for a seat; it takes none.
        return Seat(self.spec.id, min(len(self.tokens), self.spec.concurrency), self.spec.concurrency, left)

    @property
    def takes_ahead(self) -> bool:
        """Whether its process performs many runs, one at a time: then some may wait at it for their turn."""
        return self.spec.concurrency == 1 and self.spec.runs > 1


@dataclass(slots=True)
class After:
    """What is done once the batch is committed, in this order.

    Attributes:
      control: messages to the supervisor.
      orders: orders by runner.
      created: answers of intake runners.
      ended: numbers of runs that have ended.
      changed: pictures of runs when they are accepted, and after each change of their state while anybody watches.
      drained: runners that have nothing left to say.
    """

    control: list[Message] = field(default_factory=list)
    orders: list[tuple[str, Order]] = field(default_factory=list)
    created: list[Created] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    changed: list[RunRow] = field(default_factory=list)
    drained: list[str] = field(default_factory=list)
