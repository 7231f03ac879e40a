"""The gateway's heart: one round after another of look, decide, commit, act.

A round takes in whatever has come (frames of all runners, requests, exits, answers), lets the book decide in one
synchronous stretch, commits everything in one transaction, and only then consumes the pipes, tells clients, and
sends orders. So what a client has seen is in the store, and what is not in the store is still in a pipe.

When the store cannot be written, the round waits: pipes fill, tasks block, requests get 503, nothing is dropped. It
goes on by itself when the disk does.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from gateway.accepting import Acceptance, Outcome
from gateway.attendance import Attendance
from gateway.book import Book
from gateway.changes import Changes
from gateway.documents import Picture, Pool
from gateway.fanout import Hub
from gateway.grants import Revocation
from gateway.intake import Intake
from gateway.link import CourierLink
from gateway.moments import pass_round
from gateway.pipes import Pipes
from gateway.roster import RunnerView, view_of
from gateway.state import After
from gateway.store.protocol import Store, StoreError
from gateway.store.reads import read_blob
from gateway.store.rows import Batch, EventRow, RunRow
from gateway.submission import Catalogue, Submission
from gateway.tally import RunTally, StoreTally
from taskkit import failpoints
from taskkit.errors import LifecycleError, NotWritable
from taskkit.settings import Settings
from taskkit.tokens import Claims, Ticket
from taskkit.wire.messages import (
    Answer,
    Created,
    Drained,
    Exited,
    Expired,
    Located,
    Message,
    Notes,
    Order,
    Reconfigure,
    Reconfigured,
    RunnerUp,
    ScheduleAnswer,
    ScheduleOrder,
    Stalled,
    Start,
)

logger = logging.getLogger("bulkhead.gateway")

#: Seconds a request waits for its commit before it gets 503. A commit takes a millisecond; 5 s is a disk in trouble.
_ANSWER_SECONDS: Final = 5.0

#: Seconds to wait after a commit that failed, first and longest.
_RETRY: Final = (0.1, 1.0)

#: Seconds that a store which takes nothing is given at the end: one more try of _RETRY.
_STALLED_FLUSH: Final = 1.2

#: Seconds until a dead runner that had nothing to do is let go, if no round comes before. Of a process per run each
#: would cost a round and a commit of its own.
_FAREWELL: Final = 0.02

#: Seconds between rounds that only wait for time to pass, at most.
_LONGEST_SLEEP: Final = 3600.0


class _Request:
    """Something a task of the gateway wants decided in the next round, and when it is committed."""

    def __init__(self, decide: Callable[[], Any]) -> None:
        self._decide = decide
        self._value: Any = None
        self._error: Exception | None = None
        self.done = trio.Event()

    def decide(self) -> None:
        """Ask the book; an error is the caller's to hear, at once."""
        try:
            self._value = self._decide()
        except Exception as error:
            self._error = error

    def settle(self) -> None:
        """The round is committed."""
        self.done.set()

    @property
    def result(self) -> Any:
        """What was decided."""
        if self._error is not None:
            raise self._error
        return self._value


