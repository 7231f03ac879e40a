"""Schedules in the database: made once, switched, removed, kept in step with the code."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings
from django.utils import timezone

from taskkit.errors import InvalidArguments, SettingsError, UnknownTask
from taskkit.timetable import TimingError
from taskkit.wire.messages import ScheduleDefinition

pytestmark = pytest.mark.usefixtures("django_project")


def test_the_same_again_is_the_one_that_there_is() -> None:
    from taskkit.models import Schedule
    from taskkit.schedules import create

    one = create("proj.echo", kwargs={"value": 1}, cron="0 3 * * *", tz="Europe/Berlin")
    assert one.is_live
    assert one.next_at is not None
    assert create("proj.echo", kwargs={"value": 1}, cron=" 0  3 * * *", tz="Europe/Berlin").id == one.id
    assert create("proj.echo", kwargs={"value": 2}, cron="0 3 * * *", tz="Europe/Berlin").id != one.id
    assert create("proj.echo", kwargs={"value": 1}, cron="0 3 * * *").id != one.id, (
        "in TIME_ZONE, which is UTC"
    )
    assert (
        create("proj.echo", kwargs={"value": 1}, cron="0 3 * * *", tz="Europe/Berlin", subject="me").id
        != one.id
    )
    assert Schedule.objects.count() == 4


def test_a_name_is_one_schedules() -> None:
    from taskkit.schedules import NameTaken, create

    one = create("proj.echo", every=60, name="mine")
    assert create("proj.echo", every=timedelta(minutes=1), name="mine").id == one.id
    with pytest.raises(NameTaken, match="'mine'"):
        create("proj.echo", every=61, name="mine")


def test_a_single_moment_that_has_passed_is_refused_but_for_the_one_that_there_is() -> None:
    from taskkit.schedules import create

    soon = timezone.now() + timedelta(hours=1)
    one = create("proj.echo", at=soon)
    type(one).objects.update(next_slot=None)  # it has been kept
    assert create("proj.echo", at=soon).id == one.id
    with pytest.raises(TimingError, match="at lies in the past"):
        create("proj.echo", at=timezone.now() - timedelta(seconds=2))


def test_what_could_never_run_is_refused() -> None:
    from taskkit.models import Schedule
    from taskkit.schedules import create

    with pytest.raises(UnknownTask):
        create("proj.nonsense", every=5)
    with pytest.raises(InvalidArguments):
        create("proj.add", [1], every=5)
    with pytest.raises(ValueError, match="priority = 1000"):
        create("proj.echo", every=5, priority=1000)
    with pytest.raises(TypeError, match="no option colour"):
        create("proj.echo", every=5, colour="red")
    with pytest.raises(TimingError, match="day-of-month"):
        create("proj.echo", cron="0 0 32 * *")
    assert not Schedule.objects.exists()


def test_it_is_made_in_the_callers_transaction() -> None:
    from django.db import transaction

    from taskkit.models import Schedule
    from taskkit.schedules import create

    with transaction.atomic():
        create("proj.echo", every=5)
        transaction.set_rollback(True)
    assert not Schedule.objects.exists()


@override_settings(USE_TZ=False, TIME_ZONE="Europe/Berlin")
def test_without_use_tz_slots_are_the_same_numbers() -> None:
    from taskkit.schedules import create

    made = create("proj.echo", cron="30 2 * * *")
    assert made.tz == "Europe/Berlin"
    assert made.next_slot == made.timing.after(time.time())
    assert create("proj.echo", cron="30 2 * * *").id == made.id


def test_switched_on_it_waits_for_what_comes() -> None:
    from taskkit.schedules import create, switch

    made = create("proj.echo", cron="0 3 * * *")
    type(made).objects.update(next_slot=5)
    off = switch(made.id, enabled=False, using="default")
    assert off is not None
    assert (off.enabled, off.next_at) == (False, None)
    on = switch(made.id, enabled=True, using="default")
    assert on is not None
    assert on.next_slot == made.next_slot
    assert switch("01890a5d-ac96-774b-bcce-000000000001", enabled=True, using="default") is None


def test_it_is_removed_unless_it_is_the_codes() -> None:
    from taskkit.schedules import InTheCode, create, remove

    made = create("proj.echo", every=5)
    made.slots.create(at=5, state="skipped")
    assert remove(made.id, using="default")
    assert not remove(made.id, using="default")
    declare_all({"proj.echo": definition()})
    there = type(made).objects.get()
    with pytest.raises(InTheCode, match="disable it"):
        remove(there.id, using="default")
    assert type(made).objects.get().enabled


# --- in the code


def definition(**given: Any) -> ScheduleDefinition:
    return ScheduleDefinition(task="proj.echo", **{"every": 60, **given})


def declare_all(definitions: dict[str, ScheduleDefinition], now: float = 1_800_000_000.0) -> list[str]:
    from taskkit.schedules import declare

    return declare(definitions, using="default", now=now)


def test_the_code_and_the_database_say_the_same() -> None:
    from taskkit.models import Schedule

    declare_all({"a": definition(), "b": definition(cron="0 3 * * *", every=None)})
    assert list(Schedule.objects.values_list("name", "origin")) == [("a", "code"), ("b", "code")]
    Schedule.objects.filter(name="a").update(enabled=False, next_slot=7, last_slot=6)
    declare_all({"a": definition(), "b": definition(cron="0 4 * * *", every=None)}, 1_800_000_100.0)
    a, b = Schedule.objects.all()
    assert (a.enabled, a.next_slot, a.last_slot) == (False, 7, 6), "what has not changed goes on where it was"
    assert (b.cron, b.next_slot) == ("0 4 * * *", b.timing.after(1_800_000_100))


def test_what_leaves_the_code_retires_and_comes_back() -> None:
    from taskkit.models import Schedule
    from taskkit.schedules import RETIREMENT, create, revive

    create("proj.echo", every=5, name="of the api")
    declare_all({"a": definition(), "b": definition(every=61)})
    declare_all({"a": definition()})
    b = Schedule.objects.get(name="b")
    assert (b.is_live, b.next_at, b.enabled) == (False, None, True)
    revive({"a": definition(), "b": definition(every=61)}, using="default")
    assert Schedule.objects.get(name="b").is_live, "a tree of the newer code has it still"
    declare_all({"a": definition()}, 1_800_000_000.0)
    declare_all({"a": definition()}, 1_800_000_002.0 + RETIREMENT)
    assert set(Schedule.objects.values_list("name", flat=True)) == {"a", "of the api"}


def test_a_name_that_is_taken_stays_its_owners() -> None:
    from taskkit.models import Schedule
    from taskkit.schedules import create

    create("proj.echo", every=5, name="a")
    assert declare_all({"a": definition(), "b": definition()}) == ["a"]
    assert Schedule.objects.get(name="a").every == 5


@pytest.fixture
def decorated(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Give the tasks with room for schedules on `proj.add`; what is noted is forgotten."""
    from taskkit import registry, scheduling

    monkeypatch.setattr(scheduling, "_functions", {})
    tasks = dict(registry.known())
    del tasks["proj.yearly"]  # it has one
    yield tasks
    vars(tasks["proj.add"].func).pop("bulkhead_schedules", None)


