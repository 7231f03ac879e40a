"""The gateway's memory of open runs, where every decision about them is made. Pure: plans, does no I/O.

One round of the engine calls these methods in one synchronous stretch. They change the book, write down in `batch`
what the store has to commit, and in `after` what may be done once it has. Nobody else changes a run's state.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from gateway.casualties import Casualties
from gateway.dispatch import Queues, Seat, choose, pools_of, sent_home
from gateway.endings import (
    among_others,
    ending_of,
    error_of,
    expired,
    lost_with,
    of_user_code,
    quarantine_of,
    with_limit,
)
from gateway.expiry import Expiry
from gateway.flows import Flows, after_of, failed_with, refusal_of
from gateway.grants import Grants
from gateway.inputs import Inputs
from gateway.ordering import Ordering, is_limited
from gateway.output import Line
from gateway.pace import PATIENCE, Paces
from gateway.plan import Plan
from gateway.state import After, OpenAttempt, RunnerState
from gateway.store.rows import COPY, AttemptRow, Batch, InputRow, KeyRow, Opened, RunRow
from gateway.submission import Submission
from gateway.tally import RunTally
from gateway.throttle import Limit, Throttle
from gateway.untold import Untold
from taskkit.errors import LifecycleError, UnexpectedMessage
from taskkit.identifiers import new_token
from taskkit.lifecycle import Ending, RunEvent, RunStatus, next_run_status, verdict
from taskkit.settings import Settings
from taskkit.wire.messages import (
    Assigned,
    Cause,
    Created,
    Disarm,
    Event,
    Finished,
    GivenBack,
    Greeted,
    Hello,
    Kill,
    Message,
    Progress,
    RunnerMessage,
    RunnerSpec,
    Started,
    Taken,
    TaskFailure,
)
from taskkit.wire.session import AttemptState, Judgement, RunnerSession

#: Why an attempt in a shared process was ended without it.
_ABANDONED: Final = {
    "timeout": "the attempt exceeded its timeout and did not stop within its grace",
    "stall_timeout": "the attempt sent no event for its stall_timeout and did not stop within its grace",
    "cancelled": "the task did not stop within its grace after a cancellation",
}

#: What an attempt is asked to stop for, by the deadline that has passed.
_TOLD: Final = {"soft_timeout": "soft_timeout", "silence": "stall_timeout"}

#: Why an attempt was asked to stop.
_ASKED: Final = {
    "timeout": "the attempt exceeded its timeout and was asked to stop",
    "soft_timeout": "the attempt exceeded its soft_timeout and was asked to stop",
    "stall_timeout": "the attempt sent no event for its stall_timeout and was asked to stop",
}

#: Epochs of a run's stream at each node that has it: a thousand power cuts during one run are more than any has seen.
EPOCHS: Final = 1_000

#: Ended runs that are remembered. A submission waits a few milliseconds for its look into the store; 1,000 runs end
#: in 100 ms at the very most.
_REMEMBERED: Final = 1_000


class Book:
    """The gateway's memory.

    Args:
      adopting: runners that live; open attempts of any other are lost.
      now: Unix seconds.
      moment: monotonic seconds.

    Attributes:
      moment: when the present round began; whoever makes rounds sets it.
      held: no run begins yet: some may be another node's by now.
    """

    def __init__(
        self, settings: Settings, opened: Opened, adopting: Iterable[str], now: float, moment: float = 0.0
    ) -> None:
        self._settings = settings
        self._limits = {name: pool.size for name, pool in settings.all_pools.items()}
        self._processes = {
            name: -(-pool.size // pool.concurrency) for name, pool in settings.all_pools.items()
        }
        self.moment = moment
        self._next_no = opened.next_no
        self._newest_id = opened.newest_id
        self._sources = dict(opened.sources)
        self.runs: dict[int, RunRow] = {}
        self.attempts: dict[str, OpenAttempt] = {}
        self.runners: dict[str, RunnerState] = {}
        self.untold = Untold()
        self.grants = Grants(opened, moment)
        self.inputs = Inputs(opened.inputs)
        self._plan = Plan(opened.next_pos, self.untold)
        self._order = Ordering(settings.limits, self._plan)
        self.throttle = Throttle(opened.begun, moment, now)
        self.queues = Queues(self.throttle)
        self.flows = Flows(self.runs, self.inputs, self._plan)
        self.expiry = Expiry()
        self.casualties = Casualties(settings.breaker, self.queues, self.runs)
        self.draining = False
        self.held = False
        self._paces = Paces()
        self._ahead: dict[str, None] = {}  # runners that were given runs ahead
        self.tally = RunTally()
        self._by_id: dict[str, int] = {}
        self._by_key: dict[str, int] = {}
        self._keys: OrderedDict[tuple[str, str], KeyRow] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._ending: deque[RunRow] = deque()  # runs whose relatives are being told
        self._load(opened, set(adopting), now)

    @property
    def batch(self) -> Batch:
        """What the present round commits."""
        return self._plan.batch

    def watch(self, watched: Callable[[], bool]) -> None:
        """Have pictures taken of runs that change while `watched` says so."""
        self._plan.watched = watched

    @property
    def after(self) -> After:
        """What is done when that is committed."""
        return self._plan.after

    def _load(self, opened: Opened, adopting: set[str], now: float) -> None:
        self.untold.more = opened.more_untold
        for run in opened.runs.values():
            if run.version > run.told:
                self.untold.add(run)
            if not run.status.is_terminal:
                self._remember(run)
                self.flows.add(run)
        for row in opened.attempts:
            attempt = OpenAttempt(row, self.runs[row.run])
            self.attempts[row.token] = attempt
        trying = {attempt.run.no for attempt in self.attempts.values()}
        self.casualties.load(opened, trying, self.moment, now, self.batch)
        for attempt in list(self.attempts.values()):
            if attempt.row.runner not in adopting:
                cause = Cause(kind="lost", detail="the supervisor of this run went away")
                self._runner_lost_attempt(attempt, cause, now)
        assigned = {attempt.run.no for attempt in self.attempts.values()}
        for run in self.runs.values():
            if run.status is RunStatus.READY and run.no not in assigned:
                self._enqueue(run, now)
        for runner in self._sources.keys() - adopting:
            self.batch.forgotten.append(runner)

    def _enqueue(self, run: RunRow, now: float) -> None:
        if not self.flows.holds(run.no):
            self.queues.add(run, now)
        self.expiry.add(run)

    def _remember(self, run: RunRow) -> None:
        self.runs[run.no] = run
        self._by_id[run.id] = run.no
        if run.row_key is not None:
            self._by_key[run.row_key] = run.no

    def _forget(self, run: RunRow) -> None:
        self.runs.pop(run.no, None)
        self._by_id.pop(run.id, None)
        if run.row_key is not None and self._by_key.get(run.row_key) == run.no:
            del self._by_key[run.row_key]
        self.queues.remove(run.no)
        self.flows.remove(run)
        self.expiry.remove(run.no)
        self._ended[run.id] = None
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    # --- submissions ---------------------------------------------------------------------------------------

    def find(self, id: str) -> RunRow | None:
        """Return an open run by its public id."""
        no = self._by_id.get(id)
        return None if no is None else self.runs[no]

    def is_new(self, id: str) -> bool:
        """Whether no run can have this id: ids begin with their time, and it is above all that there have been.

        False says nothing: two processes that submit at once are not in order, and clocks step.
        """
        return id > self._newest_id

    def has_ended(self, id: str) -> bool:
        """Whether this run has ended a moment ago: a submission that asked the store before may not know it."""
        return id in self._ended

    @property
    def waiting(self) -> int:
        """How many runs wait: for a runner, for their time, for others."""
        return len(self.queues) + len(self.flows)

    def find_row(self, row_key: str) -> RunRow | None:
        """Return the open run of a task row."""
        no = self._by_key.get(row_key)
        return None if no is None else self.runs[no]

    def find_key(self, subject: str, key: str) -> KeyRow | None:
        """Return a recently used idempotency key; older ones are in the store."""
        return self._keys.get((subject, key))

    def accept(self, submission: Submission, now: float) -> RunRow:
        """Make a run of a submission that is known to be new."""
        row = submission.row
        run = RunRow(
            no=self._next_no,
            id=submission.id,
            task=submission.task.name,
            args=submission.args,
            kwargs=submission.kwargs,
            row=None if row is None else msgspec.json.encode(row),
            row_key=None if row is None else row.key,
            pool=submission.pool,
            priority=submission.priority,
            run_after=submission.run_after,
            timeout=submission.timeout,
            soft_timeout=submission.soft_timeout,
            cpu_timeout=submission.cpu_timeout,
            stall_timeout=submission.stall_timeout,
            schedule_timeout=submission.schedule_timeout,
            max_attempts=submission.max_attempts,
            on_lost=submission.task.on_lost,
            metadata=submission.metadata,
            tags=submission.tags,
            subject=submission.subject,
            origin=submission.origin,
            using=submission.using,
            created_at=now,
            replay_of=submission.replay_of,
            concurrency_key=submission.concurrency_key,
            parent=submission.parent,
            after=msgspec.json.encode(submission.after) if submission.after else b"[]",
            fence=submission.fence or new_token(),
        )
        taken = submission.taken
        if taken is not None:
            _go_on(run, taken)
        if run.replay_of is not None:
            self.casualties.released(run.replay_of)
        self._next_no += 1
        self._newest_id = max(self._newest_id, run.id)
        self._remember(run)
        self.flows.add(run)
        self.untold.add(run)
        self.batch.runs.append(run)
        self.batch.full = True
        self.after.accepted.append(run.no)
        self._plan.picture(run, always=True)
        self.tally.accepted[run.origin] += 1
        if submission.key is not None:
            self._use_key(KeyRow(submission.subject, submission.key, submission.digest, run.id, now))
        self._join(run, submission.relatives, now)
        if taken is not None and run.no in self.runs:
            self._resume(run, taken, now)
        return run

    def _join(self, run: RunRow, ended: Mapping[str, RunRow], now: float) -> None:
        """A new run takes its place beside its relatives, of which some have `ended`."""
        parent = None if run.parent is None else self.find(run.parent)
        if parent is not None:
            self.flows.born(parent, run, now)
        for id in after_of(run):
            if run.no in self.runs and id in ended and self.find(id) is None:
                self._precede(run, ended[id], now)
        if run.no not in self.runs:
            return
        self._enqueue(run, now)
        above = parent or ended.get(run.parent or "")
        if above is not None and (above.cancelling or above.status is RunStatus.CANCELLED):
            self.cancel(run, self._settings.limits.cancel_grace_seconds, now)

    def _precede(self, run: RunRow, ended: RunRow, now: float) -> None:
        """A run that waits for another hears of its end."""
        if ended.status is not RunStatus.SUCCESSFUL:
            event, error = failed_with(ended)
            self._end_run(run, event, now, error=error)
        else:
            self.flows.tell(run, ended, now)
            if self.flows.heard(run, ended):
                self._enqueue(run, now)

    def refuse(self, id: str, task: str, parent: str, code: str, message: str, now: float) -> None:
        """A submission of Django's was refused for good: whoever waits for its run hears that it failed."""
        self.flows.refused(id)
        known = self.find(parent)
        if known is not None:
            self._hear(known, self.flows.denied(known, refusal_of(id, task, code, message), now))

    def _hear(self, run: RunRow, told: InputRow | None) -> None:
        """Have an attempt that is under way hear what its run was told."""
        attempt = self._attempt_of(run)
        if told is not None and attempt is not None:
            attempt.spoke = self.moment
            self._order.hear(attempt.row, [told])

    def _resume(self, run: RunRow, taken: Taken, now: float) -> None:
        """Go on with a run whose node is dead: its attempt was lost, if it had one."""
        error = lost_with(taken)
        decision = verdict(
            Ending.LOST,
            attempts=max(run.counted, 1),
            max_attempts=run.max_attempts,
            on_lost=run.on_lost,
            cancelling=False,
            lost=run.attempt - run.counted,
        )
        if taken.began:
            run.failure = msgspec.json.encode(error)
        if decision.event is not RunEvent.PUT_BACK:
            self._end_run(run, decision.event, now, error=error)
            return
        if taken.began:
            self._plan.say(
                run,
                "run.retrying",
                now,
                attempt=run.attempt,
                ending=Ending.LOST.value,
                delay=decision.delay,
                error=error,
            )
        if taken.began and decision.delay:
            run.run_after = now + decision.delay
            self.queues.remove(run.no)
            self._enqueue(run, now)

    def disown(self, run: RunRow, now: float) -> None:
        """Forget a run, open or not, that is another node's now: without a word on its stream, which goes on there.

        Its copy gets another id. So whoever asks for it is sent there, and it can come back.
        """
        known = self.runs.get(run.no)
        if known is not None:
            run = known
            self._end_copy(run, now)
        id = run.id
        run.told = run.version
        self.untold.told(run.no)
        self.batch.told[run.no] = run.version
        self.batch.renamed[run.no] = run.id = f"{id}{COPY}{run.no}"
        self.batch.full = True
        self._ended.pop(id, None)

    def _end_copy(self, run: RunRow, now: float) -> None:
        attempt = self._attempt_of(run)
        if attempt is not None:
            cause = Cause(kind="lost", detail="another node has the run now")
            runner = self.runners.get(attempt.row.runner)
            self._close_attempt(attempt, Ending.LOST, now, cause=cause)
            self.casualties.ended(run, Ending.LOST, "", self.moment, now, self.batch)
            if runner is not None and runner.exited is None:
                self._let_go(runner, attempt, cause)
        run.status = next_run_status(run.status, RunEvent.CANCEL)
        run.finished_at = now
        self.batch.changed[run.no] = run
        self.after.ended.append(run.no)
        self.inputs.forget(run.no, self.batch)
        self._forget(run)

    def _let_go(self, runner: RunnerState, attempt: OpenAttempt, cause: Cause) -> None:
        """Have an attempt stopped that counts no more, and nobody else with it."""
        if runner.shared:
            self._order.abandon(runner, attempt.row, "cancelled")
        elif attempt.row.started_at is None and runner.tokens:  # behind another one that is at work
            self._order.ask_to_stop(attempt.row, "cancelled")
        else:
            self.end_runner(runner.spec.id, "operator", cause.detail)

    def _use_key(self, key: KeyRow) -> None:
        self.batch.keys.append(key)
        self._keys[key.subject, key.key] = key
        while len(self._keys) > 10_000:  # by then it is in the store for long
            self._keys.popitem(last=False)

    # --- runners -------------------------------------------------------------------------------------------

    def runner_up(self, spec: RunnerSpec, pid: int, started_at: float, *, adopted: bool) -> RunnerState:
        """A runner exists; what was ordered from it before this gateway's time is ordered again."""
        session = RunnerSession(self._sources.get(spec.id, 0))
        runner = self.runners[spec.id] = RunnerState(spec, pid, started_at, session, adopted)
        for attempt in self.attempts.values():
            if attempt.row.runner == spec.id:
                self._adopt(runner, attempt)
        if session.seq:  # its Hello is stored, but whether the supervisor heard of it is not known
            self._plan.tell(Greeted(runner=spec.id))
        if self.draining:  # born while the tree began to stop: nobody else would send it home
            self._order.retire(runner)
        return runner

    def _adopt(self, runner: RunnerState, attempt: OpenAttempt) -> None:
        row, run = attempt.row, attempt.run
        attempt.spoke = self.moment  # as far as is known
        runner.tokens.add(row.token)
        runner.given += 1
        started = row.started_at is not None
        runner.session.expect(row.token, AttemptState.STARTED if started else AttemptState.ORDERED)
        runner.retiring = runner.retiring or runner.given >= runner.spec.runs
        self._plan.tell(Assigned(runner=runner.spec.id, last=runner.retiring))
        if started:  # whether the supervisor heard of its limit is not known
            self._order.limit_time(run, row, at_most=True)
            self._order.limit_rest(run, row, at_most=True)
        else:
            self._order.start(run, row, self.memory_limits.get(run.task), self.flows.outcomes(run))
        self._order.hear(row, self.inputs.of(run.no))  # which of them it has heard is not known
        if run.suspect and runner.shared:
            self._order.send_home(runner)
        if run.cancelling:
            self._order.cancel(row)
        elif attempt.overdue:
            self._ask_again(attempt)

    def runner_exited(self, id: str, cause: Cause) -> None:
        """A runner has died; its pipe is read to the end before its attempts are judged."""
        runner = self.runners.get(id)
        if runner is not None:
            runner.exited = cause

    def runner_corrupt(self, id: str, error: Exception) -> None:
        """A runner has broken the protocol: nothing more of it is believed, and it has to die."""
        runner = self.runners[id]
        runner.corrupt = f"the task wrote bytes of its own into its runner's events pipe ({error})"
        runner.session.close()
        runner.retiring = True
        self._plan.tell(Kill(runner=id, kind="corrupt", detail=runner.corrupt))

    def runner_drained(self, id: str, now: float) -> None:
        """A dead runner's pipe holds no further frame: whatever is open on it has ended by its death."""
        runner = self.runners.pop(id)
        assert runner.exited is not None
        cause = runner.exited
        if runner.corrupt:  # it may have left by itself before the kill came
            cause = msgspec.structs.replace(cause, kind="corrupt", detail=runner.corrupt)
        lost = sorted((self.attempts[token] for token in runner.tokens), key=lambda attempt: attempt.run.no)
        together = sum(attempt.row.started_at is not None for attempt in lost) + runner.abandoned
        for attempt in lost:
            self._runner_lost_attempt(attempt, cause, now, together)
        self.tally.exits["left" if cause.exit_code == 0 and not lost else cause.kind] += 1
        self._sources.pop(id, None)
        self.batch.sources.pop(id, None)
        self.batch.forgotten.append(id)
        self.after.drained.append(id)

    def _runner_lost_attempt(self, attempt: OpenAttempt, cause: Cause, now: float, together: int = 1) -> None:
        """The runner of an attempt has died, in which `together` runs were performed.

        Which of several was the culprit nobody can tell: each is lost, and performed again alone, where its death
        will be its own.
        """
        if attempt.row.started_at is None:
            self._never_started(attempt, cause, now)
            return
        cause = of_user_code(cause)
        ending = ending_of(cause)
        if together > 1 and ending is Ending.CRASHED:
            attempt.run.suspect = True
            cause, ending = among_others(cause, together), Ending.LOST
        self._end_attempt(attempt, ending, now, cause=cause)

    def _never_started(self, attempt: OpenAttempt, cause: Cause | None, now: float) -> None:
        """The runner died before it said `Started`, or gave it back: it did not happen and is not counted."""
        self._close_attempt(attempt, Ending.LOST, now, cause=cause)
        run = attempt.run
        self.casualties.ended(run, Ending.LOST, "", self.moment, now, self.batch)
        if run.cancelling:
            self._end_run(run, RunEvent.CANCEL, now, error=error_of(Ending.CANCELLED, None, None))
        else:
            self._enqueue(run, now)

    # --- dispatch ------------------------------------------------------------------------------------------

    def claim(self, now: float) -> None:
        """Give waiting runs to free runners; those that have waited too long end."""
        if self.draining or self.held:
            return
        self._expire(now)
        self.queues.wake(self.moment)
        self._take_back()
        for pool in pools_of(self._limits, self.queues, now, self.casualties.trials(self.moment)):
            while self._claim_alone(pool, now) or self._claim_one(pool, now):
                pass
            self._claim_ahead(pool, now)

    def _expire(self, now: float) -> None:
        for no in self.expiry.due(now):
            run = self.runs.get(no)
            if run is not None and (self.queues.waits_for(no) or self.flows.holds(no)):
                self._end_run(run, RunEvent.FAIL, now, error=expired(run))

    def _claim_one(self, pool: str, now: float) -> bool:
        chosen = choose(self._seats(pool), self._limits[pool])
        run = None if chosen is None else self.queues.take(pool, now)
        if chosen is None or run is None:
            return False
        self._assign(self.runners[chosen], run, now)
        return True

    def _claim_alone(self, pool: str, now: float) -> bool:
        """Give the next run that has to be alone to a runner without any; if there is none, have one made."""
        trials = self.casualties.trials(self.moment)
        if not self.queues.waits_alone(pool, now, trials):
            return False
        seats = self._seats(pool)
        chosen = choose(seats, self._limits[pool], alone=True)
        if chosen is None:
            if sum(seat.open for seat in seats) < self._limits[pool]:
                self._make_way(sent_home(seats, self._processes[pool]))
            return False
        run = self.queues.take_alone(pool, now, trials)
        assert run is not None, "one waits"
        runner = self.runners[chosen]
        self._assign(runner, run, now)
        self.casualties.claimed(run, self.moment, now, self.batch)
        if runner.shared:  # the others' seats are not given out, and another process takes their place
            self._order.send_home(runner)
        return True

    def _make_way(self, id: str | None) -> None:
        if id is not None:
            self._order.send_home(self.runners[id])

    def _claim_ahead(self, pool: str, now: float) -> None:
        """Give runs of quick tasks to runners at work, the one with the fewest first."""
        run = self.queues.peek(pool, now)
        if run is None or not self._may_go_ahead(run):
            return
        takers = [
            runner for runner in self.runners.values() if runner.spec.pool == pool and runner.takes_ahead
        ]
        for depth in range(1, self._paces.depth(run.task)):
            for runner in takers:
                # The last run of a process is given when it is free: behind it the process is retired.
                if len(runner.tokens) != depth or runner.seat.left <= 1 or self._is_stuck(runner):
                    continue
                taken = self.queues.take(pool, now)
                assert taken is run
                self._assign(runner, run, now, ahead=True)
                run = self.queues.peek(pool, now)
                if run is None or not self._may_go_ahead(run):
                    return

    def _may_go_ahead(self, run: RunRow) -> bool:
        # The deadline of one that has not begun would be that of the one in front of it.
        return not is_limited(run) and self._paces.is_quick(run.task)

    def _is_stuck(self, runner: RunnerState) -> bool:
        return runner.recalled or self.moment - runner.progressed > PATIENCE

    def _take_back(self) -> None:
        """Take back what waits at runners that are busy for longer than was thought."""
        for id in list(self._ahead):
            runner = self.runners.get(id)
            if runner is None or len(runner.tokens) < 2:
                del self._ahead[id]
                if runner is not None:
                    runner.recalled = False
            elif not runner.recalled and self._is_stuck(runner):
                self._order.take_back(
                    runner, [token for token in runner.tokens if self.attempts[token].row.started_at is None]
                )

    def next_look(self) -> float | None:
        """Return the moment at which something given ahead may have to be taken back; None: nothing is."""
        moments = [
            runner.progressed + PATIENCE
            for id in self._ahead
            if (runner := self.runners.get(id)) is not None and not runner.recalled
        ]
        return min(moments, default=None)

    def _given_back(self, message: GivenBack, now: float) -> None:
        attempt = self.attempts[message.token]
        runner = self.runners[attempt.row.runner]
        self._never_started(attempt, None, now)
        runner.given -= 1
        runner.runs_done -= 1

    def _seats(self, pool: str) -> list[Seat]:
        return [runner.seat for runner in self.runners.values() if runner.spec.pool == pool]

    def _assign(self, runner: RunnerState, run: RunRow, now: float, *, ahead: bool = False) -> None:
        row = AttemptRow(
            run=run.no,
            number=run.attempt + 1,
            runner=runner.spec.id,
            pid=runner.pid,
            token=new_token(),
            assigned_at=now,
        )
        self.attempts[row.token] = OpenAttempt(row, run)
        self.throttle.assigned(run)
        if ahead:
            self._ahead[runner.spec.id] = None
        elif not runner.tokens:
            runner.progressed = self.moment
        runner.tokens.add(row.token)
        runner.given += 1
        runner.retiring = runner.given >= runner.spec.runs
        runner.session.expect(row.token)
        self.batch.attempts.append(row)
        self.batch.full = True
        if runner.given == 1 or runner.retiring:  # what comes in between is no news to the supervisor
            self._plan.tell(Assigned(runner=runner.spec.id, last=runner.retiring))
        self._order.start(run, row, self.memory_limits.get(run.task), self.flows.outcomes(run))
        self._order.hear(row, self.inputs.of(run.no))

    def _memory_limit(self, attempt: OpenAttempt) -> int | None:
        runner = self.runners.get(attempt.row.runner)
        general = None if runner is None else runner.spec.memory_limit
        return self.memory_limits.get(attempt.run.task) or general

    #: Memory limit in bytes by task name; the engine fills it from the catalogue.
    memory_limits: Mapping[str, int] = {}

    def throttled(self, limits: Mapping[str, Limit]) -> None:
        """These tasks, by name, have limits from now on: see `gateway.throttle`."""
        open = [(attempt.run, attempt.row.started_at is not None) for attempt in self.attempts.values()]
        self.throttle.use(limits, open)

    # --- what runners say ----------------------------------------------------------------------------------

    def frame(self, runner: RunnerState, seq: int, message: RunnerMessage, now: float) -> None:
        """Act on one frame of a runner.

        Raises:
          UnexpectedMessage: it breaks the protocol; the caller ends the runner as corrupt.
        """
        judgement = runner.session.receive(seq, message)
        if judgement is Judgement.DUPLICATE:
            return
        # A stray's number counts as well: after a takeover the next frame must not look like a hole.
        id = runner.spec.id
        self._sources[id] = self._plan.batch.sources[id] = seq
        if judgement is Judgement.STRAY:
            return
        if isinstance(message, Event):
            self._event(message.token, message.type, message.data, now, message.blob)
        elif isinstance(message, Progress):
            attempt = self._event(message.token, "run.progress", message.data, now)
            attempt.run.progress = message.data
        elif isinstance(message, Started):
            self._started(message, now)
        elif isinstance(message, Finished):
            self._finished(message, now)
        elif isinstance(message, GivenBack):
            self._given_back(message, now)
        elif isinstance(message, Created):
            runner.runs_done += 1
            self.after.created.append(message)
        else:
            assert isinstance(message, Hello)
            self._plan.tell(Greeted(runner=runner.spec.id))

    def _event(self, token: str, type: str, data: bytes, now: float, blob: str | None = None) -> OpenAttempt:
        attempt = self.attempts[token]
        attempt.spoke = self.moment
        # JSON of ours has no line break; with one, a task could forge events of a stream.
        if b"\n" in data or b"\r" in data:
            raise UnexpectedMessage("an event's data has a line break")
        self._plan.append(attempt.run, attempt.row.number, type, data, now, blob)
        return attempt

    def output(self, token: str, lines: Iterable[Line], now: float) -> None:
        """Keep what an attempt printed; lines of an attempt that is not open are dropped."""
        attempt = self.attempts.get(token)
        if attempt is not None:
            self._plan.output(attempt, lines, now)

    def _started(self, message: Started, now: float) -> None:
        attempt = self.attempts[message.token]
        run, row = attempt.run, attempt.row
        row.started_at = now
        run.status = next_run_status(run.status, RunEvent.START)
        run.attempt = row.number
        run.counted += 1
        run.started_at = run.started_at or now
        run.runner, run.attempted_at = row.runner, now
        self.batch.changed_attempts.append(row)
        self._order.limit_time(run, row)
        self._order.limit_rest(run, row)
        attempt.listened = self.moment
        self.throttle.begun(run, self.moment, now, self.batch)
        self.expiry.remove(run.no)
        self._progressed(row.runner)
        if run.cancelling:  # before it had begun, when only giving it back was asked for
            self._order.cancel(row)
        self._plan.say(run, "run.started", now, attempt=row.number, runner=row.runner, pid=row.pid)
        if run.parent is not None and (parent := self.find(run.parent)) is not None:
            self.flows.began(parent, run, row.number, now)
        # After a power cut it may count as not begun, and is performed once more: with on_lost="retry" it is anyway.
        self._plan.changed(run, full=run.on_lost != "retry")

    def _finished(self, message: Finished, now: float) -> None:
        attempt = self.attempts[message.token]
        ending = Ending(message.ending) if message.ending in Ending.__members__.values() else Ending.RAISED
        if attempt.stopping and ending is not Ending.RETURNED:
            ending = Ending.LOST
        if attempt.overdue and ending is not Ending.RETURNED and not attempt.run.cancelling:
            assert attempt.row.cause is not None
            cause = msgspec.json.decode(attempt.row.cause, type=Cause)
            self._end_attempt(attempt, Ending.TIMED_OUT, now, cause=cause, finished=message)
            return
        self._end_attempt(attempt, ending, now, finished=message)

    def _progressed(self, id: str) -> None:
        runner = self.runners.get(id)
        if runner is not None:
            runner.progressed = self.moment

    # --- endings -------------------------------------------------------------------------------------------

    def _close_attempt(
        self,
        attempt: OpenAttempt,
        ending: Ending,
        now: float,
        *,
        cause: Cause | None = None,
        failure: TaskFailure | None = None,
    ) -> None:
        row = attempt.row
        row.ended_at, row.ending = now, ending.value
        row.cause = None if cause is None else msgspec.json.encode(cause)
        row.failure = None if failure is None else msgspec.json.encode(failure)
        self.batch.changed_attempts.append(row)
        del self.attempts[row.token]
        self.throttle.ended(attempt.run, begun=row.started_at is not None)
        self.tally.attempts[ending.value] += 1
        runner = self.runners.get(row.runner)
        if runner is not None:
            runner.progressed = self.moment
            runner.tokens.discard(row.token)
            runner.session.forget(row.token)
            runner.runs_done += 1
            runner.last_ending = ending.value
            self._order.see_off(runner)
        if is_limited(attempt.run) or attempt.run.cancelling:  # others have no deadline
            self._plan.tell(Disarm(runner=row.runner, token=row.token))

    def _note_pace(self, attempt: OpenAttempt, ending: Ending, finished: Finished | None) -> None:
        row = attempt.row
        if finished is None or row.started_at is None or ending not in (Ending.RETURNED, Ending.RAISED):
            self._paces.unsettled(attempt.run.task)
        elif finished.seconds is not None:
            self._paces.ended(attempt.run.task, finished.seconds)
        elif row.ended_at is not None:  # as it looks from here, in steps of rounds
            self._paces.ended(attempt.run.task, row.ended_at - row.started_at)

    def _end_attempt(
        self,
        attempt: OpenAttempt,
        ending: Ending,
        now: float,
        *,
        cause: Cause | None = None,
        finished: Finished | None = None,
    ) -> None:
        failure = with_limit(finished.failure, self._memory_limit(attempt)) if finished else None
        if attempt.stopping and ending is Ending.CANCELLED and not attempt.run.cancelling:
            ending = Ending.LOST
        self._close_attempt(attempt, ending, now, cause=cause, failure=failure)
        run = attempt.run
        self._note_pace(attempt, ending, finished)
        if ending is Ending.LOST:
            run.counted -= 1
        run.crashes += ending is Ending.CRASHED
        # What was raised in a task that was asked to stop, its `backoff` has seen.
        raised = ending is Ending.TIMED_OUT and finished is not None and finished.ending == Ending.RAISED
        decision = verdict(
            Ending.RAISED if raised else ending,
            attempts=max(run.counted, 1),
            max_attempts=run.max_attempts,
            on_lost=run.on_lost,
            cancelling=run.cancelling,
            retry_in=finished.retry_in if finished else None,
            lost=0 if attempt.stopping else run.attempt - run.counted,
            crashes=run.crashes,
        )
        error = None if ending is Ending.RETURNED else error_of(ending, cause, failure)
        said = "" if error is None else error["message"]
        self.casualties.ended(run, ending, said, self.moment, now, self.batch)
        if decision.quarantined and error is not None:
            error = quarantine_of(error, run)
            self.casualties.quarantine(run, now)
        run.failure = None if error is None else msgspec.json.encode(error)
        if decision.event in (RunEvent.RETRY, RunEvent.PUT_BACK):
            self._again(run, decision.event, decision.delay, ending, error, now)
            return
        if finished is not None and decision.event is RunEvent.SUCCEED:
            run.result, run.result_blob = (
                (finished.result, None) if finished.blob is None else (None, finished.blob)
            )
        self._end_run(run, decision.event, now, error=error)

    def _again(
        self, run: RunRow, event: RunEvent, delay: float, ending: Ending, error: Any, now: float
    ) -> None:
        run.status = next_run_status(run.status, event)
        run.run_after = now + delay if delay else None
        self._plan.say(
            run, "run.retrying", now, attempt=run.attempt, ending=ending.value, delay=delay, error=error
        )
        self._plan.changed(run)
        if delay:
            self.queues.delay(run, self.moment + delay)
        else:
            self.queues.add(run, now)

    def _end_run(self, run: RunRow, event: RunEvent, now: float, *, error: dict[str, Any] | None) -> None:
        run.status = next_run_status(run.status, event)
        run.finished_at = now
        self.tally.ended[run.status.value] += 1
        if run.status is RunStatus.SUCCESSFUL:
            error = None
        self._plan.end(run, error, now)
        self.inputs.forget(run.no, self.batch)
        self._forget(run)
        self._ending.append(run)
        if len(self._ending) == 1:  # or whoever is at it goes on: a chain of thousands is no recursion
            while self._ending:
                self._tell_relatives(self._ending[0], now)
                self._ending.popleft()

    def _tell_relatives(self, run: RunRow, now: float) -> None:
        """A run has ended: its parent hears of it, those that come after it begin or end, and with a cancelled one its
        children are cancelled."""
        parent = None if run.parent is None else self.find(run.parent)
        if parent is not None:
            self._hear(parent, self.flows.ended(parent, run, now))
        for other in self.flows.waits_for(run.id):
            self._precede(other, run, now)
        if run.status is RunStatus.CANCELLED:
            for child in self.flows.family(run)[1:]:
                if child.no in self.runs and not child.cancelling:
                    self._cancel(child, self._settings.limits.cancel_grace_seconds, now, "parent")

    def _attempt_of(self, run: RunRow) -> OpenAttempt | None:
        return next((attempt for attempt in self.attempts.values() if attempt.run is run), None)

    # --- cancelling and stopping ---------------------------------------------------------------------------

    def followed(self, no: int) -> None:
        """An open run has a subscriber; that nobody follows it any more will mean something."""
        run = self.runs.get(no)
        if run is not None:
            run.followed = True
            self.batch.changed[no] = run

    def cancel(self, run: RunRow, grace: float, now: float, reason: str = "") -> None:
        """Somebody wants the run to stop, or `reason` does, and all its children. A waiting run has ended when this
        returns.

        Raises:
          LifecycleError: it has ended already.
        """
        if run.no not in self.runs:
            raise LifecycleError(f"run {run.id} has ended: {run.status.value}")
        for one in self.flows.family(run):
            if one.no in self.runs:  # it ends with the one that it comes after
                self._cancel(one, grace, now, reason if one is run else "parent")

    def _cancel(self, run: RunRow, grace: float, now: float, reason: str) -> None:
        attempt = self._attempt_of(run)
        if attempt is None:
            self._end_run(run, RunEvent.CANCEL, now, error=error_of(Ending.CANCELLED, None, None))
            return
        if not run.cancelling:
            run.cancelling = True
            why = {"reason": reason} if reason else {}
            self._plan.say(run, "run.cancelling", now, grace=grace, **why)
            self._plan.changed(run)
        runner = self.runners.get(attempt.row.runner)
        if (
            attempt.row.started_at is None
            and runner is not None
            and runner.takes_ahead
            and len(runner.tokens) > 1
        ):
            # Its deadline would end the run in front of it.
            self._order.take_back(runner, [attempt.row.token])
        else:
            self._order.cancel(attempt.row, grace)

    def input(self, run: RunRow, name: str, data: bytes, key: str, now: float) -> tuple[int, bool]:
        """Tell an open run something; return the input's number, and whether it was told that before.

        An attempt that is under way hears it at once, every later one at its beginning.

        Raises:
          IdempotencyConflict, QueueFull: as `Inputs.add` says.
        """
        row, before = self.inputs.add(run.no, name, data, key, now, self.batch)
        attempt = self._attempt_of(run)
        if attempt is not None and not before:
            self._order.hear(attempt.row, [row])
        return row.number, before

    def expired(self, runner: str, token: str, kind: str, now: float) -> None:
        """A deadline has passed for which the supervisor ends nobody; said again until the attempt has ended.

        One that is overdue is asked to stop first. What does not stop in a shared process is abandoned: it ends here,
        whatever it says later is a stray, and its runner leaves when its neighbours are done.
        """
        attempt = self.attempts.get(token)
        if attempt is None:
            self._plan.tell(Disarm(runner=runner, token=token))
        elif kind == "silence" and (left := attempt.silence_left(self.moment)):
            attempt.listened = self.moment
            self._order.listen_on(attempt.row, left)
        elif kind in _TOLD:
            if not (attempt.overdue or attempt.run.cancelling or attempt.stopping):
                self._ask(attempt, _TOLD[kind])
        elif kind == "timeout" and attempt.row.started_at is not None and not attempt.overdue:
            self._ask(attempt, kind)
        else:
            self._abandon(attempt, kind, now)

    def _ask(self, attempt: OpenAttempt, kind: str) -> None:
        """Ask an attempt to stop that has exceeded a limit."""
        cause = Cause(kind=kind, detail=_ASKED[kind])
        attempt.row.cause = msgspec.json.encode(cause)
        self.batch.changed_attempts.append(attempt.row)
        self._ask_again(attempt)

    def _ask_again(self, attempt: OpenAttempt) -> None:
        assert attempt.row.cause is not None
        kind = msgspec.json.decode(attempt.row.cause, type=Cause).kind
        if kind == "stall_timeout":
            self._order.rouse(attempt.row)
        else:
            self._order.ask_to_stop(attempt.row, kind)

    def _abandon(self, attempt: OpenAttempt, kind: str, now: float) -> None:
        runner = self.runners.get(attempt.row.runner)
        if runner is None or runner.exited is not None:
            return  # its end is in the pipe, or follows from the death
        cause = Cause(
            kind=kind, detail=f"{_ABANDONED[kind]}; other runs share its process, so it was abandoned"
        )
        self._order.abandon(runner, attempt.row, kind)
        self._runner_lost_attempt(attempt, cause, now)

    def end_runner(self, id: str, kind: str, detail: str) -> None:
        """End a runner now. Its runs are lost, and put back as their `on_lost` says."""
        self.runners[id].retiring = True
        self._plan.tell(Kill(runner=id, kind=kind, detail=detail))

    def drain_runner(self, id: str) -> None:
        """Have a runner finish what it has and leave; another one takes its place."""
        self._order.send_home(self.runners[id])

    def reset(self, task: str, now: float) -> bool:
        """Let the runs of a held task go; return whether it was held."""
        return self.casualties.reset(task, self.moment, now, self.batch)

    def drain(self) -> None:
        """The tree stops: claim nothing, ask open attempts to stop, send idle runners home."""
        self.draining = True
        for attempt in self.attempts.values():
            attempt.stopping = True
            self._order.ask_to_stop(attempt.row, "stopping")
        for runner in self.runners.values():
            self._order.retire(runner)

    def retire(self, runners: Iterable[str]) -> None:
        """These runners get no further run: they finish what they have, then leave."""
        for id in runners:
            runner = self.runners.get(id)
            if runner is not None:
                self._order.retire(runner)

    def say(self, message: Message) -> None:
        """Tell the supervisor when what was decided before is committed."""
        self._plan.tell(message)

    def told(self, id: str, no: int, version: int) -> None:
        """Django has version `version` of a run."""
        run = self.untold.get(no)
        if run is None or run.id != id:
            return
        run.told = max(run.told, version)
        self.batch.told[no] = run.told
        if run.told >= run.version:
            self.untold.told(no)

    # --- rounds --------------------------------------------------------------------------------------------

    def take(self) -> tuple[Batch, After]:
        """Return what this round has planned, and begin the next plan."""
        return self._plan.take()


def _go_on(run: RunRow, taken: Taken) -> None:
    """Have a new copy of a run count on from where Django knows its former node to have been."""
    run.version = taken.version + 1
    run.attempt, run.counted, run.crashes = taken.attempt, taken.counted, taken.crashes
    run.created_at, run.started_at, run.runner = taken.created_at, taken.started_at, taken.runner
    run.epoch = taken.moves * EPOCHS
