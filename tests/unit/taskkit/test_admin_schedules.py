"""Schedules in the admin: what is shown, what people may do."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.taskkit.site import site
from tests.unit.taskkit.test_admin_orders import user

if TYPE_CHECKING:
    from taskkit.models import Schedule

pytestmark = pytest.mark.usefixtures("django_project")

LIST = "/admin/taskkit/schedule/"


@pytest.fixture(autouse=True)
def _site(django_project: Any) -> Iterator[None]:
    with site():
        yield


@pytest.fixture
def made() -> Schedule:
    from taskkit.schedules import create

    return create("proj.echo", kwargs={"value": "<b>"}, cron="30 3 * * *", tz="Europe/Berlin", name="nightly")


def in_the_code(made: Schedule) -> None:
    type(made).objects.update(origin="code")


def page(made: Schedule) -> str:
    return f"{LIST}{made.pk}/change/"


def test_the_list_and_the_page_show_next_slot_and_runs(made: Schedule) -> None:
    run = uuid.uuid4()
    made.slots.create(at=1_800_000_000, state="submitted", run=run)
    made.slots.create(at=1_800_000_060, state="skipped")
    assert made.next_at is not None
    client = user("view_schedule")
    listed = client.get(LIST).content.decode()
    assert "30 3 * * * Europe/Berlin" in listed
    assert f"{made.next_at:%Y}" in listed
    shown = client.get(page(made)).content.decode()
    assert f'href="/admin/taskkit/run/{run}/change/"' in shown
    assert "2027-01-15 08:01:00 UTC (skipped)" in shown
    assert 'name="_save"' not in shown


def test_whoever_may_change_switches_and_nothing_else(made: Schedule) -> None:
    client = user("view_schedule", "change_schedule")
    shown = client.get(page(made)).content.decode()
    assert shown.count('type="checkbox"') == 1
    client.post(page(made), {"cron": "* * * * *", "name": "x"})  # an empty checkbox is not sent
    made.refresh_from_db()
    assert (made.enabled, made.next_at, made.cron, made.name) == (False, None, "30 3 * * *", "nightly")
    client.post(page(made), {"enabled": "on"})
    made.refresh_from_db()
    assert made.enabled
    assert made.next_at is not None


def test_the_actions_of_the_list_switch(made: Schedule) -> None:
    client = user("view_schedule", "change_schedule")
    for action, enabled in (("disable_schedules", False), ("enable_schedules", True)):
        answer = client.post(LIST, {"action": action, "_selected_action": [made.pk]}, follow=True)
        assert f"1 {'enabled' if enabled else 'disabled'}." in answer.content.decode()
        made.refresh_from_db()
        assert made.enabled is enabled
    viewer = user("view_schedule")
    viewer.post(LIST, {"action": "disable_schedules", "_selected_action": [made.pk]})
    made.refresh_from_db()
    assert made.enabled


def test_a_schedule_is_removed_with_its_slots_unless_it_is_the_codes(made: Schedule) -> None:
    from taskkit.models import Schedule, Slot

    made.slots.create(at=1_800_000_000, state="skipped")
    client = user("view_schedule", "delete_schedule")
    in_the_code(made)
    assert client.post(f"{LIST}{made.pk}/delete/", {"post": "yes"}).status_code == 403
    bulk = {"action": "delete_selected", "_selected_action": [made.pk], "post": "yes"}
    assert "disable it" in client.post(LIST, bulk, follow=True).content.decode()
    assert Schedule.objects.count() == 1
    Schedule.objects.update(origin="api")
    assert "nightly" in client.get(f"{LIST}{made.pk}/delete/").content.decode()
    client.post(f"{LIST}{made.pk}/delete/", {"post": "yes"})
    assert (Schedule.objects.count(), Slot.objects.count()) == (0, 0)


def test_nobody_adds_one_here() -> None:
    assert user("root").get(f"{LIST}add/").status_code == 403


@pytest.mark.parametrize(
    ("use_tz", "shown"), [(True, "Nov. 28, 2026, 12:30 p.m."), (False, "Nov. 28, 2026, 12:30 p.m.")]
)
def test_times_are_those_of_the_project(made: Schedule, use_tz: bool, shown: str) -> None:
    from django.test import override_settings

    type(made).objects.update(next_slot=1_795_865_400, last_slot=None)
    client = user("view_schedule")
    with override_settings(USE_TZ=use_tz, TIME_ZONE="Europe/Berlin"):
        for url in (LIST, page(made)):
            told = client.get(url).content.decode()
            assert shown in told
            assert ">None<" not in told
