"""The judge: compares what was promised with what clients saw and the store has. Pure.

In the manner of Jepsen's total-queue: every submission is attempted; some are acknowledged; each acknowledged one has
to come out exactly once, and what came out must have been put in. Source: jepsen-io/jepsen, checker.clj.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.chaos.history import Content, History, Seen, StoredAttempt, StoredRun, Submission, Watch

TERMINAL: Final = frozenset({"SUCCESSFUL", "FAILED", "CANCELLED"})

#: Endings that the harness can cause from outside, by killing, stopping or starving a process.
_FORCED: Final = frozenset({"crashed", "lost", "timed_out"})

#: Model tasks of tests/project/models.py: they count in steps, have no salt.
_MODELS: Final = frozenset({"proj.Row", "proj.ARow"})


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: `rule` is one of a few words, `text` has the evidence."""

    rule: str
    text: str


@dataclass(slots=True)
class Verdict:
    """What the judge found; the run is sound when `violations` is empty."""

    figures: dict[str, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every promise held."""
        return not self.violations


def check(history: History) -> Verdict:
    """Return the verdict on a history whose runs have all had their time to end."""
    verdict = Verdict()
    for rule in (_submissions, _clients, _stored, _attempts, _states, _notes):
        verdict.violations += rule(history)
    verdict.violations += [Violation("trouble", text) for text in history.troubles]
    broken = Counter(violation.rule for violation in verdict.violations)
    runs_by_tag = _runs_by_tag(history)
    acknowledged = [it for it in history.submissions if it.must_exist]
    verdict.figures = {
        "attempted": len(history.submissions),
        "acknowledged": len(acknowledged),
        "ok": sum(len(runs_by_tag[it.tag]) == 1 for it in acknowledged),
        "lost": broken["lost"],
        "duplicated": broken["duplicated"],
        "recovered": sum(it.unknown and len(runs_by_tag[it.tag]) == 1 for it in history.submissions),
        "unknown": sum(it.outcome == "asked" and not runs_by_tag[it.tag] for it in history.submissions),
        "rolled back": sum(it.outcome == "rolled back" for it in history.submissions),
        "runs": len(history.stored),
        "attempts": sum(len(run.attempts) for run in history.stored.values()),
        "events stored": sum(len(run.events) for run in history.stored.values()),
        "clients": len(history.watches),
        "connections": sum(watch.connections for watch in history.watches),
        "events seen": sum(len(watch.seen) for watch in history.watches),
        "holes": broken["hole"],
        "duplicates": broken["duplicate"],
        "changed": broken["changed"],
        "reordered": broken["reordered"],
        "supervisor deaths": history.supervisor_deaths,
    }
    verdict.states = dict(Counter(run.status for run in history.stored.values()))
    return verdict


def _runs_by_tag(history: History) -> dict[str, list[StoredRun]]:
    found: dict[str, list[StoredRun]] = {submission.tag: [] for submission in history.submissions}
    for run in history.stored.values():
        for tag in run.tags:
            if not tag.startswith("schedule:"):  # the product's own, beside the submission's
                found.setdefault(tag, []).append(run)
    return found


def _submission_of(history: History) -> Callable[[StoredRun], Submission | None]:
    by_tag = {submission.tag: submission for submission in history.submissions}
    return lambda run: next((by_tag[tag] for tag in run.tags if tag in by_tag), None)


# --- submissions ---------------------------------------------------------------------------------------------


def _submissions(history: History) -> Iterator[Violation]:
    runs_by_tag = _runs_by_tag(history)
    executed = {note.salt for note in history.notes}
    for it in history.submissions:
        runs = runs_by_tag[it.tag]
        name = f"submission {it.no} ({it.task}, {it.way}, {it.outcome}, run {it.run})"
        if it.must_exist and not runs:
            yield Violation("lost", f"{name} is not in the store")
        if it.must_exist and it.run is not None and runs and it.run not in {run.id for run in runs}:
            yield Violation("lost", f"{name} became {[run.id for run in runs]} instead")
        if len(runs) > 1:
            yield Violation("duplicated", f"{name} became {[run.id for run in runs]}")
        if it.outcome == "rolled back" and (runs or it.salt in executed):
            yield Violation("rolled back", f"{name} was performed although its transaction was rolled back")
        if it.outcome == "refused":
            yield Violation("refused", f"{name}: {it.detail}")
    known = {tag for tag, runs in runs_by_tag.items() if runs}
    if strange := known - {it.tag for it in history.submissions}:
        yield Violation("invented", f"runs that nobody submitted: {sorted(strange)}")


# --- clients -------------------------------------------------------------------------------------------------


def _clients(history: History) -> Iterator[Violation]:
    canon: dict[tuple[str, int], bytes] = {}
    progress: dict[str, set[int]] = {}
    for run in history.stored.values():
        progress[run.id] = {event.offset for event in run.events if event.type == "run.progress"}
        for event in run.events:
            canon[run.id, event.offset] = event.digest
    for watch in history.watches:
        name = f"{watch.client} client of run {watch.run}"
        for problem in watch.problems:
            yield Violation("answer", f"{name}: {problem}")
        yield from _order(watch, name, progress.get(watch.run, set()))
        for seen in watch.seen:
            if seen.type == "stream.lag":
                continue
            known = canon.setdefault((watch.run, seen.id), seen.digest)
            if known != seen.digest:
                yield Violation("changed", f"{name}: event {seen.id} ({seen.type}) differs")
        run_stored = history.stored.get(watch.run)
        if run_stored is not None:
            yield from _against_store(watch, run_stored, name)


def _order(watch: Watch, name: str, progress: set[int]) -> Iterator[Violation]:
    """Judge the order; who was told that it lags may miss `progress`, nothing else."""
    before, over = 0, False
    spared: set[int] = set()
    for seen in watch.seen:
        if seen.type == "stream.lag":
            spared = progress
            continue
        if over:
            yield Violation("after the end", f"{name}: event {seen.id} ({seen.type}) after stream.end")
        if seen.type == "stream.reset":
            yield Violation("reset", f"{name}: stream.reset at {seen.id}, though nothing was trimmed")
            continue
        if seen.id == before:
            yield Violation("duplicate", f"{name}: event {seen.id} ({seen.type}) twice")
        elif seen.id < before:
            yield Violation("reordered", f"{name}: event {seen.id} ({seen.type}) after {before}")
        elif not spared.issuperset(range(before + 1, seen.id)):
            yield Violation("hole", f"{name}: event {seen.id} ({seen.type}) after {before}")
        before = max(before, seen.id)
        over = over or seen.type == "stream.end"


def _against_store(watch: Watch, run: StoredRun, name: str) -> Iterator[Violation]:
    last = max((seen.id for seen in watch.seen if seen.type != "stream.reset"), default=0)
    if last > len(run.events):
        yield Violation("vanished", f"{name}: saw event {last}, the store has {len(run.events)}")
    if run.status in TERMINAL and not watch.ended:
        yield Violation("no end", f"{name}: never saw stream.end, {last} of {run.tail} events, {run.status}")


# --- the store -----------------------------------------------------------------------------------------------


def _stored(history: History) -> Iterator[Violation]:
    for run in history.stored.values():
        offsets = [event.offset for event in run.events]
        ends = [event for event in run.events if event.type == "stream.end"]
        if offsets != list(range(1, run.tail + 1)):
            yield Violation("hole", f"store: run {run.id} has offsets {_short(offsets)}, tail {run.tail}")
        if run.status not in TERMINAL:
            yield Violation("never ended", f"run {run.id} ({run.task}) is {run.status}; {_story(run)}")
            if ends or run.endings:
                yield Violation("two outcomes", f"run {run.id} is {run.status} but has ended")
            continue
        if len(ends) != 1 or run.endings != 1:
            yield Violation(
                "two outcomes", f"run {run.id}: {len(ends)} stream.end, {run.endings} rows in `ending`"
            )
        if ends and run.events[-1].type != "stream.end":
            yield Violation("after the end", f"store: run {run.id} goes on after stream.end")
        for end in ends:
            told = history.contents[end.digest].status
            if told != run.status:
                yield Violation("two outcomes", f"run {run.id} is {run.status}, its stream.end says {told}")


def _short(offsets: list[int]) -> str:
    return str(offsets) if len(offsets) < 12 else f"{offsets[:5]}…{offsets[-5:]} ({len(offsets)})"


def _story(run: StoredRun) -> str:
    steps = [f"{it.number}:{it.ending or 'open'}{f' ({it.kind})' if it.kind else ''}" for it in run.attempts]
    return f"attempts {', '.join(steps) or 'none'}{f'; {run.error}' if run.error else ''}"


# --- attempts ------------------------------------------------------------------------------------------------


def _attempts(history: History) -> Iterator[Violation]:
    find = _submission_of(history)
    for run in history.stored.values():
        it = find(run)
        if it is not None:
            yield from _numbers(history, run, it)
            yield from _outcome(run, it)


def _numbers(history: History, run: StoredRun, it: Submission) -> Iterator[Violation]:
    """Within an attempt the task's own numbers are 1, 2, 3 …, and what they say is right."""
    reached: dict[int, int] = {}
    for event in run.events:
        content = history.contents[event.digest]
        if content.run != run.id:
            yield Violation("changed", f"event {event.offset} of run {run.id} is of {content.run!r}")
        if content.n is None:
            continue
        if not _is_right(content, it):
            yield Violation("changed", f"event {event.offset} of run {run.id} has not what its task said")
        before = reached.get(event.attempt, 0)
        if content.n != before + 1:
            rule = "hole" if content.n > before else "duplicate"
            yield Violation(
                rule, f"run {run.id}, attempt {event.attempt}: the task's event {content.n} after {before}"
            )
        reached[event.attempt] = content.n
    last = max((attempt.number for attempt in run.attempts if attempt.started), default=0)
    if run.status == "SUCCESSFUL" and reached.get(last, 0) != it.n:
        yield Violation(
            "hole", f"run {run.id} ({it.task}) is SUCCESSFUL with {reached.get(last, 0)} of {it.n}"
        )


def _is_right(content: Content, it: Submission) -> bool:
    if it.task in _MODELS:
        return content.scale == it.n
    return content.right and content.salt == it.salt and content.scale == it.scale


def _outcome(run: StoredRun, it: Submission) -> Iterator[Violation]:
    """A run may only end otherwise than its task wants when a process of it died, or its row could not be read."""
    if run.status not in TERMINAL or run.status in it.expected:
        return
    if it.task in _MODELS and '"exception":"django.db.utils.' in run.error:
        return
    forced = [attempt for attempt in run.attempts if attempt.ending in _FORCED]
    if not forced or run.status == "SUCCESSFUL" or run.attempts[-1].ending not in _FORCED:
        wanted = "/".join(sorted(it.expected))
        yield Violation("outcome", f"run {run.id} ({it.task}) is {run.status}, not {wanted}; {_story(run)}")


# --- states --------------------------------------------------------------------------------------------------


def _states(history: History) -> Iterator[Violation]:
    for where, states in (("the API", history.shown), ("Django", history.projected)):
        for run in history.stored.values():
            state = states.get(run.id)
            if state != run.status:
                yield Violation(
                    "two states", f"run {run.id} is {run.status} in the store, {state} in {where}"
                )
        for id in sorted(states.keys() - history.stored.keys()):
            yield Violation("two states", f"run {id} is {states[id]} in {where}, unknown to the store")


# --- what dead runners wrote ---------------------------------------------------------------------------------


def _notes(history: History) -> Iterator[Violation]:
    """What a process noted after saying it must have arrived, unless its whole tree was killed."""
    for note in history.notes:
        run = history.stored.get(note.run)
        attempt = _attempt_of(run, note.attempt, note.pid) if run is not None else None
        if run is None or attempt is None:
            if not history.supervisor_deaths:
                yield Violation(
                    "ghost", f"pid {note.pid} performed run {note.run}, attempt {note.attempt}, unknown"
                )
            continue
        if attempt.ending == "lost" and attempt.kind == "lost":
            continue
        said = [
            content.n
            for event in run.events
            if event.attempt == note.attempt and (content := history.contents[event.digest]).n is not None
        ]
        if len(said) < note.n:
            yield Violation(
                "undelivered",
                f"run {run.id}, attempt {note.attempt} ({attempt.ending}) said {note.n}, delivered {len(said)}",
            )


def _attempt_of(run: StoredRun, number: int, pid: int) -> StoredAttempt | None:
    return next((it for it in run.attempts if (it.number, it.pid) == (number, pid) and it.started), None)


# --- recovery ------------------------------------------------------------------------------------------------

#: Kinds after which the next event must come over a connection that was opened later: the old ones die with it.
_CUTS: Final = ("gateway", "supervisor")


def recovery(history: History) -> dict[str, list[float]]:
    """Return seconds from each kill to the next event at a client, by kind, sorted.

    After the death of a gateway, that is the first event over a newer connection; after a runner's, the next one of
    its run; otherwise the next one of any run. Clients that are slow on purpose do not count.
    """
    plain = [watch for watch in history.watches if watch.client == "plain"]
    arrivals = sorted(((seen, watch.run) for watch in plain for seen in watch.seen), key=lambda it: it[0].at)
    started = [(seen.at, pid, run) for seen, run in arrivals if (pid := history.contents[seen.digest].pid)]
    found: dict[str, list[float]] = {}
    for hit in history.hits:
        if not hit.kind.startswith("kill-"):
            continue
        # In twenty minutes a number is given to several processes: the latest one before the kill was hit.
        pids = {pid: run for at, pid, run in started if at <= hit.at}
        after = _next_arrival(hit.kind, hit.at, [pids[pid] for pid in hit.pids if pid in pids], arrivals)
        if after is not None:
            found.setdefault(hit.kind, []).append(after - hit.at)
    return {kind: sorted(times) for kind, times in found.items()}


def _next_arrival(kind: str, at: float, runs: list[str], arrivals: list[tuple[Seen, str]]) -> float | None:
    cut = any(role in kind for role in _CUTS)
    if not cut and any(role in kind for role in ("busy", "runner")) and not runs:
        return None
    low, high = 0, len(arrivals)
    while low < high:
        middle = (low + high) // 2
        if arrivals[middle][0].at <= at:
            low = middle + 1
        else:
            high = middle
    for seen, run in arrivals[low:]:
        if cut:
            if seen.opened > at:
                return seen.at
        elif not runs or run in runs:
            return seen.at
    return None
