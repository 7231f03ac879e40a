"""The judge notices every defect it is there for: sound histories with one thing wrong each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos import payload
from tests.chaos.checker import check, recovery
from tests.chaos.history import (
    History,
    Hit,
    Note,
    Seen,
    StoredAttempt,
    StoredEvent,
    StoredRun,
    Submission,
    Watch,
    read_notes,
)

RUN = "01900000-0000-7000-8000-000000000001"
SALT = 7
PID = 4321


def say(run: str, attempt: int, **data: Any) -> bytes:
    """Return an event's data as the product renders it."""
    body = {**data, "_run": run, "_attempt": attempt, "_timestamp": "2026-01-01T00:00:00Z"}
    return json.dumps(body, separators=(",", ":")).encode()


def story(n: int = 3, attempt: int = 1) -> list[tuple[str, bytes]]:
    """Return the events of one whole attempt that says `n` numbers."""
    ticks = [("tick", say(RUN, attempt, **payload.tick(SALT, number))) for number in range(1, n + 1)]
    return [("run.started", say(RUN, attempt, pid=PID)), *ticks]


END = ("stream.end", say(RUN, 1, status="SUCCESSFUL"))


class Made:
    """A sound history of one run and two clients, to be spoilt.

    Attributes:
      history: it; run, watch, submission: its parts.
    """

    def __init__(self, events: list[tuple[str, bytes]] | None = None) -> None:
        events = [*story(), END] if events is None else events
        self.history = history = History()
        learned = [(type, history.learn(type, data), data) for type, data in events]
        self.run = StoredRun(
            RUN,
            "SUCCESSFUL",
            len(events),
            tags=("s1",),
            task="proj.chaos_ticks",
            endings=1,
            events=[
                StoredEvent(offset, type, digest, json.loads(data)["_attempt"])
                for offset, (type, digest, data) in enumerate(learned, 1)
            ],
            attempts=[StoredAttempt(1, PID, True, "returned")],
        )
        self.submission = Submission(
            1, "proj.chaos_ticks", SALT, 3, 1, frozenset({"SUCCESSFUL"}), "key", RUN, "acknowledged"
        )
        self.watch = self._watch(learned)
        history.submissions = [self.submission]
        history.watches = [self.watch, self._watch(learned)]
        history.stored = {RUN: self.run}
        history.shown = {RUN: "SUCCESSFUL"}
        history.projected = {RUN: "SUCCESSFUL"}
        history.notes = [Note(RUN, 1, PID, 3, SALT)]

    @staticmethod
    def _watch(learned: list[tuple[str, bytes, bytes]]) -> Watch:
        seen = [Seen(id, type, digest, id / 10, 0.0) for id, (type, digest, _) in enumerate(learned, 1)]
        return Watch(RUN, "plain", seen, ended=True, connections=1)

    def rules(self) -> set[str]:
        """Return which rules the judge finds broken."""
        return {violation.rule for violation in check(self.history).violations}


def test_a_sound_history_is_sound() -> None:
    made = Made()
    verdict = check(made.history)
    assert verdict.sound, verdict.violations
    assert verdict.figures["ok"] == verdict.figures["acknowledged"] == verdict.figures["attempted"] == 1
    assert verdict.states == {"SUCCESSFUL": 1}


def lost(made: Made) -> None:
    made.history.stored.clear()


def acknowledged_as_another_run(made: Made) -> None:
    made.submission.run = "01900000-0000-7000-8000-00000000000f"


def lost_from_the_outbox(made: Made) -> None:
    made.submission.outcome = "committed"
    made.history.stored.clear()


def accepted_twice(made: Made) -> None:
    copy = Made().run
    copy.id = RUN[:-1] + "2"
    made.history.stored[copy.id] = copy


def rolled_back_in_the_store(made: Made) -> None:
    made.submission.outcome = "rolled back"


def refused(made: Made) -> None:
    made.submission.outcome = "refused"


def invented(made: Made) -> None:
    made.run.tags = ("s99",)


def a_hole_at_a_client(made: Made) -> None:
    del made.watch.seen[2]


def the_first_events_missing_at_a_client(made: Made) -> None:
    del made.watch.seen[:2]


def twice_at_a_client(made: Made) -> None:
    made.watch.seen.insert(2, made.watch.seen[1])


def reordered_at_a_client(made: Made) -> None:
    made.watch.seen[1], made.watch.seen[2] = made.watch.seen[2], made.watch.seen[1]


def changed_at_a_client(made: Made) -> None:
    digest = made.history.learn("tick", say(RUN, 1, **payload.tick(SALT, 99)))
    made.watch.seen[2] = made.watch.seen[2]._replace(digest=digest)


