"""The admin shows; it changes nothing."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from django.test import RequestFactory
from django.utils import timezone

pytestmark = pytest.mark.usefixtures("django_project")


def _admins() -> dict[Any, Any]:
    from django.contrib.admin import AdminSite

    from taskkit import admin
    from taskkit.models import Node, Outbox, Run

    site = AdminSite()
    return {
        Run: admin.RunAdmin(Run, site),
        Outbox: admin.OutboxAdmin(Outbox, site),
        Node: admin.NodeAdmin(Node, site),
    }


@pytest.fixture(autouse=True)
def _admin_installed(django_project: Any) -> Any:
    from django.test import modify_settings

    with modify_settings(INSTALLED_APPS={"append": "django.contrib.admin"}):
        yield


def test_nothing_can_be_added_changed_or_deleted() -> None:
    request = RequestFactory().get("/")
    for model, admin in _admins().items():
        allowed = (
            admin.has_add_permission(request),
            admin.has_change_permission(request, model()),
            admin.has_delete_permission(request),
        )
        assert allowed == (False, False, False)
        assert admin.check() == []


def test_a_run_is_found_by_its_id_and_shows_its_duration() -> None:
    from taskkit.models import Run
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    submit("proj.echo")
    admin = _admins()[Run]
    found, _ = admin.get_search_results(RequestFactory().get("/"), Run.objects.all(), f" {handle.id} ")
    assert [str(run.id) for run in found] == [handle.id]
    found, _ = admin.get_search_results(RequestFactory().get("/"), Run.objects.all(), "echo")
    assert found.count() == 2
    run = handle.run()
    assert admin.duration(run) == ""
    run.started_at = timezone.now()
    run.finished_at = run.started_at + dt.timedelta(seconds=1.5)
    assert admin.duration(run) == "1.500 s"