def test_decorators_are_read_in_their_order(decorated: dict[str, Any]) -> None:
    from taskkit import schedule
    from taskkit.schedules import declared

    add = decorated["proj.add"].func
    schedule(every=60, args=[1, 2], name="second")(add)
    schedule(cron="0 3 * * *", kwargs={"a": 1, "b": 2}, overlap="queue", catchup="all")(add)
    found, complaints = declared(decorated)
    assert complaints == []
    assert list(found) == ["proj.add", "proj.add:second"]
    assert found["proj.add"] == ScheduleDefinition(
        task="proj.add",
        name="proj.add",
        cron="0 3 * * *",
        kwargs={"a": 1, "b": 2},
        overlap="queue",
        catchup="all",
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"args": [1]}, "do not fit proj.add: b: "),
        ({"args": [1, object()]}, "JSON cannot express"),
        ({"args": [1, 2], "name": ""}, "need names"),
    ],
)
def test_a_schedule_that_makes_no_run_is_complained_of(
    decorated: dict[str, Any], given: dict[str, Any], complaint: str
) -> None:
    from taskkit import schedule
    from taskkit.schedules import declared

    add = decorated["proj.add"].func
    schedule(every=5, args=[1, 2])(add)
    schedule(every=6, **{"name": "other", **given})(add)
    found, [said] = declared(decorated)
    assert complaint in said
    assert "tasks.py" in said, "it says where"
    assert len(found) == 1


def test_it_is_e007_and_keeps_the_tree_from_starting(decorated: dict[str, Any]) -> None:
    from taskkit import schedule
    from taskkit.zygote.prepare import check_schedules

    schedule(every=5, args=["one", 2])(decorated["proj.add"].func)
    [message] = run_checks(tags=["taskkit"])
    assert message.id == "taskkit.E007"
    assert "README" in str(message.hint)
    with pytest.raises(SettingsError, match="do not fit"):
        check_schedules(decorated)


def test_a_function_that_is_no_task_is_found(decorated: dict[str, Any]) -> None:
    from taskkit import schedule
    from taskkit.schedules import declared

    @schedule(every=5)
    def forgotten() -> None: ...

    _, [said] = declared(decorated)
    assert "forgotten" in said
    assert "put @task on it" in said


def test_a_task_of_djangos_interface_may_be_decorated_from_above(decorated: dict[str, Any]) -> None:
    from taskkit import schedule
    from taskkit.schedules import declared

    task = replace(decorated["proj.add"])
    schedule(every=5, args=[1, 2])(task)  # has `func`, as their Task objects do
    assert list(declared(decorated)[0]) == ["proj.add"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"cron": "0 0 31 2 *"}, "is never due"),
        ({"cron": "0 0 * * *", "tz": "Mars"}, "tzdata"),
        ({"cron": "0 0 * * *", "every": 5}, "exactly one"),
        ({}, "exactly one"),
        ({"cron": 5}, "cron = 5"),
        ({"every": 5, "overlap": "cancel"}, "'skip' or 'queue' or 'allow'"),
        ({"every": 5, "catchup": True}, "'latest' or 'all' or 'none'"),
        ({"every": 5, "name": "a b"}, "name = 'a b'"),
    ],
)
def test_a_wrong_option_is_named_where_it_stands(given: dict[str, Any], named: str) -> None:
    from taskkit import schedule

    def task() -> None: ...

    with pytest.raises(ValueError, match="@schedule on ") as caught:
        schedule(**given)(task)
    assert named in str(caught.value)


def test_a_model_is_no_function() -> None:
    from taskkit import schedule
    from tests.project.models import Row

    with pytest.raises(TypeError, match="makes a row"):
        schedule(every=5)(Row)