def changed_for_everybody(made: Made) -> None:
    event = made.run.events[2]
    digest = made.history.learn("tick", say(RUN, 1, n=2, salt=SALT, scale=1, pad="wrong"))
    made.run.events[2] = event._replace(digest=digest)
    for watch in made.history.watches:
        watch.seen[2] = watch.seen[2]._replace(digest=digest)


def another_runs_event(made: Made) -> None:
    made.history.contents[made.run.events[2].digest] = made.history.contents[
        made.run.events[2].digest
    ]._replace(run="another")


def seen_but_not_stored(made: Made) -> None:
    del made.run.events[-1]
    made.run.tail -= 1
    made.run.status = "RUNNING"


def two_ends_at_a_client(made: Made) -> None:
    end = made.watch.seen[-1]
    made.watch.seen.append(end._replace(id=end.id + 1))


def two_ends_in_the_store(made: Made) -> None:
    end = made.run.events[-1]
    made.run.events.append(end._replace(offset=end.offset + 1))
    made.run.tail += 1


def an_end_that_was_not_recorded(made: Made) -> None:
    made.run.endings = 0


def an_event_after_the_end(made: Made) -> None:
    digest = made.history.learn("tick", say(RUN, 1, **payload.tick(SALT, 4)))
    made.run.events.append(StoredEvent(len(made.run.events) + 1, "tick", digest, 1))
    made.run.tail += 1


def the_end_tells_another_state(made: Made) -> None:
    made.run.status = "FAILED"
    made.history.shown[RUN] = made.history.projected[RUN] = "FAILED"


def the_api_tells_another_state(made: Made) -> None:
    made.history.shown[RUN] = "RUNNING"


def the_projection_lags(made: Made) -> None:
    made.history.projected[RUN] = "READY"


def the_projection_lacks_it(made: Made) -> None:
    del made.history.projected[RUN]


def the_projection_knows_another_run(made: Made) -> None:
    made.history.projected["01900000-0000-7000-8000-0000000000ff"] = "READY"


def never_ended(made: Made) -> None:
    del made.run.events[-1]
    made.run.tail -= 1
    made.run.status, made.run.endings = "RUNNING", 0
    made.history.shown[RUN] = made.history.projected[RUN] = "RUNNING"


def a_client_that_never_saw_the_end(made: Made) -> None:
    del made.watch.seen[-1]
    made.watch.ended = False


def a_hole_in_the_store(made: Made) -> None:
    del made.run.events[2]


def a_hole_in_the_tasks_numbers(made: Made) -> None:
    del made.run.events[2]
    made.run.events = [event._replace(offset=offset) for offset, event in enumerate(made.run.events, 1)]
    made.run.tail -= 1


def successful_without_its_last_event(made: Made) -> None:
    made.submission.n = 4


def failed_without_a_reason(made: Made) -> None:
    made.submission.expected = frozenset({"FAILED"})


def undelivered(made: Made) -> None:
    made.history.notes = [Note(RUN, 1, PID, 4, SALT)]


def performed_by_a_ghost(made: Made) -> None:
    made.history.notes.append(Note(RUN, 2, PID + 1, 1, SALT))


def a_reset_for_nothing(made: Made) -> None:
    made.watch.seen.insert(2, made.watch.seen[1]._replace(type="stream.reset"))


def a_strange_answer(made: Made) -> None:
    made.watch.problems.append("status 404 after event 2")


def a_leftover(made: Made) -> None:
    made.history.troubles.append("process 1 lives")


DEFECTS: dict[Callable[[Made], None], str] = {
    lost: "lost",
    acknowledged_as_another_run: "lost",
    lost_from_the_outbox: "lost",
    accepted_twice: "duplicated",
    rolled_back_in_the_store: "rolled back",
    refused: "refused",
    invented: "invented",
    a_hole_at_a_client: "hole",
    the_first_events_missing_at_a_client: "hole",
    twice_at_a_client: "duplicate",
    reordered_at_a_client: "reordered",
    changed_at_a_client: "changed",
    changed_for_everybody: "changed",
    another_runs_event: "changed",
    seen_but_not_stored: "vanished",
    two_ends_at_a_client: "after the end",
    two_ends_in_the_store: "two outcomes",
    an_end_that_was_not_recorded: "two outcomes",
    an_event_after_the_end: "after the end",
    the_end_tells_another_state: "two outcomes",
    the_api_tells_another_state: "two states",
    the_projection_lags: "two states",
    the_projection_lacks_it: "two states",
    the_projection_knows_another_run: "two states",
    never_ended: "never ended",
    a_client_that_never_saw_the_end: "no end",
    a_hole_in_the_store: "hole",
    a_hole_in_the_tasks_numbers: "hole",
    successful_without_its_last_event: "hole",
    failed_without_a_reason: "outcome",
    undelivered: "undelivered",
    performed_by_a_ghost: "ghost",
    a_reset_for_nothing: "reset",
    a_strange_answer: "answer",
    a_leftover: "trouble",
}


