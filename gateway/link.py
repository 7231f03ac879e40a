"""The gateway's side of the courier: outbox rows in, transitions out, questions about rows."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from gateway.bulk import Bulk
from gateway.store.protocol import StoreError
from gateway.store.rows import RunRow
from gateway.submission import ON_THE_SPOT, Submission, parse_submission
from taskkit import failpoints
from taskkit.channel import Channel
from taskkit.errors import InvalidArguments, NotWritable, QueueFull, RemoteWireError, SubmitError
from taskkit.lifecycle import RunStatus
from taskkit.wire.messages import (
    LIMITS,
    Answer,
    Ask,
    Company,
    CourierToGateway,
    Disown,
    Disowned,
    Forgotten,
    Locate,
    Located,
    Recall,
    Row,
    ScheduleAnswer,
    ScheduleOrder,
    Submit,
    Submitted,
    Told,
    Transition,
)

if TYPE_CHECKING:
    from gateway.engine import Engine

logger = logging.getLogger("bulkhead.gateway")

#: Transitions that may be unanswered. The courier writes up to 100 in one transaction.
_WINDOW: Final = 100

#: Seconds between two looks at what Django has not been told: what happens to a run in between is told once. Django's
#: database takes a transition of its own for 0.1 to 1 ms of the courier's time, and short runs have three.
_PACE: Final = 0.025

#: Seconds for which a run that is not over is left alone: most are over then. One that waits is nothing new to Django,
#: which has submitted it.
_UNDER_WAY: Final = {RunStatus.READY: 0.5, RunStatus.RUNNING: 0.1}

#: Runs read at once of those that there was no memory for.
_PAGE: Final = 500

#: Seconds to wait for a run that another one comes after, and between two looks; the courier waits 30 s for an answer.
_RELATIVE_SECONDS: Final = 10.0
_RELATIVE_PAUSE: Final = 0.05

#: Answers that say "later", not "never".
_LATER: Final = frozenset({QueueFull.code, NotWritable.code})

#: What the store remembers of other nodes: whether there were any.
SHARED: Final = "shared"

#: Submissions that are decided on together: so many are checked in 5 ms, for which streams wait.
_TOGETHER: Final = 100

#: Seconds for an answer about a row.
_ASK_SECONDS: Final = 5.0

Incoming = Submit | Told | Answer | Recall | ScheduleAnswer | Company | Disown | Located

#: What the courier answers.
_Answer = Answer | ScheduleAnswer | Located


class CourierLink:
    """Speaks with the present courier; what it has not confirmed is said again to the next.

    Attributes:
      links: how many there were.
      shared: other nodes live that may have runs of the same database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._channel: Channel[Incoming] | None = None
        self._sent: dict[int, int] = {}  # version by run number, unanswered
        self._numbers: dict[str, int] = {}  # number by run id, of those
        self._refilling = False
        self._look_at = 0.0
        self._put_off = False
        self._bulk: Bulk
        self._arrived: deque[Submit] = deque()  # as many as the courier sends without an answer
        self._more = trio.Event()
        self.links = 0
        self.shared = False
        self._in_company = False  # a courier has said whether there are others, behind what they have by now
        self._disowning = 0
        self._asked: dict[str, tuple[trio.Event, list[_Answer]]] = {}

    @property
    def up(self) -> bool:
        """Whether a courier is linked."""
        return self._channel is not None and not self._channel.broken

    async def run(self, fd: int) -> None:
        """Speak over the socket `fd` until the courier is gone or a newer link takes its place."""
        channel: Channel[Incoming] = Channel(socket.socket(fileno=fd), CourierToGateway)
        if self._channel is not None:
            self._channel.close()
        self._channel = channel
        self._bulk = Bulk(self._engine.store, lambda run, result: channel.send(transition_of(run, result)))
        self.links += 1
        self._arrived = deque()
        self._sent.clear()
        self._numbers.clear()
        self._engine.wake()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.run)
                nursery.start_soon(self._bulk.run)
                nursery.start_soon(self._take_in, channel, nursery)
                self._refill(nursery)
                await self._listen(channel, nursery)
                nursery.cancel_scope.cancel()
        finally:
            channel.close()
            if self._channel is channel:
                self._channel = None

    async def _listen(self, channel: Channel[Incoming], nursery: trio.Nursery) -> None:
        while True:
            try:
                message, fds = await channel.receive()
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return
            except RemoteWireError as error:
                logger.error("the courier broke the protocol: %s", error)
                return
            for other in fds:
                socket.close(other)
            if isinstance(message, Submit):
                if channel.size > ON_THE_SPOT or message.taken is not None:
                    nursery.start_soon(self._submit, channel, message, channel.size)
                else:
                    self._arrived.append(message)
                    self._more.set()
            elif isinstance(message, Told):
                self._told(message)
                self._refill(nursery)
            elif isinstance(message, Recall):
                nursery.start_soon(self._recall, channel, message)
            elif isinstance(message, Company):
                self.shared, self._in_company = message.shared, True
                self._release()
                nursery.start_soon(self._note_company, message.shared)
            elif isinstance(message, Disown):
                self._disowning += 1
                nursery.start_soon(self._disown, channel, message)
            elif (waiting := self._asked.get(message.ask)) is not None:
                waiting[1].append(message)
                waiting[0].set()

    # --- outbox rows ---------------------------------------------------------------------------------------

    async def _take_in(self, channel: Channel[Incoming], nursery: trio.Nursery) -> None:
        """Submit what has arrived, in its order: tasks that are started at once begin in any.

        What takes long to check, or was another node's, is not among it, and may be overtaken.
        """
        arrived = self._arrived
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while arrived:
                taken = [arrived.popleft() for _ in range(min(len(arrived), _TOGETHER))]
                await self._submit_together(channel, nursery, taken)

    async def _submit_together(
        self, channel: Channel[Incoming], nursery: trio.Nursery, messages: list[Submit]
    ) -> None:
        known: list[tuple[Submit, Submission]] = []
        for message in messages:
            try:
                known.append((message, self._submission(message)))
            except SubmitError as error:
                nursery.start_soon(self._refuse, channel, message, error)
        outcomes = await self._engine.submit_all([submission for _, submission in known])
        for (message, _), outcome in zip(known, outcomes, strict=True):
            if isinstance(outcome, InvalidArguments) and "after" in outcome.errors:
                # It waits for a run that is still on its way, and hinders nobody.
                nursery.start_soon(self._submit, channel, message, 0)
            elif isinstance(outcome, SubmitError):
                nursery.start_soon(self._refuse, channel, message, outcome)
            else:
                await self._answer(channel, message, outcome[0])

    async def _submit(self, channel: Channel[Incoming], message: Submit, size: int) -> None:
        try:
            if size <= ON_THE_SPOT:
                submission = self._submission(message)
            else:
                # In a thread: checking 600 KB of arguments takes a second, and streams must not wait for it.
                submission = await trio.to_thread.run_sync(self._submission, message)
            if message.taken is not None:  # a copy of earlier times would be taken for it
                await self._engine.disown(message.id, lambda fence: fence != message.fence)
            run = await self._accepted(submission)
        except StoreError as error:
            refusal = Submitted(id=message.id, error=str(error), code=NotWritable.code, fence=message.fence)
            channel.send(refusal)
            return
        except SubmitError as error:
            await self._refuse(channel, message, error)
            return
        await self._answer(channel, message, run)

    async def _refuse(self, channel: Channel[Incoming], message: Submit, error: SubmitError) -> None:
        await self._refused(message, error.code, str(error))
        detail = "; ".join([str(error), *(f"{name}: {text}" for name, text in error.errors.items())])
        channel.send(Submitted(id=message.id, error=detail, code=error.code, fence=message.fence))

    async def _answer(self, channel: Channel[Incoming], message: Submit, run: RunRow) -> None:
        if run.id != message.id:
            await self._refused(message, "row-open", f"its row was open already, as run {run.id}")
        fence = run.fence if run.id == message.id else message.fence
        channel.send(Submitted(id=message.id, run=run.id, fence=fence))

    async def _accepted(self, submission: Submission) -> RunRow:
        """Submit; a run that this one comes after may still be on its way: it was committed, but not read, before."""
        flows = self._engine.book.flows
        with trio.move_on_after(_RELATIVE_SECONDS):
            while True:
                try:
                    return (await self._engine.submit(submission))[0]
                except InvalidArguments as error:
                    if "after" not in error.errors or flows.is_hopeless(submission.after):
                        raise
                await trio.sleep(_RELATIVE_PAUSE)
        return (await self._engine.submit(submission))[0]

    async def _refused(self, message: Submit, code: str, detail: str) -> None:
        """Have whoever waits for the run of a submission hear that there will be none, before the courier does."""
        if code in _LATER:
            return
        told = (message.id, message.task, message.parent or "", code, detail)
        with contextlib.suppress(NotWritable):  # said again with the submission, which is not answered then
            await self._engine.decide(lambda: self._engine.book.refuse(*told, time.time()))

    def _submission(self, message: Submit) -> Submission:
        submission = parse_submission(
            _body(message),
            self._engine.catalogue,
            self._engine.settings.limits,
            subject=message.subject,
            pools=self._engine.settings.all_pools,
            origin="outbox",
        )
        submission.id = message.id
        submission.row = message.row
        submission.run_after = message.run_after
        submission.using = message.using
        submission.key, submission.digest = message.key, message.digest
        submission.fence, submission.taken = message.fence, message.taken
        return submission

    # --- transitions ---------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Send the newest state of runs that Django does not know, as far as pace and window allow."""
        now = trio.current_time()
        if not self.up or len(self._sent) >= _WINDOW:
            return
        if now < self._look_at:
            self._put_off = True
            return
        assert self._channel is not None
        self._put_off = False
        self._look_at = now + _PACE
        clock = time.time()
        for no, run in self._engine.book.untold.items():
            if len(self._sent) >= _WINDOW:
                return
            if self._sent.get(no) != run.version and not _is_under_way(run, clock):
                self._sent[no] = run.version
                self._numbers[run.id] = no
                self._send(self._channel, run)
                failpoints.hit("transition.sent")

    def _send(self, channel: Channel[Incoming], run: RunRow) -> None:
        if run.result_blob is None:
            channel.send(transition_of(run))
        else:
            self._bulk.add(run)

    def forget(self, run: RunRow) -> None:
        """What Django was told of a run needs no answer any more."""
        self._sent.pop(run.no, None)
        if self._numbers.get(run.id) == run.no:
            del self._numbers[run.id]

    def next_look(self) -> float | None:
        """Return the moment at which `tell` should be called without any other reason; None: there is none."""
        if not self.up or len(self._sent) >= _WINDOW:
            return None
        return self._look_at if self._put_off or len(self._sent) < len(self._engine.book.untold) else None

    def _told(self, message: Told) -> None:
        self._bulk.told(message.run)
        no = self._numbers.get(message.run)
        if no is None:
            return
        if self._sent.get(no, 0) <= message.version:
            self._sent.pop(no, None)
            del self._numbers[message.run]
        self._engine.book.told(message.run, no, message.version)
        self._engine.wake_within(_PACE)  # not a round and a commit for each

    def _refill(self, nursery: trio.Nursery) -> None:
        """Have more read from the store when so many have been told that there is room for them."""
        if self._engine.book.untold.has_room and not self._refilling:
            self._refilling = True
            nursery.start_soon(self._read_untold)

    async def _read_untold(self) -> None:
        book, store = self._engine.book, self._engine.store
        after, complete = 0, False
        try:
            while book.untold.has_room and not complete:
                rows = await store.untold(after, _PAGE)
                complete = len(rows) < _PAGE
                # An open run is the book's own: the row would be a second one that does not change with it.
                book.untold.recall([book.find(row.id) or row for row in rows], complete=complete)
                after = rows[-1].no if rows else after
        except StoreError as error:
            logger.warning("what Django has not been told waits for the store: %s", error)
        finally:
            self._refilling = False
        self._engine.wake()

    async def _recall(self, channel: Channel[Incoming], message: Recall) -> None:
        book, store = self._engine.book, self._engine.store
        for id, version in message.runs.items():
            try:
                run = book.find(id) or await store.run(id)
            except StoreError:  # the courier asks again some other time
                return
            if run is None:
                channel.send(Forgotten(run=id))
            elif run.version > version and run.no not in book.untold:
                self._send(channel, run)

    def _release(self) -> None:
        if self._in_company and not self._disowning:
            self._engine.release()

    async def _note_company(self, shared: bool) -> None:
        """Note whether runs can be taken over while this tree is away."""
        try:
            await self._engine.store.upkeep.note(SHARED, "yes" if shared else "")
        except StoreError as error:
            logger.warning("the next start will not know of other nodes: %s", error)

    async def _disown(self, channel: Channel[Incoming], message: Disown) -> None:
        try:
            await self._engine.disown(message.run, lambda fence: fence == message.fence)
        except (StoreError, NotWritable) as error:  # the courier says it again to the next link
            logger.warning("run %s is another node's, and cannot be let go of yet: %s", message.run, error)
            return
        finally:
            self._disowning -= 1
            self._release()
        logger.info("run %s is another node's now", message.run)
        failpoints.hit("takeover.heard")
        channel.send(Disowned(run=message.run, fence=message.fence))

    # --- questions -----------------------------------------------------------------------------------------

    async def ask(self, app: str, model: str, pk: str) -> Answer:
        """See `Engine.ask`."""
        answer = await self._question(Ask(ask=secrets.token_hex(8), app=app, model=model, pk=pk))
        assert isinstance(answer, Answer)
        return answer

    async def schedule(self, order: ScheduleOrder) -> ScheduleAnswer:
        """See `Engine.schedule`."""
        answer = await self._question(msgspec.structs.replace(order, ask=secrets.token_hex(8)))
        assert isinstance(answer, ScheduleAnswer)
        return answer

    async def locate(self, run: str) -> Located | None:
        """See `Engine.locate`."""
        answer = await self._question(Locate(ask=secrets.token_hex(8), run=run))
        assert isinstance(answer, Located)
        return answer if answer.status == "found" else None

    async def _question(self, question: Ask | ScheduleOrder | Locate) -> _Answer:
        if self._channel is None:
            raise NotWritable("the database cannot be asked: the courier is away", retry_after=2)
        event, answers = self._asked[question.ask] = (trio.Event(), [])
        try:
            self._channel.send(question)
            with trio.move_on_after(_ASK_SECONDS):
                await event.wait()
        finally:
            del self._asked[question.ask]
        if not answers or answers[0].status == "away":
            detail = answers[0].detail if answers else f"no answer within {_ASK_SECONDS:.0f} s"
            raise NotWritable(f"the database cannot be asked: {detail}", retry_after=2)
        return answers[0]


