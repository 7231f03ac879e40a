"""The book of open runs: a model that lives through everything, then the corners one by one."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.book import Book
from gateway.flows import after_of
from gateway.output import Line
from gateway.state import After
from gateway.store.rows import (
    SPOKEN,
    AttemptRow,
    Batch,
    BegunRow,
    EventRow,
    InputRow,
    KeyRow,
    Opened,
    QuarantinedRow,
    RunRow,
)
from gateway.submission import Submission
from gateway.throttle import Gate, Limit, gate_of
from taskkit.errors import LifecycleError, UnexpectedMessage
from taskkit.identifiers import new_run_id
from taskkit.lifecycle import QUARANTINE_AFTER, RunStatus
from taskkit.rates import Rate
from taskkit.settings import BreakerSettings, LimitSettings, PoolSettings, Settings
from taskkit.wire.messages import (
    Assigned,
    Cancel,
    Cause,
    Created,
    Deadline,
    Disarm,
    Event,
    Finished,
    Hello,
    Kill,
    Progress,
    Retire,
    Row,
    RunnerMessage,
    RunnerSpec,
    Start,
    Started,
    TaskFailure,
    TaskInfo,
)

CAUSES = (
    *("signal", "exit", "no_result", "oom", "oom_suspected", "cpu_limit", "timeout", "cancelled"),
    *("operator", "corrupt", "descriptors", "boot", "stopped", "lost"),
)
SETTINGS = Settings(
    pools={"default": PoolSettings(runners=3), "shared": PoolSettings(runners=4, concurrency=3, runs=5)},
    limits=LimitSettings(cancel_grace_seconds=3.0, kill_grace_seconds=1.5),
    breaker=BreakerSettings(crashes=2, period=5.0, pause=0.05, longest_pause=0.4, exempt=["spared.*"]),
)
FAILURE = TaskFailure(exception="builtins.ValueError", message="no", traceback="Traceback …")


def submission(**changes: Any) -> Submission:
    """Return a submission of a function, waiting for nothing."""
    name = str(changes.pop("name", "t.f"))
    on_lost = str(changes.pop("on_lost", "retry"))
    task = TaskInfo(name=name, path=f"path.of.{name}", kind="function", on_lost=on_lost)
    values: dict[str, Any] = {
        "id": new_run_id(),
        "task": task,
        "args": b"[1]",
        "kwargs": b'{"a":2}',
        "row": None,
        "pool": "default",
        "priority": 0,
        "run_after": None,
        "timeout": None,
        "max_attempts": 1,
        "metadata": b"{}",
        "tags": (),
        "subject": "ann",
        "origin": "http",
    }
    return Submission(**values | changes)


class ModelStore:
    """What the store would hold, with the promises of every commit checked."""

    def __init__(self) -> None:
        self.runs: dict[int, RunRow] = {}
        self.events: dict[int, list[EventRow]] = {}
        self.attempts: dict[str, AttemptRow] = {}
        self.sources: dict[str, int] = {}
        self.ended: set[int] = set()
        self.breakers: dict[str, bytes] = {}
        self.begun: list[BegunRow] = []
        self.inputs: dict[int, list[InputRow]] = {}
        self.last_pos = 0

    def commit(self, batch: Batch) -> None:
        self._runs(batch)
        self._events(batch)
        for row in batch.attempts:
            assert row.token not in self.attempts
            self.attempts[row.token] = dataclasses.replace(row)
        for token, row in {row.token: row for row in batch.changed_attempts}.items():
            assert self.attempts[token].ending is None, "an attempt ends once"
            self.attempts[token] = dataclasses.replace(row)
        for runner, seq in batch.sources.items():
            assert seq > self.sources.get(runner, 0), "a frame is stored once"
        self.sources |= batch.sources
        for runner in batch.forgotten:
            self.sources.pop(runner, None)
        for task, record in batch.breakers.items():
            self.breakers.pop(task, None)
            if record is not None:
                self.breakers[task] = record
        for no, version in batch.told.items():
            assert version <= self.runs[no].version
            self.runs[no].told = version
        for row in batch.inputs:
            heard = self.inputs.setdefault(row.run, [])
            assert row.number == len(heard) + 1, "inputs have no holes"
            heard.append(row)
        for no in batch.told_enough:
            del self.inputs[no]
        self.begun += batch.begun
        if batch.begun_before is not None:
            self.begun = [row for row in self.begun if row.until > batch.begun_before]

    def _runs(self, batch: Batch) -> None:
        for run in batch.runs:
            assert run.no not in self.runs
            self.runs[run.no] = dataclasses.replace(run)
        if batch.runs or batch.attempts or batch.ends:
            assert batch.full, "an accept, a claim or an end is on the disk before anybody hears of it"
        for no, run in batch.changed.items():
            before = self.runs[no]
            assert no not in self.ended, "an ended run never changes"
            assert run.version >= before.version
            if (run.status, run.attempt, run.cancelling) != (
                before.status,
                before.attempt,
                before.cancelling,
            ):
                assert run.version > before.version or run in batch.runs
            self.runs[no] = dataclasses.replace(run, told=before.told)
        for no, run in batch.spoken.items():
            assert no not in self.ended or no in batch.ends, "an ended run never speaks"
            heard = {name: getattr(run, name) for name in SPOKEN}
            self.runs[no] = dataclasses.replace(self.runs[no], **heard)
        for no in batch.ends:
            assert no not in self.ended, "a run ends once"
            assert no in batch.changed
            self.ended.add(no)

    def _events(self, batch: Batch) -> None:
        for event in batch.events:
            assert event.pos > self.last_pos
            self.last_pos = event.pos
            stream = self.events.setdefault(event.run, [])
            assert event.offset == len(stream) + 1, "offsets have no holes"
            assert not stream or stream[-1].type != "stream.end", "nothing follows stream.end"
            assert b"\n" not in event.data
            stream.append(event)
        for no in {event.run for event in batch.events}:
            assert self.runs[no].tail == len(self.events[no])

    def open(self) -> Opened:
        """Return what a new gateway finds, in objects of its own."""
        runs = {
            no: dataclasses.replace(run)
            for no, run in self.runs.items()
            if not run.status.is_terminal or run.version > run.told
        }
        attempts = [dataclasses.replace(row) for row in self.attempts.values() if row.ending is None]
        next_no = max(self.runs, default=0) + 1
        quarantined = [
            QuarantinedRow(run.id, run.task, run.finished_at or 0.0)
            for run in self.runs.values()
            if run.status is RunStatus.FAILED and run.crashes >= QUARANTINE_AFTER
        ]
        return Opened(
            runs,
            attempts,
            dict(self.sources),
            next_no,
            self.last_pos + 1,
            dict(self.breakers),
            quarantined,
            begun=sorted(self.begun, key=lambda row: row.at),
            inputs=[row for heard in self.inputs.values() for row in heard],
        )


@dataclass
class SimRunner:
    """A runner, its pipe, what it has been told."""

    spec: RunnerSpec
    frames: list[RunnerMessage] = field(default_factory=list)
    consumed: int = 0
    ordered: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    cause: Cause | None = None
    known_dead: bool = False
    retired: bool = False


#: The second one is never held back, the third has limits.
TASKS = ("t.f", "spared.f", "narrow.f")
NARROW = Limit(2, Rate(3, 0.3))


class BookMachine(RuleBasedStateMachine):
    """Runners speak and die, people submit and cancel, gateways are killed at every point of a round."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.store = ModelStore()
        self.runners: dict[str, SimRunner] = {}
        self.made = 0
        self.began: dict[str, float] = {}  # when user code began, by token
        self.book = Book(SETTINGS, self.store.open(), [], self.now, self.now)
        self.book.throttled({"narrow.f": NARROW})

    # --- a round, as the engine makes it, and its three ways to be cut short

    def _look(self, share: int) -> dict[str, int]:
        taken: dict[str, int] = {}
        for id, sim in sorted(self.runners.items()):
            state = self.book.runners[id]
            if sim.known_dead:
                self.book.runner_exited(id, sim.cause or Cause(kind="exit"))
            frames = sim.frames[sim.consumed : sim.consumed + share]
            if state.corrupt:
                frames = []
            for number, message in enumerate(frames, sim.consumed + 1):
                try:
                    self.book.frame(state, number, message, self.now)
                except UnexpectedMessage as error:
                    self.book.runner_corrupt(id, error)
                    break
            taken[id] = len(frames)
            if sim.known_dead and not frames:
                self.book.runner_drained(id, self.now)
        return taken

    def _round(self, share: int, ends: str) -> None:
        self.now += 0.01
        self.book.moment = self.now
        taken = self._look(share)
        held = {task for task in TASKS if self.book.casualties._breaker.holds(task)}
        trials = self.book.casualties.trials(self.now)
        self.book.claim(self.now)
        batch, after = self.book.take()
        self._check_claims(batch, held, trials)
        if ends == "before the commit":
            self._restart()
            return
        self.store.commit(batch)
        if ends == "before the pipes are consumed":
            self._restart()
            return
        for id, number in taken.items():
            self.runners[id].consumed += number
        if ends == "before the orders are sent":
            self._restart()
            return
        self._act(after)

    def _check_claims(self, batch: Batch, held: set[str], trials: frozenset[str]) -> None:
        """Of a held task nothing begins but one run on trial; a suspect is alone in its process."""
        begun = [self.book.attempts[row.token] for row in batch.attempts if row.token in self.book.attempts]
        for task in held:
            tried = [attempt for attempt in begun if attempt.run.task == task]
            assert len(tried) <= (1 if task in trials else 0)
        for attempt in self.book.attempts.values():
            if attempt.run.suspect:
                runner = self.book.runners[attempt.row.runner]
                assert runner.tokens == {attempt.row.token}, "a suspect shares its process"
                assert runner.retiring, "and would"

    def _act(self, after: After) -> None:
        for message in after.control:
            if isinstance(message, Assigned) and message.last:
                self.runners[message.runner].retired = True
        for id, order in after.orders:
            if isinstance(order, Start):
                row = self.store.attempts[order.token]
                due = self.store.runs[row.run].run_after
                assert due is None or due <= self.now or row.ending is not None, (
                    "it is given out before its time"
                )
                assert row.runner == id
                before = after_of(self.store.runs[row.run])
                statuses = {run.status for run in self.store.runs.values() if run.id in before}
                assert statuses <= {RunStatus.SUCCESSFUL}, (
                    "it begins when all have succeeded that it comes after"
                )
                assert len(json.loads(order.after)) == len(before), "and hears of all of them"
                sim = self.runners[id]
                # A repeated order may come after the end of its attempt: the runner knows the token.
                known = order.token in sim.seen
                assert row.ending is None or known or sim.cause is not None, (
                    "no ghost: it is claimed, or nobody hears it"
                )
                if order.token not in sim.seen and sim.cause is None:
                    sim.seen.add(order.token)
                    sim.ordered.append(order.token)
        for id in after.drained:
            del self.runners[id]

    def _restart(self) -> None:
        self.book = Book(SETTINGS, self.store.open(), list(self.runners), self.now, self.now)
        self.book.throttled({"narrow.f": NARROW})
        for id, sim in self.runners.items():
            self.book.runner_up(sim.spec, 1, self.now, adopted=True)
            if sim.retired:  # the supervisor knows
                self.book.retire([id])
            if sim.known_dead:
                self.book.runner_exited(id, sim.cause or Cause(kind="exit"))

    # --- what happens

    @initialize()
    def begin(self) -> None:
        self.spawn("default", 1)

    @rule(
        share=st.integers(1, 8),
        ends=st.sampled_from(
            (
                *("whole", "whole", "whole", "whole"),
                "before the commit",
                "before the pipes are consumed",
                "before the orders are sent",
            )
        ),
    )
    def round(self, share: int, ends: str) -> None:
        self._round(share, ends)

    @rule(
        name=st.sampled_from(TASKS),
        pool=st.sampled_from(("default", "shared")),
        priority=st.integers(-1, 1),
        max_attempts=st.integers(1, 5),
        on_lost=st.sampled_from(("retry", "fail")),
        later=st.sampled_from((None, None, -1.0, 0.03)),
        row=st.sampled_from((None, None, 1, 2)),
        key=st.sampled_from(("", "a", "b")),
        parent=st.none() | st.integers(0, 99),
        after=st.lists(st.integers(0, 99), max_size=2),
    )
    def accept(
        self,
        name: str,
        pool: str,
        priority: int,
        max_attempts: int,
        on_lost: str,
        later: float | None,
        row: int | None,
        key: str,
        parent: int | None,
        after: list[int],
    ) -> None:
        address = None if row is None else Row(app="a", model="M", pk=row)
        if address is not None and self.book.find_row(address.key) is not None:
            return  # the engine returns the open run of that row
        made = submission(
            name=name,
            pool=pool,
            priority=priority,
            max_attempts=max_attempts,
            on_lost=on_lost,
            run_after=None if later is None else self.now + later,
            row=address,
            timeout=5.0 if priority else None,
            concurrency_key=key,
            parent=None if parent is None else self._relative(parent),
            after=tuple(dict.fromkeys(id for pick in after if (id := self._relative(pick)) is not None)),
        )
        named = {run.id: run for run in self.store.runs.values() if run.id in (made.parent, *made.after)}
        made.relatives = {id: run for id, run in named.items() if self.book.find(id) is None}
        run = self.book.accept(made, self.now)
        if not made.relatives and made.parent is None:  # or it has ended at once
            assert self.book.find(run.id) is run
        self._round(2, "whole")

    def _relative(self, pick: int) -> str | None:
        """Return the id of one of the newest runs."""
        known = sorted(self.store.runs)[-6:]
        return self.store.runs[known[pick % len(known)]].id if known else None

    @precondition(lambda self: len(self.runners) < 5)
    @rule(pool=st.sampled_from(("default", "shared")), runs=st.integers(1, 4))
    def spawn(self, pool: str, runs: int) -> None:
        self.made += 1
        id = f"r{self.made}"
        spec = RunnerSpec(id=id, pool=pool, runs=runs, concurrency=3 if pool == "shared" else 1)
        self.runners[id] = SimRunner(spec, [Hello(runner=id, pid=self.made)])
        self.book.runner_up(spec, self.made, self.now, adopted=False)

    def _living(self) -> list[SimRunner]:
        return [sim for _, sim in sorted(self.runners.items()) if sim.cause is None]

    @precondition(lambda self: any(sim.ordered for sim in self._living()))
    @rule(pick=st.integers(0, 99))
    def runner_starts(self, pick: int) -> None:
        choices = [sim for sim in self._living() if sim.ordered]
        sim = choices[pick % len(choices)]
        token = sim.ordered.pop(0)
        sim.started.append(token)
        self.began[token] = self.now
        sim.frames.append(Started(token=token))

    @precondition(lambda self: any(sim.started for sim in self._living()))
    @rule(
        pick=st.integers(0, 99),
        what=st.sampled_from(("event", "progress", "finished", "finished", "finished")),
        ending=st.sampled_from(("returned", "raised", "cancelled", "of some later version")),
        retry_in=st.sampled_from((None, 0.0, 0.02)),
    )
    def runner_speaks(self, pick: int, what: str, ending: str, retry_in: float | None) -> None:
        choices = [(sim, token) for sim in self._living() for token in sim.started]
        sim, token = choices[pick % len(choices)]
        if what == "event":
            sim.frames.append(Event(token=token, type="tick", data=b'{"n":1}'))
        elif what == "progress":
            sim.frames.append(Progress(token=token, data=b'{"done":1}'))
        else:
            sim.started.remove(token)
            failure = None if ending == "returned" else FAILURE
            sim.frames.append(Finished(token=token, ending=ending, failure=failure, retry_in=retry_in))

    @precondition(lambda self: bool(self._living()))
    @rule(
        pick=st.integers(0, 99),
        message=st.sampled_from(
            (
                Event(token="nobody's", type="tick", data=b"{}"),
                Started(token="nobody's"),
                Finished(token="nobody's", ending="returned"),
                Hello(runner="again", pid=1),
            )
        ),
    )
    def runner_talks_nonsense(self, pick: int, message: RunnerMessage) -> None:
        living = self._living()
        living[pick % len(living)].frames.append(message)

    @precondition(lambda self: bool(self._living()))
    @rule(pick=st.integers(0, 99), kind=st.sampled_from(CAUSES), told=st.booleans())
    def runner_dies(self, pick: int, kind: str, told: bool) -> None:
        living = self._living()
        sim = living[pick % len(living)]
        sim.cause = Cause(kind=kind, detail="it died")
        sim.known_dead = told

    @precondition(lambda self: len(self.runners) < 5)
    @rule(
        pool=st.sampled_from(("default", "shared", "shared")),
        name=st.sampled_from(TASKS),
        new=st.integers(0, 3),
        runs=st.integers(1, 4),
        kind=st.sampled_from(("signal", "oom", "exit", "signal", "operator")),
        returned=st.sampled_from((0, 0, 0, 1, 2)),
        ends=st.sampled_from(("whole", "whole", "before the commit", "before the orders are sent")),
    )
    def a_process_dies_at_work(
        self, pool: str, name: str, new: int, runs: int, kind: str, returned: int, ends: str
    ) -> None:
        """A fresh runner starts whatever it is given, ends some of it, and dies of the rest."""
        for _ in range(new):
            self.book.accept(submission(name=name, pool=pool, max_attempts=5), self.now)
        self.spawn(pool, runs)
        sim = self.runners[f"r{self.made}"]
        for _ in range(2):
            self._round(8, "whole")
        for token in sim.ordered:
            self.began[token] = self.now
            sim.frames.append(Started(token=token))
            if returned:
                returned -= 1
                sim.frames.append(Finished(token=token, ending="returned"))
        sim.ordered.clear()
        sim.cause, sim.known_dead = Cause(kind=kind, detail="it died at work"), True
        self._round(100, ends)
        self._round(100, "whole")

    @precondition(lambda self: bool(self.book.attempts))
    @rule(pick=st.integers(0, 99), kind=st.sampled_from(("timeout", "timeout", "cancelled")))
    def deadline_passes_in_a_shared_process(self, pick: int, kind: str) -> None:
        shared = [attempt for attempt in self.book.attempts.values() if attempt.run.pool == "shared"]
        self.book.expired("r1", "nobody's", kind, self.now)
        if shared:
            attempt = shared[pick % len(shared)]
            self.book.expired(attempt.row.runner, attempt.row.token, kind, self.now)

    @rule(name=st.sampled_from(TASKS))
    def somebody_resets_a_task(self, name: str) -> None:
        self.book.reset(name, self.now)
        assert not self.book.casualties._breaker.holds(name)

    @rule(seconds=st.sampled_from((0.05, 0.4, 20.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: bool(self._living()))
    @rule(pick=st.integers(0, 99), now=st.booleans())
    def somebody_ends_a_runner(self, pick: int, now: bool) -> None:
        living = self._living()
        id = living[pick % len(living)].spec.id
        if now:
            self.book.end_runner(id, "operator", "")
        else:
            self.book.drain_runner(id)

    @precondition(lambda self: any(sim.cause and not sim.known_dead for sim in self.runners.values()))
    @rule()
    def supervisor_tells_of_deaths(self) -> None:
        for sim in self.runners.values():
            sim.known_dead = sim.cause is not None

    @precondition(lambda self: bool(self.book.runs))
    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        runs = sorted(self.book.runs)
        run = self.book.runs[runs[pick % len(runs)]]
        open_attempt = any(attempt.run is run for attempt in self.book.attempts.values())
        self.book.cancel(run, 1.0, self.now)
        assert run.cancelling if open_attempt else run.status is RunStatus.CANCELLED
        self._round(2, "whole")

    @precondition(lambda self: bool(self.book.untold))
    @rule(pick=st.integers(0, 99), back=st.integers(0, 1))
    def django_is_told(self, pick: int, back: int) -> None:
        numbers = sorted(self.book.untold)
        run = self.book.untold[numbers[pick % len(numbers)]]
        # What is told was committed before.
        version = self.store.runs[run.no].version - back
        self.book.told(run.id, run.no, version)
        self.book.told("of another run", run.no, 10**9)
        self._round(1, "whole")

    @precondition(lambda self: not self.book.draining)
    @rule(dice=st.integers(1, 6))
    def drain(self, dice: int) -> None:
        if dice < 6:  # nothing begins any more after it: not in every example
            return
        self.book.drain()
        self._round(1, "whole")

    @rule()
    def gateway_restarts(self) -> None:
        self._restart()

    @rule()
    def tree_restarts(self) -> None:
        self.runners.clear()
        self._restart()
        self._round(1, "whole")
        assert not self.book.attempts

    # --- what always holds

    @invariant()
    def every_waiting_run_is_queued_or_assigned(self) -> None:
        assigned = [attempt.run.no for attempt in self.book.attempts.values()]
        assert len(assigned) == len(set(assigned)), "an attempt of a run is open on two runners"
        for no, run in self.book.runs.items():
            assert not run.status.is_terminal
            if run.status is RunStatus.READY:
                assert (no in self.book.queues._waiting) + (no in assigned) + self.book.flows.holds(no) == 1
            else:
                assert no in assigned
                assert no not in self.book.queues._waiting
        assert self.book.queues._waiting.keys() <= self.book.runs.keys()

    @invariant()
    def runners_and_attempts_agree(self) -> None:
        for token, attempt in self.book.attempts.items():
            runner = self.book.runners.get(attempt.row.runner)
            assert runner is not None
            assert token in runner.tokens
        for runner in self.book.runners.values():
            assert runner.tokens <= self.book.attempts.keys()
            assert len(runner.tokens) <= runner.spec.concurrency

    @invariant()
    def a_trial_is_under_way_or_over(self) -> None:
        assigned = {attempt.run.no for attempt in self.book.attempts.values()}
        for tripped in self.book.casualties._breaker.all_tripped(self.now):
            assert tripped.trial is None or tripped.trial in assigned, "a task would be held for ever"

    @invariant()
    def the_store_keeps_the_promises(self) -> None:
        for no, run in self.store.runs.items():
            attempts = [row for row in self.store.attempts.values() if row.run == no]
            counted = sum(row.started_at is not None and row.ending != "lost" for row in attempts)
            assert run.counted == counted <= run.max_attempts, "a run put back is not counted"
            crashes = sum(row.ending == "crashed" for row in attempts)
            assert run.crashes == crashes <= QUARANTINE_AFTER
            if crashes == QUARANTINE_AFTER and not run.cancelling:
                assert run.status is RunStatus.FAILED
                assert json.loads(run.error or b"{}")["code"] == "quarantined"
            started = [row.number for row in attempts if row.started_at is not None]
            assert sorted(started) == list(range(1, len(started) + 1))
            assert sum(row.ending is None for row in attempts) <= (0 if run.status.is_terminal else 1)
            ends = [event for event in self.store.events.get(no, []) if event.type == "stream.end"]
            assert len(ends) == (1 if run.status.is_terminal else 0)
            assert run.status.is_terminal == (no in self.store.ended)
            assert (run.finished_at is not None) == run.status.is_terminal

    @invariant()
    def parents_are_told_once(self) -> None:
        for no, run in self.store.runs.items():
            told = [
                (event.type, json.loads(event.data)["child"])
                for event in self.store.events.get(no, [])
                if event.type.startswith("run.child.")
            ]
            born = [child for type, child in told if type == "run.child.submitted"]
            ended = [child for type, child in told if type == "run.child.ended"]
            assert len(born) == len(set(born)) == run.children
            assert len(ended) == len(set(ended)) == run.children_ended
            assert set(ended) <= set(born)
            if not run.status.is_terminal:
                over = {
                    one.id
                    for one in self.store.runs.values()
                    if one.parent == run.id and one.status.is_terminal
                }
                assert over == set(ended), "what an open run hears is of the same transaction as the end"
                heard = {row.name.removeprefix("ended/") for row in self.store.inputs.get(no, [])}
                assert over <= heard

    @invariant()
    def who_comes_after_a_failure_has_ended(self) -> None:
        by_id = {run.id: run for run in self.store.runs.values()}
        for run in self.store.runs.values():
            bad = [id for id in after_of(run) if by_id[id].status in (RunStatus.FAILED, RunStatus.CANCELLED)]
            assert not bad or run.status in (RunStatus.FAILED, RunStatus.CANCELLED)
        for run in self.store.runs.values():
            above = None if run.parent is None else by_id[run.parent]
            if above is not None and above.status is RunStatus.CANCELLED:
                assert run.cancelling or run.status.is_terminal, "it is cancelled with its parent"

    @invariant()
    def limits_hold_per_key(self) -> None:
        open = Counter(gate_of(attempt.run) for attempt in self.book.attempts.values())
        assert all(count <= 2 for (task, _), count in open.items() if task == "narrow.f")
        begun: dict[Gate, list[float]] = {}
        for token, at in self.began.items():
            row = self.store.attempts[token]
            run = self.store.runs[row.run]
            if row.started_at is not None and run.task == "narrow.f":
                begun.setdefault(gate_of(run), []).append(at)
        for times in begun.values():
            times.sort()
            assert all(last - first >= 0.3 - 1e-9 for first, last in zip(times, times[3:], strict=False))

    def teardown(self) -> None:
        """Whatever has happened, everything ends: runners perform what they are given until nothing waits."""
        self.now += 1e6
        for sim in self.runners.values():
            sim.cause = sim.cause or Cause(kind="stopped")
            sim.known_dead = True
        self._settle()
        self._restart()  # not draining any more
        for _ in range(200):
            if not self.book.runs:
                break
            self._perform_one_of_each()
        assert not self.book.runs, "a run is stuck"
        self.the_store_keeps_the_promises()
        assert all(run.status.is_terminal for run in self.store.runs.values())

    def _settle(self) -> None:
        for _ in range(100):
            if not self.runners:
                return
            self._round(100, "whole")
        raise AssertionError("a dead runner is never drained")

    def _perform_one_of_each(self) -> None:
        self.now += 100.0
        for pool in ("default", "shared"):
            self.spawn(pool, 1)
        self._round(100, "whole")
        for sim in self.runners.values():
            for token in sim.ordered:
                sim.frames += [Started(token=token), Finished(token=token, ending="returned")]
            sim.ordered.clear()
            sim.cause, sim.known_dead = Cause(kind="exit", exit_code=0), True
        self._settle()


TestBookMachine = BookMachine.TestCase
TestBookMachine.settings = hypothesis_settings(max_examples=120, stateful_step_count=50)


# --- the corners, one by one


class Desk:
    """A book with one default runner that has said hello, and shortcuts."""

    def __init__(self, opened: Opened | None = None, **spec: Any) -> None:
        self.book = Book(SETTINGS, opened or Opened({}, [], {}, 1, 1), [], 0.0)
        self.spec = RunnerSpec(**{"id": "r1"} | spec)
        self.runner = self.book.runner_up(self.spec, 77, 1.0, adopted=False)
        self.seq = 0
        self.say(Hello(runner="r1", pid=77))
        self.batch, self.after = self.book.take()

    def say(self, *messages: RunnerMessage, at: float = 5.0) -> None:
        for message in messages:
            self.seq += 1
            self.book.frame(self.runner, self.seq, message, at)

    def start(self, at: float = 5.0, **changes: Any) -> tuple[RunRow, str]:
        """Return a running run and its token; what was planned for it has been taken."""
        run = self.book.accept(submission(**changes), at)
        self.book.claim(at)
        (token,) = [token for token, attempt in self.book.attempts.items() if attempt.run is run]
        self.say(Started(token=token), at=at)
        self.batch, self.after = self.book.take()
        return run, token

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Return name and data of what this round has appended."""
        return [(event.type, json.loads(event.data)) for event in self.book.batch.events]


def test_a_runner_gets_no_run_before_its_hello() -> None:
    book = Book(SETTINGS, Opened({}, [], {}, 1, 1), [], 0.0)
    runner = book.runner_up(RunnerSpec(id="r1"), 1, 0.0, adopted=False)
    book.accept(submission(), 0.0)
    book.claim(0.0)
    assert not book.attempts
    book.frame(runner, 1, Hello(runner="r1", pid=1), 0.0)
    book.claim(0.0)
    assert len(book.attempts) == 1


def test_a_start_carries_everything_and_its_deadline_goes_first() -> None:
    desk = Desk()
    row = Row(app="a", model="M", pk=3)
    run = desk.book.accept(submission(row=row, timeout=9.0, max_attempts=2, metadata=b'{"m":1}'), 5.0)
    desk.book.memory_limits = {"t.f": 1234}
    desk.book.claim(5.0)
    batch, after = desk.book.take()
    ((runner, start),) = after.orders
    assert runner == "r1"
    assert start == Start(
        run=run.id,
        attempt=1,
        token=batch.attempts[0].token,
        task="t.f",
        args=b"[1]",
        kwargs=b'{"a":2}',
        row=row,
        max_attempts=2,
        metadata=b'{"m":1}',
        memory_limit=1234,
    )
    token = batch.attempts[0].token
    assert Deadline(runner="r1", token=token, kind="timeout", after=19.0, grace=1.5) in after.control
    assert Assigned(runner="r1", last=True) in after.control
    assert batch.full


def test_a_returned_attempt_ends_the_run_with_its_result() -> None:
    desk = Desk(runs=3)
    run, token = desk.start(timeout=9.0)
    desk.say(Finished(token=token, ending="returned", result=b'{"x":1}'), at=6.0)
    assert run.status is RunStatus.SUCCESSFUL
    ((name, data),) = desk.events()
    assert name == "stream.end"
    assert data["status"] == "SUCCESSFUL"
    assert data["result"] == {"x": 1}
    assert (data["_run"], data["_attempt"], data["_timestamp"]) == (run.id, 1, "1970-01-01T00:00:06Z")
    assert desk.book.after.ended == [run.no]
    assert Disarm(runner="r1", token=token) in desk.book.after.control
    _, other = desk.start()
    desk.say(Finished(token=other, ending="returned"), at=7.0)
    assert not any(isinstance(told, Disarm) and told.token == other for told in desk.book.after.control)
    assert desk.runner.last_ending == "returned"
    assert desk.runner.runs_done == 2
    assert desk.book.find(run.id) is None


def test_a_result_in_a_blob_is_named_and_not_repeated() -> None:
    desk = Desk()
    run, token = desk.start()
    desk.say(Finished(token=token, ending="returned", blob="b-1", size=9, sha256="…"))
    assert (run.result, run.result_blob) == (None, "b-1")
    assert "result" not in desk.events()[-1][1]


@pytest.mark.parametrize("kind", CAUSES)
@pytest.mark.parametrize("on_lost", ["retry", "fail"])
def test_every_cause_of_death_after_started(kind: str, on_lost: str) -> None:
    desk = Desk()
    run, _ = desk.start(on_lost=on_lost)
    desk.book.runner_exited("r1", Cause(kind=kind, detail="it died"))
    desk.book.runner_drained("r1", 6.0)
    if kind in ("operator", "stopped", "boot", "lost"):
        expected = RunStatus.READY if on_lost == "retry" else RunStatus.FAILED
        assert run.counted == 0
    else:
        expected = RunStatus.CANCELLED if kind == "cancelled" else RunStatus.FAILED
        assert run.counted == 1
    assert run.status is expected
    name, data = desk.events()[-1]
    assert name == ("run.retrying" if expected is RunStatus.READY else "stream.end")
    assert data["error"]["cause"]["kind"] == kind
    assert desk.book.after.drained == ["r1"]
    assert desk.book.batch.forgotten == ["r1"]


@pytest.mark.parametrize("kind", CAUSES)
def test_a_death_before_started_is_no_attempt(kind: str) -> None:
    desk = Desk()
    run = desk.book.accept(submission(on_lost="fail"), 5.0)
    desk.book.claim(5.0)
    desk.book.take()
    desk.book.runner_exited("r1", Cause(kind=kind))
    desk.book.runner_drained("r1", 6.0)
    assert (run.status, run.attempt, run.counted) == (RunStatus.READY, 0, 0)
    assert desk.events() == []
    assert desk.book.queues.take("default", 6.0) is run


def test_a_death_before_started_ends_a_run_that_is_being_cancelled() -> None:
    desk = Desk()
    run = desk.book.accept(submission(), 5.0)
    desk.book.claim(5.0)
    desk.book.cancel(run, 1.0, 5.0)
    desk.book.runner_exited("r1", Cause(kind="cancelled"))
    desk.book.runner_drained("r1", 6.0)
    assert run.status is RunStatus.CANCELLED
    assert [name for name, _ in desk.events()] == ["run.cancelling", "stream.end"]


def test_an_attempt_whose_finish_is_in_the_pipe_ended_by_it_and_not_by_the_death() -> None:
    desk = Desk()
    run, token = desk.start()
    desk.book.runner_exited("r1", Cause(kind="signal", signal="SIGKILL"))
    desk.say(Finished(token=token, ending="returned"))
    desk.book.runner_drained("r1", 6.0)
    assert run.status is RunStatus.SUCCESSFUL


def test_a_retry_waits_as_long_as_the_backoff_said() -> None:
    desk = Desk(runs=9)
    run, token = desk.start(max_attempts=2)
    began = desk.book.moment
    desk.say(Finished(token=token, ending="raised", failure=FAILURE, retry_in=7.0), at=10.0)
    assert (run.status, run.run_after, run.counted) == (RunStatus.READY, 17.0, 1)
    name, data = desk.events()[-1]
    assert name == "run.retrying"
    assert (data["attempt"], data["ending"], data["delay"]) == (1, "raised", 7.0)
    assert data["error"]["exception"] == "builtins.ValueError"
    desk.book.moment = began + 6.9
    desk.book.claim(3_610.0)  # somebody has set the clock forward: it is not time yet
    assert not desk.book.attempts
    desk.book.moment = began + 7.0
    desk.book.claim(-3_590.0)  # or back: it is time all the same
    assert len(desk.book.attempts) == 1


def test_the_last_attempt_is_not_retried_whatever_the_runner_asks_for() -> None:
    desk = Desk()
    run, token = desk.start(max_attempts=1)
    desk.say(Finished(token=token, ending="raised", failure=FAILURE, retry_in=0.0))
    assert run.status is RunStatus.FAILED


def test_a_backoff_that_is_no_number_does_not_lose_the_run() -> None:
    desk = Desk(runs=9)
    run, token = desk.start(max_attempts=2)
    desk.say(Finished(token=token, ending="raised", failure=FAILURE, retry_in=float("nan")))
    desk.book.claim(99.0)
    assert [attempt.run for attempt in desk.book.attempts.values()] == [run]


def test_the_seeds_clients_hear_of_a_rows_exception() -> None:
    desk = Desk()
    _, token = desk.start(row=Row(app="a", model="M", pk=1))
    desk.say(Finished(token=token, ending="raised", failure=FAILURE))
    names = [name for name, _ in desk.events()]
    assert names == ["error", "task_error", "stream.end"]
    data = desk.events()[0][1]
    assert (data["message"], data["error_type"]) == ("no", "ValueError")
    assert (data["_app"], data["_model"], data["_task_id"]) == ("a", "M", 1)


def test_cancelling_twice_is_said_once_but_ordered_twice() -> None:
    desk = Desk()
    run, token = desk.start()
    desk.book.cancel(run, 2.0, 6.0)
    desk.book.cancel(run, 0.5, 6.1)
    assert [name for name, _ in desk.events()] == ["run.cancelling"]
    assert desk.book.after.orders == [("r1", Cancel(token=token, reason="cancelled"))] * 2
    graces = [message.after for message in desk.book.after.control if isinstance(message, Deadline)]
    assert graces == [2.0, 0.5]
    desk.say(Finished(token=token, ending="cancelled"))
    assert run.status is RunStatus.CANCELLED
    with pytest.raises(LifecycleError, match="has ended"):
        desk.book.cancel(run, 1.0, 7.0)


def test_a_run_that_returns_in_spite_of_a_cancellation_is_successful() -> None:
    desk = Desk()
    run, token = desk.start()
    desk.book.cancel(run, 2.0, 6.0)
    desk.say(Finished(token=token, ending="returned"))
    assert run.status is RunStatus.SUCCESSFUL


def test_draining_puts_open_runs_back_and_sends_runners_home() -> None:
    desk = Desk()
    run, token = desk.start()
    waiting = desk.book.accept(submission(), 6.0)
    desk.book.drain()
    desk.book.claim(6.0)
    assert (token, "stopping") in [
        (order.token, order.reason) for _, order in desk.book.after.orders if isinstance(order, Cancel)
    ]
    assert ("r1", Retire()) in desk.book.after.orders
    desk.say(Finished(token=token, ending="cancelled"))
    assert (run.status, run.counted, waiting.status) == (RunStatus.READY, 0, RunStatus.READY)
    late = desk.book.runner_up(RunnerSpec(id="r2"), 2, 7.0, adopted=False)
    assert late.retiring
    assert ("r2", Retire()) in desk.book.after.orders


def test_frames_of_an_ended_attempt_are_fenced() -> None:
    desk = Desk(runs=5)
    run, token = desk.start()
    desk.say(Finished(token=token, ending="returned"))
    tail = run.tail
    desk.say(Event(token=token, type="late", data=b"{}"), Finished(token=token, ending="raised"))
    assert (run.tail, run.status) == (tail, RunStatus.SUCCESSFUL)
    assert desk.runner.session.strays == 2
    assert desk.book.batch.sources == {"r1": desk.seq}


def test_output_belongs_to_open_attempts_only() -> None:
    desk = Desk()
    run, token = desk.start()
    desk.book.output(token, [Line("stdout", "one"), Line("logging", "two", "INFO", "x")], 6.0)
    desk.book.output("nobody", [Line("stdout", "lost")], 6.0)
    assert [(row.offset, row.after, row.text) for row in desk.book.batch.outputs] == [
        (1, run.tail, "one"),
        (2, run.tail, "two"),
    ]
    assert run.lines == 2


def test_the_newest_progress_is_kept_with_the_run() -> None:
    desk = Desk()
    run, token = desk.start()
    desk.say(Progress(token=token, data=b'{"done":1}'), Progress(token=token, data=b'{"done":2}'))
    assert run.progress == b'{"done":2}'
    assert [name for name, _ in desk.events()] == ["run.progress"] * 2


def test_a_corrupt_runner_is_killed_and_its_cause_says_so() -> None:
    desk = Desk(runs=9)
    run, token = desk.start()
    desk.book.runner_corrupt("r1", UnexpectedMessage("a second Hello"))
    (kill,) = [message for message in desk.book.after.control if isinstance(message, Kill)]
    assert (kill.runner, kill.kind) == ("r1", "corrupt")
    with pytest.raises(UnexpectedMessage):
        desk.say(Finished(token=token, ending="returned"))
    desk.book.runner_exited("r1", Cause(kind="exit", exit_code=3))
    desk.book.runner_drained("r1", 6.0)
    cause = desk.events()[-1][1]["error"]["cause"]
    assert (cause["kind"], cause["exit_code"]) == ("corrupt", 3)
    assert "a second Hello" in cause["detail"]
    assert run.status is RunStatus.FAILED


def test_keys_are_found_at_once_and_the_memory_of_them_is_bounded() -> None:
    book = Book(SETTINGS, Opened({}, [], {}, 1, 1), [], 0.0)
    run = book.accept(submission(key="k", digest=b"d"), 3.0)
    assert book.find_key("ann", "k") == KeyRow("ann", "k", b"d", run.id, 3.0)
    assert book.find_key("bob", "k") is None
    for number in range(10_000):
        book._use_key(KeyRow("ann", f"k{number}", b"", run.id, 3.0))
    assert len(book._keys) == 10_000
    assert book.find_key("ann", "k") is None


def test_what_intake_answers_is_passed_on() -> None:
    desk = Desk(role="intake", runs=9)
    answer = Created(ask="a1", errors={"message": "too long"})
    desk.say(answer)
    assert desk.book.after.created == [answer]
    assert desk.runner.runs_done == 1


def test_an_exit_of_a_runner_that_nobody_knows_is_ignored() -> None:
    Desk().book.runner_exited("nobody", Cause(kind="exit"))


def test_a_new_gateway_repeats_what_the_old_one_may_not_have_sent() -> None:
    run = RunRow(no=1, id="run-1", task="t.f", timeout=4.0, cancelling=True)
    row = AttemptRow(run=1, number=1, runner="r1", pid=7, token="tok", assigned_at=1.0)
    book = Book(SETTINGS, Opened({1: run}, [row], {"r1": 1, "gone": 9}, 2, 1), ["r1"], 5.0)
    assert book.batch.forgotten == ["gone"]
    runner = book.runner_up(RunnerSpec(id="r1"), 7, 1.0, adopted=True)
    orders = [order for _, order in book.after.orders]
    assert [type(order) for order in orders] == [Start, Cancel]
    assert {message.kind for message in book.after.control if isinstance(message, Deadline)} == {
        "timeout",
        "cancelled",
    }
    assert runner.retiring


def test_a_started_attempt_is_not_ordered_again() -> None:
    run = RunRow(no=1, id="run-1", task="t.f", status=RunStatus.RUNNING, attempt=1, counted=1)
    row = AttemptRow(run=1, number=1, runner="r1", pid=7, token="tok", assigned_at=1.0, started_at=2.0)
    book = Book(SETTINGS, Opened({1: run}, [row], {"r1": 2}, 2, 1), ["r1"], 5.0)
    runner = book.runner_up(RunnerSpec(id="r1"), 7, 1.0, adopted=True)
    assert book.after.orders == []
    book.frame(runner, 2, Started(token="tok"), 5.0)  # the same frame again
    book.frame(runner, 3, Event(token="tok", type="tick", data=b"{}"), 5.0)
    assert [event.type for event in book.batch.events] == ["tick"]
    assert runner.session.duplicates == 1


def test_a_started_attempt_keeps_its_limit_over_a_takeover() -> None:
    """The gateway before may have died with `Started` stored and the exact limit not yet said."""
    run = RunRow(no=1, id="run-1", task="t.f", status=RunStatus.RUNNING, attempt=1, counted=1, timeout=4.0)
    row = AttemptRow(run=1, number=1, runner="r1", pid=7, token="tok", assigned_at=1.0, started_at=2.0)
    book = Book(SETTINGS, Opened({1: run}, [row], {"r1": 2}, 2, 1), ["r1"], 5.0)
    book.runner_up(RunnerSpec(id="r1"), 7, 1.0, adopted=True)
    (limit,) = [message for message in book.after.control if isinstance(message, Deadline)]
    assert (limit.kind, limit.after, limit.at_most) == ("timeout", 4.0, True)


def test_attempts_of_a_tree_that_died_are_lost() -> None:
    run = RunRow(no=1, id="run-1", task="t.f", status=RunStatus.RUNNING, attempt=1, counted=1, tail=4)
    row = AttemptRow(run=1, number=1, runner="r1", pid=7, token="tok", assigned_at=1.0, started_at=2.0)
    book = Book(SETTINGS, Opened({1: run}, [row], {"r1": 2}, 2, 9), [], 5.0)
    assert (run.status, run.counted) == (RunStatus.READY, 0)
    assert book.queues.take("default", 5.0) is run
    assert [(event.pos, event.offset, event.type) for event in book.batch.events] == [(9, 5, "run.retrying")]


def test_an_ended_run_that_django_does_not_know_is_told_and_not_opened() -> None:
    run = RunRow(no=1, id="run-1", task="t.f", status=RunStatus.FAILED, version=5, told=3)
    book = Book(SETTINGS, Opened({1: run}, [], {}, 2, 1), [], 5.0)
    assert list(book.untold) == [1]
    assert book.runs == {}
    book.told("run-1", 1, 4)
    assert list(book.untold) == [1]
    book.told("run-1", 1, 5)
    assert not book.untold
    assert book.batch.told == {1: 5}
