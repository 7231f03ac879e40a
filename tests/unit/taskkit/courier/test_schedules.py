"""The courier keeps schedules: each slot one row, one run, whatever happens in between."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from django.db import OperationalError, connections, transaction

from taskkit.wire.messages import (
    ScheduleAnswer,
    ScheduleDefinition,
    ScheduleOrder,
    Submit,
    Submitted,
    Transition,
)
from tests.unit.taskkit.courier.harness import Tree

if TYPE_CHECKING:
    from taskkit.courier.schedules import Schedules
    from taskkit.models import Schedule

pytestmark = pytest.mark.usefixtures("django_project")

START = 1_800_000_000


class Clock:
    """Monotonic seconds and the wall clock, which move together until the wall clock is set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.off = START - 1000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.off

    def to(self, wall: float) -> None:
        """Let time pass until the wall clock shows `wall`."""
        self.now = wall - self.off


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keeper(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Schedules:
    """Give what a courier has for one database; the code declares nothing."""
    return another(clock)


def another(clock: Clock) -> Schedules:
    from taskkit.courier.schedules import Schedules

    return Schedules("default", clock, clock.wall)


def make(clock: Clock, **given: Any) -> Schedule:
    from taskkit.schedules import put

    definition = ScheduleDefinition(task="proj.echo", **{"every": 10, **given})
    return put(definition, using="default", now=clock.wall())[0]


def slots(schedule: Schedule) -> list[tuple[int, str]]:
    """Return every slot, in seconds from START, with its state."""
    return [(slot.at - START, slot.state) for slot in schedule.slots.order_by("at")]


def runs() -> list[Any]:
    from taskkit.models import Run

    return list(Run.objects.order_by("id"))


def end_all() -> None:
    from taskkit.models import Run

    Run.objects.update(status="SUCCESSFUL")


def tick(keeper: Schedules, clock: Clock, wall: float) -> None:
    """Do all that is due at `wall`."""
    clock.to(wall)
    keeper.look_soon()  # the tests write over the courier's own connection, of which SQLite's counter knows nothing
    for _ in range(12):
        keeper.turn()


def test_a_slot_is_a_row_with_a_run(keeper: Schedules, clock: Clock) -> None:
    from taskkit.models import Outbox

    made = make(
        clock,
        kwargs={"value": 1},
        name="mine",
        options={"priority": 7, "tags": ["a"], "metadata": {"b": 1}, "max_attempts": 3},
    )
    tick(keeper, clock, START + 9)
    assert slots(made) == []
    tick(keeper, clock, START + 10.1)
    assert slots(made) == [(10, "submitted")]
    [run], [entry] = runs(), Outbox.objects.all()
    assert run.id == entry.id == made.slots.get().run
    assert (run.task, run.kwargs, run.priority, run.tags) == (
        *("proj.echo", {"value": 1}, 7, ["a", f"schedule:{made.id}"]),
    )
    assert run.metadata == {"b": 1, "schedule": "mine", "slot": "2027-01-15T08:00:10Z"}
    assert entry.payload["max_attempts"] == 3
    made.refresh_from_db()
    assert (made.last_slot, made.next_slot) == (START + 10, START + 20)


def test_it_is_looked_for_when_it_is_due(keeper: Schedules, clock: Clock) -> None:
    make(clock, every=3)
    clock.to(START + 2.6)
    keeper.turn()
    assert keeper.next == pytest.approx(clock.now + 0.4), "not a second later"


def test_two_couriers_keep_a_slot_once(keeper: Schedules, clock: Clock) -> None:
    """Both read the schedule before either writes: one moves it on, the other finds it moved."""
    from taskkit.courier.firing import fire
    from taskkit.models import Schedule

    made = make(clock)
    read_by_one, read_by_other = (Schedule.objects.get(id=made.id) for _ in range(2))
    assert fire("default", read_by_one, START + 10.0)
    assert not fire("default", read_by_other, START + 10.0)
    assert (slots(made), len(runs())) == ([(10, "submitted")], 1)


def test_a_slot_that_has_a_row_makes_no_second_run(keeper: Schedules, clock: Clock) -> None:
    made = make(clock)
    tick(keeper, clock, START + 10)
    type(made).objects.update(next_slot=START + 10)  # as after a clock was set back
    tick(keeper, clock, START + 11)
    assert (slots(made), len(runs())) == ([(10, "submitted")], 1)
    made.refresh_from_db()
    assert made.next_slot == START + 20


@pytest.mark.parametrize("moment", ["schedule.due", "schedule.fired"])
def test_what_fails_before_the_commit_has_not_happened(
    keeper: Schedules, clock: Clock, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit import failpoints
    from taskkit.models import Outbox

    made, failing = make(clock), [True]

    def hit(name: str) -> None:
        if name == moment and failing:
            raise OperationalError("the server has gone")

    monkeypatch.setattr(failpoints, "hit", hit)
    with pytest.raises(OperationalError):
        tick(keeper, clock, START + 10)
    assert (slots(made), runs(), Outbox.objects.count()) == ([], [], 0)
    failing.clear()
    tick(keeper, clock, START + 12)
    assert (slots(made), len(runs())) == ([(10, "submitted")], 1)


def test_a_commit_that_fails_has_not_happened(
    keeper: Schedules, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(clock)
    connection = connections["default"]
    monkeypatch.setattr(connection, "_commit", lambda: (_ for _ in ()).throw(OperationalError("disk full")))
    with pytest.raises(OperationalError):
        tick(keeper, clock, START + 10)
    monkeypatch.undo()
    assert (slots(made), runs()) == ([], [])
    tick(keeper, clock, START + 11)
    assert (slots(made), len(runs())) == ([(10, "submitted")], 1)


# --- overlap


def test_skip_leaves_out_what_comes_while_a_run_is_open(keeper: Schedules, clock: Clock) -> None:
    made = make(clock)
    tick(keeper, clock, START + 10)
    tick(keeper, clock, START + 20)
    end_all()
    tick(keeper, clock, START + 30)
    assert slots(made) == [(10, "submitted"), (20, "skipped"), (30, "submitted")]
    assert len(runs()) == 2


def test_queue_has_them_wait_one_after_another(keeper: Schedules, clock: Clock) -> None:
    made = make(clock, overlap="queue")
    for seconds in (10, 20, 30):
        tick(keeper, clock, START + seconds)
    assert slots(made) == [(10, "submitted"), (20, "waiting"), (30, "waiting")]
    end_all()
    tick(keeper, clock, START + 31)
    assert slots(made) == [(10, "submitted"), (20, "submitted"), (30, "waiting")]
    tick(keeper, clock, START + 32)
    assert slots(made)[2] == (30, "waiting"), "the second is open"
    end_all()
    tick(keeper, clock, START + 33)
    assert [state for _, state in slots(made)] == ["submitted"] * 3
    assert [run.metadata["slot"][-3:-1] for run in runs()] == ["10", "20", "30"]


def test_two_couriers_advance_a_queue_by_one(keeper: Schedules, clock: Clock) -> None:
    from taskkit.courier.firing import advance

    made = make(clock, overlap="queue")
    for seconds in (10, 20, 30):
        tick(keeper, clock, START + seconds)
    end_all()
    assert advance("default", made)
    assert not advance("default", made)
    assert [state for _, state in slots(made)] == ["submitted", "submitted", "waiting"]


def test_allow_does_not_look(keeper: Schedules, clock: Clock) -> None:
    made = make(clock, overlap="allow")
    for seconds in (10, 20, 30):
        tick(keeper, clock, START + seconds)
    assert [state for _, state in slots(made)] == ["submitted"] * 3
    assert len(runs()) == 3


# --- what was missed


@pytest.mark.parametrize(
    ("catchup", "kept"), [("latest", [500]), ("all", list(range(10, 501, 10))), ("none", [500])]
)
def test_what_was_missed_is_made_up_for(
    keeper: Schedules, clock: Clock, catchup: str, kept: list[int]
) -> None:
    made = make(clock, catchup=catchup, overlap="allow")
    tick(keeper, clock, START + 505)
    assert [at for at, _ in slots(made)] == kept
    made.refresh_from_db()
    assert made.next_slot == START + 510


def test_what_is_late_is_not_with_none(keeper: Schedules, clock: Clock) -> None:
    made = make(clock, every=3600, catchup="none")
    tick(keeper, clock, START + 3600 + 61)
    assert (slots(made), runs()) == ([], [])
    tick(keeper, clock, START + 7200 + 2)
    assert slots(made) == [(7200, "submitted")]


def test_a_single_moment_is_kept_once_however_late(keeper: Schedules, clock: Clock) -> None:
    made = make(clock, every=None, at=START + 5.0)
    tick(keeper, clock, START + 10_000)
    tick(keeper, clock, START + 20_000)
    assert slots(made) == [(5, "submitted")]
    made.refresh_from_db()
    assert (made.next_slot, made.next_at) == (None, None)


def test_slots_are_kept_within_a_bound(
    keeper: Schedules, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit.courier import firing

    monkeypatch.setattr(firing, "KEPT", 3)
    made = make(clock, overlap="allow")
    for number in range(1, 8):
        tick(keeper, clock, START + 10 * number)
    assert [at for at, _ in slots(made)] == [50, 60, 70]
    assert len(runs()) == 7


# --- the wall clock


def test_set_back_it_keeps_no_slot_twice(keeper: Schedules, clock: Clock) -> None:
    made = make(clock, overlap="allow")
    for number in range(1, 7):
        tick(keeper, clock, START + 10 * number)
    clock.off -= 40
    for number in range(2, 9):
        tick(keeper, clock, START + 10 * number)
    assert [at for at, _ in slots(made)] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert len(runs()) == 8


def test_a_clock_that_was_ahead_by_a_year_silences_nothing(keeper: Schedules, clock: Clock) -> None:
    made = make(clock, overlap="allow")
    tick(keeper, clock, START + 10)
    clock.off += 365 * 86_400
    tick(keeper, clock, clock.wall() + 10)
    clock.off -= 365 * 86_400
    tick(keeper, clock, clock.wall() + 31)  # the next review
    tick(keeper, clock, START + 70)
    made.refresh_from_db()
    assert made.next_slot == START + 80
    assert (70, "submitted") in slots(made)


# --- what is switched, gone, broken


def test_what_is_disabled_is_not_kept_nor_made_up_for(keeper: Schedules, clock: Clock) -> None:
    from taskkit import schedules

    made = make(clock)
    assert schedules.switch(made.id, enabled=False, using="default") is not None
    tick(keeper, clock, START + 100)
    assert slots(made) == []
    type(made).objects.update(enabled=True, next_slot=START + 110)
    tick(keeper, clock, START + 111)
    assert slots(made) == [(110, "submitted")]


def test_a_task_that_this_code_lacks_is_left_to_another_tree(keeper: Schedules, clock: Clock) -> None:
    """A newer tree has declared it: an older one must not use its slots up."""
    unknown, known = make(clock, name="unknown"), make(clock, name="known")
    type(unknown).objects.filter(id=unknown.id).update(task="proj.of_tomorrow")
    tick(keeper, clock, START + 10)
    assert (slots(unknown), slots(known)) == ([], [(10, "submitted")])
    unknown.refresh_from_db()
    assert "proj.of_tomorrow" in unknown.error
    type(unknown).objects.filter(id=unknown.id).update(task="proj.echo")  # the tree is of the newer code now
    tick(keeper, clock, START + 45)
    assert slots(unknown) == [(40, "submitted")]
    unknown.refresh_from_db()
    assert unknown.error == ""


def test_a_zone_without_data_keeps_only_its_own_schedules(
    keeper: Schedules, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit import timetable

    gone = make(clock, name="gone", every=None, cron="* * * * *", tz="Europe/Berlin")
    known = make(clock, name="known", every=60)
    zone = timetable.ZoneInfo

    def missing(name: str) -> Any:
        raise timetable.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(timetable, "ZoneInfo", missing)
    tick(keeper, clock, START + 60)
    assert (slots(gone), slots(known)) == ([], [(60, "submitted")])
    gone.refresh_from_db()
    assert "tzdata" in gone.error
    monkeypatch.setattr(timetable, "ZoneInfo", zone)
    tick(keeper, clock, START + 95)
    assert slots(gone) == [(60, "submitted")]


def test_a_row_that_makes_no_sense_keeps_no_other_from_its_slot(keeper: Schedules, clock: Clock) -> None:
    broken, sound = make(clock, name="broken"), make(clock, name="sound")
    type(broken).objects.filter(id=broken.id).update(options={"no such option": 1})
    tick(keeper, clock, START + 10)
    assert (slots(broken), slots(sound)) == ([], [(10, "submitted")])
    broken.refresh_from_db()
    assert "no such option" in broken.error


# --- in the courier's loop


def test_the_loop_submits_what_is_due(linked: Tree) -> None:
    from taskkit import schedules

    made = schedules.create("proj.add", [1, 2], every=1, name="seconds")
    asked = linked.expect(Submit)
    assert (asked.task, asked.args, asked.tags) == ("proj.add", [1, 2], [f"schedule:{made.id}"])
    linked.tell(Submitted(id=asked.id, run=asked.id))
    linked.tell(Transition(run=asked.id, version=2, task="proj.add", status="SUCCESSFUL", created_at=1e9))


def test_the_loop_obeys_the_gateway(linked: Tree) -> None:
    def order(what: str, **given: Any) -> ScheduleAnswer:
        linked.tell(ScheduleOrder(ask="7", order=what, **given))
        found = linked.expect(ScheduleAnswer)
        assert found.ask == "7"
        return found

    definition = ScheduleDefinition(task="proj.echo", cron="0 3 * * *")
    made = order("create", definition=definition, subject="me")
    assert made.status == "made"
    [state] = made.schedules
    assert (state.subject, state.definition.tz, state.enabled) == ("me", "UTC", True)
    assert order("create", definition=definition, subject="me").status == "done", "the same again"
    other = ScheduleDefinition(task="proj.echo", cron="1 3 * * *", name=state.definition.name)
    assert order("create", definition=other, subject="me").status == "taken"
    assert list(order("create", definition=ScheduleDefinition(task="proj.echo", at=5.0)).errors) == ["at"]
    assert [one.id for one in order("list").schedules if one.origin == "api"] == [state.id]
    assert state.id not in [one.id for one in order("list", after=state.definition.name).schedules]
    assert order("disable", id=state.id).schedules[0].next_slot is None
    assert order("enable", id=state.id).schedules[0].next_slot == state.next_slot
    assert order("show", id=str(uuid.uuid4())).status == order("show", id="nonsense").status == "unknown"
    assert order("delete", id=state.id).status == "done"
    assert order("delete", id=state.id).status == "unknown"


def test_a_long_list_comes_in_pages(linked: Tree) -> None:
    from taskkit import schedules

    for number in range(5):
        schedules.create("proj.echo", every=3600, name=f"n{number}")
    linked.tell(ScheduleOrder(ask="1", order="list", limit=2, after="n0"))
    found = linked.expect(ScheduleAnswer)
    assert ([one.definition.name for one in found.schedules], found.more) == (["n1", "n2"], True)
    linked.tell(ScheduleOrder(ask="1", order="list", limit=2, after="n3"))
    found = linked.expect(ScheduleAnswer)
    assert [one.definition.name for one in found.schedules] == ["n4", "proj.yearly"], (
        "the code's is there as well"
    )
    assert not found.more


def test_removing_waits_for_a_courier_that_keeps_a_slot(clock: Clock) -> None:
    """Otherwise a slot of a schedule that is no more would be left, or its commit fail."""
    from taskkit import schedules
    from taskkit.courier.firing import fire

    made, removed = make(clock), threading.Event()

    def remove() -> None:
        schedules.remove(made.id, using="default")
        removed.set()
        connections.close_all()

    thread = threading.Thread(target=remove)
    with transaction.atomic():
        assert fire("default", made, START + 10.0)
        thread.start()
        assert not removed.wait(0.3)
    thread.join(10)
    assert removed.is_set()
    assert not type(made).objects.exists()
    assert made.slots.count() == 0
    assert len(runs()) == 1