@pytest.mark.parametrize(("spoil", "rule"), DEFECTS.items(), ids=lambda it: getattr(it, "__name__", ""))
def test_every_defect_is_noticed(spoil: Callable[[Made], None], rule: str) -> None:
    made = Made()
    spoil(made)
    assert rule in made.rules()


def test_rolled_back_is_noticed_by_what_was_performed_alone() -> None:
    made = Made()
    made.history.submissions.append(
        Submission(2, "proj.chaos_ticks", SALT + 1, 3, 1, frozenset(), "django", "x", "rolled back")
    )
    assert made.rules() == set()
    made.history.notes.append(Note("x", 1, PID, 1, SALT + 1))
    assert "rolled back" in made.rules()


def test_who_lags_may_miss_progress_and_nothing_else() -> None:
    events = [*story(n=2), ("run.progress", say(RUN, 1)), ("run.progress", say(RUN, 1)), *story()[3:], END]
    made = Made(events)
    lag = Seen(3, "stream.lag", b"", 0.3, 0.0)
    made.watch.seen = [*made.watch.seen[:3], lag, *made.watch.seen[4:]]
    assert made.rules() == set()
    made.watch.seen.remove(lag)
    assert made.rules() == {"hole"}, "unannounced"
    made.watch.seen = [*made.watch.seen[:2], lag, *made.watch.seen[3:]]
    assert made.rules() == {"hole"}, "an event of the task"


def test_a_second_attempt_counts_anew() -> None:
    events = [*story(n=2), ("run.retrying", say(RUN, 1)), *story(attempt=2), END]
    made = Made(events)
    made.run.attempts = [
        StoredAttempt(1, PID, True, "crashed", "signal"),
        StoredAttempt(2, PID, True, "returned"),
    ]
    made.history.notes = [Note(RUN, 1, PID, 2, SALT), Note(RUN, 2, PID, 3, SALT)]
    assert made.rules() == set()


def test_what_a_killed_tree_had_not_delivered_is_forgiven() -> None:
    made = Made()
    made.history.notes = [Note(RUN, 1, PID, 3, SALT), Note(RUN, 1, PID + 1, 9, SALT)]
    made.history.supervisor_deaths = 1
    assert made.rules() == set()
    made.run.attempts = [StoredAttempt(1, PID, True, "lost", "lost")]
    made.history.notes = [Note(RUN, 1, PID, 9, SALT)]
    assert made.rules() == set()


def test_an_unknown_outcome_that_turns_out_accepted_is_recovered() -> None:
    made = Made()
    made.submission.outcome, made.submission.unknown = "asked", True
    verdict = check(made.history)
    assert verdict.sound
    assert verdict.figures["recovered"] == 1
    made.history.stored.clear()
    made.history.watches.clear()
    made.history.shown.clear()
    made.history.projected.clear()
    made.history.notes.clear()
    verdict = check(made.history)
    assert verdict.sound
    assert verdict.figures["unknown"] == 1


def test_recovery_after_a_gateway_needs_a_newer_connection() -> None:
    made = Made()
    made.history.hits = [Hit(1, "kill-gateway", 0.15, 0.0, (1,)), Hit(2, "kill-zygote", 0.15, 0.0, (2,))]
    assert recovery(made.history) == {"kill-zygote": [pytest.approx(0.05)]}
    made.watch.seen[-1] = made.watch.seen[-1]._replace(opened=0.4)
    assert recovery(made.history)["kill-gateway"] == [pytest.approx(0.35)]


def test_recovery_after_a_runner_is_that_of_its_run() -> None:
    made = Made()
    made.history.hits = [
        Hit(1, "kill-busy", 0.25, 0.0, (PID,)),
        Hit(2, "kill-runner", 0.25, 0.0, (PID + 1,)),
        Hit(3, "stop-gateway", 0.25, 1.0, (1,)),
    ]
    assert recovery(made.history) == {"kill-busy": [pytest.approx(0.05)]}


def test_notes_are_read_up_to_a_torn_line() -> None:
    text = f"{RUN} 1 {PID} begun 0 7\n{RUN} 1 {PID} said 2 7\n{RUN} 1 {PID} said 1 7\n{RUN} 1 9"
    assert read_notes(text) == [Note(RUN, 1, PID, 2, 7)]