class Engine:
    """Everything the gateway decides. One task runs `run`; any task may call the rest.

    Args:
      control: sends to the supervisor; never waits.
    """

    def __init__(
        self,
        *,
        store: Store,
        book: Book,
        hub: Hub,
        catalogue: Catalogue,
        settings: Settings,
        url: str,
        versions: dict[str, str],
        blobs: Path,
        control: Callable[[Message], None],
    ) -> None:
        self.store = store
        self.hub = hub
        self.settings = settings
        self.url = url
        self.versions = versions
        self.book = book
        self.changes = Changes()
        book.watch(lambda: self.changes.watched)
        self._use(catalogue)
        self.store_error = ""
        self.directory = blobs.parent
        self._blobs = blobs
        self._control = control
        self._requests: list[_Request] = []
        self._pipes = Pipes(book, lines_per_second=settings.limits.output_lines_per_second)
        self._sleep = trio.CancelScope()
        self._look_at = self._held_until = math.inf
        self._round_over = trio.Event()
        self._acceptance = Acceptance(self)
        self.courier = CourierLink(self)
        self.intake = Intake(self)
        self.attendance = hub.audience = Attendance(self)
        self.rounds = 0
        self.store_tally = StoreTally()
        self._notes: list[str] | None = None
        self._started_at = trio.current_time()
        planned = Counter(row.run for row in book.batch.events)  # at the start: what became of lost attempts
        for run in book.runs.values():
            hub.opened(run.no, run.tail - planned[run.no])
        self.attendance.found(book.runs.values())

    # --- what requests want --------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something is there for the next round."""
        self._pipes.wake()

    def wake_within(self, seconds: float) -> None:
        """There is something for the next round, which comes no later than this."""
        self._look_at = min(self._look_at, trio.current_time() + seconds)
        self._sleep.deadline = min(self._sleep.deadline, self._look_at)

    def hold(self, seconds: float) -> None:
        """Have no run begin until `release`, or for so long: some may be another node's by now."""
        self.book.held = True
        self._held_until = trio.current_time() + seconds
        self.wake()

    def release(self) -> None:
        """What is another node's is known: the others may begin."""
        self._held_until = -math.inf
        if self.book.held:
            self.wake()

    async def decide(self, decide: Callable[[], Any]) -> Any:
        """Have `decide` called in the next round; return its result when that round is committed.

        Raises:
          NotWritable: the store did not take the round in time. Whether it will is unknown.
        """
        request = _Request(decide)
        self._requests.append(request)
        self.wake()
        with trio.move_on_after(_ANSWER_SECONDS):
            await request.done.wait()
            return request.result
        raise NotWritable(
            f"the store does not answer: {self.store_error or 'a commit takes long'}", retry_after=2
        )

    def request(self, decide: Callable[[], Any]) -> None:
        """Have `decide` called in the next round, without waiting for it."""
        self._requests.append(_Request(decide))
        self.wake()

    async def submit(self, submission: Submission) -> tuple[RunRow, bool]:
        """Make a run of `submission`; see `Acceptance.submit`."""
        return await self._acceptance.submit(submission)

    async def submit_all(self, submissions: Sequence[Submission]) -> list[Outcome]:
        """Make a run of each submission, in one commit; see `Acceptance.submit_all`."""
        return await self._acceptance.submit_all(submissions)

    def check_store(self) -> None:
        """Refuse what would have to be written.

        Raises:
          NotWritable: the store cannot be written now.
        """
        if self.store_error:
            raise NotWritable(self.store_error)

    async def cancel(self, run: RunRow, grace: float | None) -> RunRow:
        """Ask a run to stop; return it as it is when that is committed.

        Raises:
          LifecycleError: it has ended.
          NotWritable: the store cannot be written now.
        """

        def decide() -> RunRow:
            known = self.book.find(run.id)
            if known is None:
                raise LifecycleError(f"run {run.id} has ended")
            seconds = self.settings.limits.cancel_grace_seconds if grace is None else grace
            self.book.cancel(known, seconds, time.time())
            return known

        self.check_store()
        found: RunRow = await self.decide(decide)
        return found

    async def input(self, run: RunRow, name: str, data: bytes, key: str) -> tuple[int, bool]:
        """Tell an open run something; return the input's number, and whether it was told that before, on disk.

        Raises:
          LifecycleError: it has ended.
          IdempotencyConflict, QueueFull: as `Inputs.add` says.
          NotWritable: the store cannot be written now.
        """

        def decide() -> tuple[int, bool]:
            known = self.book.find(run.id)
            if known is None:
                raise LifecycleError(f"run {run.id} has ended")
            return self.book.input(known, name, data, key, time.time())

        self.check_store()
        found: tuple[int, bool] = await self.decide(decide)
        return found

    async def create_row(self, submission: Submission, fields: dict[str, Any]) -> Created:
        """Have an intake runner validate and save a row of a model task, with an outbox entry of its submission.

        The answer has the row, and the id of the submission that it was saved for: an earlier one, if this is
        a repetition.

        Raises:
          InvalidArguments: messages by field.
          NotWritable: the database, or every intake runner, is away; nothing is known to be saved.
          QueueFull: as many runs wait as LIMITS.queued_runs allows; nothing was saved.
        """
        return await self.intake.create(submission, fields)

    async def disown(self, id: str, stale: Callable[[str], bool]) -> None:
        """Forget the copy of a run whose fence is `stale`, if there is one: another node has the run now.

        Raises:
          NotWritable, StoreError: the store cannot be used now.
        """
        written = await self.store.run(id)

        def decide() -> None:
            run = self.book.find(id) or written
            if run is not None and stale(run.fence):
                self.courier.forget(run)
                self.book.disown(run, time.time())

        if written is not None or self.book.find(id) is not None:
            await self.decide(decide)

    async def locate(self, id: str) -> Located | None:
        """Return where a run is that is not here; None: nobody else lives who could have it, or no one has.

        Raises:
          NotWritable: the courier is away or does not answer.
        """
        return await self.courier.locate(id) if self.courier.shared else None

    async def ask(self, app: str, model: str, pk: str) -> Answer:
        """Ask Django's database about a task row, through the courier.

        Raises:
          NotWritable: the courier is away or does not answer.
        """
        return await self.courier.ask(app, model, pk)

    async def schedule(self, order: ScheduleOrder) -> ScheduleAnswer:
        """Have the courier do what is wanted with schedules, which are in Django's database.

        Raises:
          NotWritable: courier or database is away.
        """
        return await self.courier.schedule(order)

    @property
    def run_tally(self) -> RunTally:
        """What became of runs since this gateway began."""
        return self.book.tally

    def runners(self) -> list[RunnerView]:
        """Return all runners that are not drained."""
        return [view_of(runner, self.book.attempts) for runner in self.book.runners.values()]

    def statistics(self) -> Picture:
        """Return a picture of now."""
        casualties = self.book.casualties.statistics(trio.current_time())
        grants = self.book.grants.statistics()
        return {
            "queued": len(self.book.queues),
            "queues": self.book.queues.depth(),
            "pools": self._pools(),
            "running": len(self.book.attempts),
            "runners": len(self.book.runners),
            "untold": len(self.book.untold),
            "rounds": self.rounds,
            "uptime": trio.current_time() - self._started_at,
            "store_error": self.store_error,
            "courier": self.courier.up,
            "draining": self.book.draining,
            "restarts": {
                "courier": max(0, self.courier.links - 1),
                "runners": self.book.tally.exits.total() - self.book.tally.exits["left"],
            },
            "held": casualties["held"],
            "quarantined": casualties["quarantined"],
            "tickets": grants["tickets"],
            "revocations": grants["revocations"],
            "deserted": self.attendance.deserted,
        }

    def _pools(self) -> dict[str, Pool]:
        waiting = self.book.queues.depth()
        runners = [runner for runner in self.book.runners.values() if runner.exited is None]
        return {
            name: {
                "size": pool.size,
                "queued": waiting.get(name, 0),
                "runners": sum(runner.spec.pool == name for runner in runners),
                "busy": sum(runner.spec.pool == name and bool(runner.tokens) for runner in runners),
            }
            for name, pool in self.settings.all_pools.items()
        }

    async def end_runner(self, id: str, *, now: bool) -> bool:
        """Have a runner finish what it has and leave, or end it `now`, on an operator's word.

        Its runs are lost then, and put back as their `on_lost` says. Return whether a living runner has this id.

        Raises:
          NotWritable: the store cannot be written now.
        """

        def decide() -> bool:
            runner = self.book.runners.get(id)
            if runner is None or runner.exited is not None:
                return False
            if now:
                self.book.end_runner(id, "operator", "")
            else:
                self.book.drain_runner(id)
            return True

        self.check_store()
        found: bool = await self.decide(decide)
        return found

    async def reset_task(self, task: str) -> bool:
        """Let the runs of a held task go; return whether it was held.

        Raises:
          NotWritable: the store cannot be written now.
        """
        self.check_store()
        was_held: bool = await self.decide(lambda: self.book.reset(task, time.time()))
        return was_held

    async def redeem(self, ticket: Ticket) -> bool:
        """Use a ticket up; return, when that is on disk, whether this was the first time.

        Raises:
          NotWritable: the store cannot be written now.
        """

        def decide() -> bool:
            return self.book.grants.redeem(ticket, self.book.moment, self.book.batch)

        self.check_store()
        first: bool = await self.decide(decide)
        return first

    def is_used(self, ticket: Ticket) -> bool:
        """Whether a ticket was used."""
        return self.book.grants.is_used(ticket)

    async def revoke(self, revocation: Revocation) -> None:
        """Take tokens back; on disk when this returns. They are refused from the next round on.

        Raises:
          TooManyRevocations: there is no room for another.
          NotWritable: the store cannot be written now.
        """
        self.check_store()
        await self.decide(lambda: self.book.grants.revoke(revocation, self.book.batch))

    def is_revoked(self, claims: Claims) -> bool:
        """Whether a token with these claims was taken back."""
        return self.book.grants.is_revoked(claims)

    # --- what the supervisor says --------------------------------------------------------------------------

    def runner_up(self, message: RunnerUp, fds: list[int]) -> None:
        """A runner exists; takes ownership of its descriptors."""
        self._pipes.add(message.spec, fds, adopted=message.adopted)
        self.book.runner_up(message.spec, message.pid, message.started_at, adopted=message.adopted)
        if message.retiring:
            self.book.retire([message.spec.id])
        self.wake()

    def runner_exited(self, message: Exited) -> None:
        """A runner has died. One that had nothing to do keeps nobody waiting: the next round lets it go."""
        self.book.runner_exited(message.runner, message.cause)
        runner = self.book.runners.get(message.runner)
        if runner is None or runner.tokens:
            self.wake()
        else:
            self.wake_within(_FAREWELL)

    def expired(self, message: Expired) -> None:
        """A deadline has passed for which the supervisor ends nobody."""
        told = (message.runner, message.token, message.kind)
        self._requests.append(_Request(lambda: self.book.expired(*told, time.time())))
        self.wake()

    def reconfigure(self, message: Reconfigure) -> None:
        """The project's code is another one now."""
        self._use(Catalogue(message.catalogue))
        self.versions = message.versions
        self.book.retire(message.retire)
        self._requests.append(_Request(lambda: self.book.say(Reconfigured(ask=message.ask))))
        self.wake()

    def _use(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.book.memory_limits = {
            task.name: task.memory_limit for task in catalogue.all() if task.memory_limit is not None
        }
        self.book.throttled(catalogue.limits())

    def tell(self, message: Message) -> None:
        """Send to the supervisor."""
        self._control(message)

    # --- rounds --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Make rounds until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.attendance.run)
            while True:
                until = min(self._look_at, trio.current_time() + self._patience())
                self._sleep = trio.CancelScope(deadline=until)
                with self._sleep:
                    # In one task, with one descriptor to wait for: a turn of the loop costs 25 µs.
                    await self._pipes.wait()
                self._look_at = math.inf
                await self._round()

    def _patience(self) -> float:
        """Return seconds until something has to be looked at without being woken."""
        looks = (self._pipes.next_look(), self.courier.next_look(), self.book.next_look())
        waits = [look - trio.current_time() for look in looks if look is not None]
        for due in (self.book.queues.next_due(), self.book.expiry.next()):
            if due is None:
                continue
            # A wall clock may step: look at least once a second while a run waits for its time.
            waits.append(min(due - time.time(), 1.0))
        book = self.book
        moments = (book.queues.next_delayed(), book.casualties.next_trial(book.moment), book.throttle.next())
        waits += [moment - trio.current_time() for moment in moments if moment is not None]
        if book.held:
            waits.append(self._held_until - trio.current_time())
        return max(0.0, min(waits, default=_LONGEST_SLEEP))

    async def _round(self) -> None:
        self.rounds += 1
        self.book.moment = trio.current_time()
        requests, self._requests = self._requests, []
        taken = self._pipes.look()
        for request in requests:
            request.decide()
        self.book.held = self.book.held and self.book.moment < self._held_until
        self.book.claim(time.time())
        batch, after = self.book.take()
        pass_round("decided", batch)
        await self._commit(batch)
        pass_round("committed", batch)
        for id, size in taken:
            self._pipes.consume(id, size)
        pass_round("consumed", batch)
        await self._publish(batch)
        pass_round("published", batch)
        self._act(after)
        if batch.events:
            # Not before those who watch have heard of the runs that were accepted.
            self.hub.settled(batch.events[-1].pos)
        for request in requests:
            request.settle()
        self.courier.tell()
        self._tell_notes()
        over, self._round_over = self._round_over, trio.Event()
        over.set()

    def _tell_notes(self) -> None:
        notes = self.book.casualties.news()
        if notes is not None and notes != self._notes:
            self._notes = notes
            self.tell(Notes(notes=notes))

    async def _commit(self, batch: Batch) -> None:
        delay, longest = _RETRY
        while True:
            began = time.perf_counter()
            try:
                await self.store.commit(batch)
            except StoreError as error:
                self.store_tally.failures += 1
                if not self.store_error:
                    logger.error("%s; tasks wait until it does", error)
                    self.tell(Stalled(error=str(error)))
                self.store_error = str(error)
            else:
                if self.store_error:
                    logger.info("the store can be written again")
                    self.tell(Stalled(error=""))
                self.store_error = ""
                self._count(batch, time.perf_counter() - began)
                return
            await trio.sleep(delay)
            delay = min(delay * 2, longest)

    def _count(self, batch: Batch, seconds: float) -> None:
        if batch:
            self.store_tally.events += len(batch.events)
            self.store_tally.lines += len(batch.outputs)
            self.store_tally.commits.observe(seconds)

    # --- after the commit ----------------------------------------------------------------------------------

    async def _publish(self, batch: Batch) -> None:
        for no, rows in _by_run(batch.events).items():
            self.hub.publish(no, [row if row.blob is None else await self._filled(row) for row in rows])
        for no, lines in _by_run(batch.outputs).items():
            self.hub.publish_output(no, lines)

    async def _filled(self, row: EventRow) -> EventRow:
        assert row.blob is not None
        try:
            data = await trio.to_thread.run_sync(read_blob, self._blobs, row.blob)
        except OSError as error:  # no descriptor is left, or the disk does not answer
            logger.error("event %d of run %d is left to the store: %s", row.offset, row.run, error)
            return row
        return row._replace(data=data)

    def _act(self, after: After) -> None:
        for no in after.accepted:
            self.hub.opened(no, 0)
        for no in after.ended:
            self.hub.ended(no)
        self.changes.publish(after.changed)
        for message in after.control:
            self.tell(message)
        for id, order in after.orders:
            if self._pipes.give(id, order) and isinstance(order, Start):
                failpoints.hit("start.ordered")
        for created in after.created:
            self.intake.created(created)
        for id in after.drained:
            self._pipes.drop(id)
            self.tell(Drained(runner=id))
            failpoints.hit("drained.sent")
            self.intake.look()

    def order(self, runner: str, order: Order) -> bool:
        """Give an order outside a round (intake); return whether the runner's socket took it."""
        return self._pipes.order(runner, order)

    # --- the end -------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """The tree stops: claim nothing, ask runs to stop."""
        self._requests.append(_Request(self.book.drain))
        self.wake()

    async def until_quiet(self, seconds: float) -> None:
        """Wait until every pipe is empty and its writers have gone, for at most `seconds`.

        For a gateway whose supervisor died: the kernel kills the runners, and what they wrote is still here.
        """
        with trio.move_on_after(seconds):
            while not self._pipes.at_end():
                await self.round_over()  # the end of a pipe makes a round
        await self.flush()

    async def round_over(self) -> None:
        """Return when a round has been acted on; the caller has a deadline."""
        await self._round_over.wait()

    async def flush(self) -> None:
        """Return when one more round is committed, or the store does not take it."""
        try:
            with trio.fail_after(_STALLED_FLUSH if self.store_error else math.inf):
                await self.decide(lambda: None)
        except (NotWritable, trio.TooSlowError) as error:
            logger.error("left with a round that is not committed: %s", self.store_error or error)

    def close(self) -> None:
        """Let go of every descriptor."""
        self._pipes.close()


def _by_run(rows: Iterable[Any]) -> dict[int, list[Any]]:
    grouped: dict[int, list[Any]] = {}
    for row in rows:
        grouped.setdefault(row.run, []).append(row)
    return grouped