def _is_under_way(run: RunRow, clock: float) -> bool:
    """Whether a run is about to change again, presumably."""
    patience = _UNDER_WAY.get(run.status)
    if patience is None:
        return False
    since = run.created_at if run.attempted_at is None else run.attempted_at
    return 0 <= clock - since < patience


def _body(message: Submit) -> Mapping[str, Any]:
    """Return the submission in the form that HTTP clients write."""
    body: dict[str, Any] = {"task": message.task}
    if message.row is None:
        body |= {"args": message.args, "kwargs": message.kwargs}
    options = {
        "pool": message.pool,
        "priority": message.priority,
        "timeout": message.timeout,
        **{name: getattr(message, name) for name in LIMITS},
        "max_attempts": message.max_attempts,
        "metadata": message.metadata or None,
        "tags": message.tags or None,
        "concurrency_key": message.concurrency_key or None,
        "parent": message.parent,
        "after": message.after or None,
    }
    return body | {key: value for key, value in options.items() if value is not None}


def transition_of(run: RunRow, result: bytes | None = None) -> Transition:
    """Return what Django is told of a run; `result` is that of its file."""
    return Transition(
        run=run.id,
        version=run.version,
        task=run.task,
        status=run.status.value,
        attempt=run.attempt,
        runner=run.runner,
        attempted_at=run.attempted_at,
        failure=run.failure,
        priority=run.priority,
        args=run.args,
        kwargs=run.kwargs,
        row=None if run.row is None else msgspec.json.decode(run.row, type=Row),
        created_at=run.created_at,
        started_at=run.started_at,
        finished_at=run.finished_at,
        result=run.result if result is None else result,
        error=run.error,
        metadata=run.metadata,
        tags=list(run.tags),
        using=run.using,
        fence=run.fence,
        options=_options(run) if run.origin == "http" else b"{}",
    )


def _options(run: RunRow) -> bytes:
    """Return what another node would need to make this run, besides what a transition says anyway."""
    options: dict[str, Any] = {
        "pool": run.pool,
        "priority": run.priority,
        "max_attempts": run.max_attempts,
        "run_after": run.run_after,
        "subject": run.subject or None,
        "concurrency_key": run.concurrency_key or None,
        "parent": run.parent,
        "after": msgspec.Raw(run.after) if run.after != b"[]" else None,
        "timeout": run.timeout,
        **{name: getattr(run, name) for name in LIMITS},
        "row": None if run.row is None else msgspec.Raw(run.row),
    }
    return msgspec.json.encode({name: value for name, value in options.items() if value is not None})
