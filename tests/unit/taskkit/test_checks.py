"""`manage.py check` says what would stop the tree."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

pytestmark = pytest.mark.usefixtures("django_project")


def _found(**taskkit: Any) -> list[tuple[str, str]]:
    with override_settings(TASKKIT=taskkit):
        return [(str(message.id), message.msg) for message in run_checks(tags=["taskkit"])]


def test_the_tests_project_is_clean() -> None:
    assert _found() == []


def test_every_message_has_a_hint() -> None:
    import ast
    from pathlib import Path

    from taskkit import backend, checks

    made = [
        call
        for module in (backend, checks)
        for call in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("Error", "Warning")
    ]
    assert len(made) >= 12
    assert all({"hint", "id"} <= {keyword.arg for keyword in call.keywords} for call in made)


def test_every_id_is_in_the_module_s_text_and_in_the_readme() -> None:
    import re
    from pathlib import Path

    from taskkit import backend, checks
    from tests.helpers import ROOT

    code = "".join(Path(module.__file__).read_text() for module in (backend, checks))
    ids = set(re.findall(r'id="(taskkit\.[EW]\d+)"', code))
    assert set(re.findall(r"^(taskkit\.[EW]\d+)  ", checks.__doc__ or "", re.MULTILINE)) == ids
    assert set(re.findall(r"^\| `(taskkit\.[EW]\d+)`", (ROOT / "README.md").read_text(), re.MULTILINE)) == ids


def test_a_wrong_setting_is_e001_with_key_and_value() -> None:
    [(id_, message)] = _found(BIND="nonsense")
    assert id_ == "taskkit.E001"
    assert "BIND" in message
    assert "nonsense" in message


def test_a_relative_state_directory_is_w001() -> None:
    [(id_, message)] = _found(STATE_DIR="state")
    assert id_ == "taskkit.W001"
    assert "'state'" in message


@pytest.mark.parametrize("path", ["nowhere.claims", "taskkit.tokens.AUDIENCE", "claims"])
def test_claims_that_nobody_can_ask_for_are_e004(path: str) -> None:
    [(id_, message)] = _found(TOKEN_CLAIMS=path)
    assert id_ == "taskkit.E004"
    assert repr(path) in message


def test_claims_that_can_be_asked_for_are_fine() -> None:
    assert _found(TOKEN_CLAIMS="taskkit.views.own_runs") == []


def test_a_task_model_without_process_is_e002(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.project.models import BadRow

    monkeypatch.delattr(BadRow, "process")
    [(id_, message)] = _found()
    assert id_ == "taskkit.E002"
    assert "proj.BadRow" in message


def test_two_tasks_of_one_name_are_e003(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit import registry

    def load() -> None:
        raise registry.DuplicateTask("two tasks are named 'proj.echo'")

    monkeypatch.setattr(registry, "load", load)
    assert issubclass(registry.DuplicateTask, ImproperlyConfigured)
    assert _found() == [("taskkit.E003", "two tasks are named 'proj.echo'")]


def test_models_and_migrations_agree() -> None:
    from django.core.management import call_command

    call_command("makemigrations", "taskkit", check=True, dry_run=True, verbosity=0)


@pytest.mark.parametrize(
    ("taskkit", "named"),
    [
        ({"UDS": "/run/bulkhead.sock"}, "UDS"),
        ({"BIND": "0.0.0.0:8888", "ALLOWED_HOSTS": ["x"]}, "BIND"),
        ({"BIND": "[::]:8888"}, "BIND"),
        ({"BIND": "127.0.0.1:0"}, "BIND"),
    ],
)
def test_a_gateway_that_browsers_have_no_url_of_is_w003(taskkit: dict[str, Any], named: str) -> None:
    [(id_, message)] = _found(**taskkit)
    assert id_ == "taskkit.W003"
    assert f"{named} = " in message
    assert _found(**taskkit, URL="https://tasks.example.com") == []


@pytest.mark.parametrize(
    "url",
    [
        "tasks.example.com",
        "ftp://a.example",
        "http://",
        "http://a:b@c",
        "http://a/?b",
        "http://a:0",
        "http://[a",
    ],
)
def test_a_url_that_is_none_is_e001(url: str) -> None:
    [(id_, message)] = _found(URL=url)
    assert id_ == "taskkit.E001"
    assert f"URL = {url!r}" in message


def test_an_admin_without_static_files_is_w004() -> None:
    from django.test import modify_settings

    with modify_settings(INSTALLED_APPS={"append": "django.contrib.admin"}):
        with override_settings(STATIC_URL=None):
            assert [id_ for id_, _ in _found()] == ["taskkit.W004"]
        with override_settings(STATIC_URL="static/"):
            assert _found() == []


@pytest.mark.parametrize("name", ["user", "lane", "partition"])
def test_functions_for_requests_that_nobody_can_call_are_e008(name: str) -> None:
    [(id_, message)] = _found(ASYNC_REQUEST={name: "nowhere.at_all"})
    assert id_ == "taskkit.E008"
    assert f"ASYNC_REQUEST.{name} = 'nowhere.at_all'" in message


def test_what_does_not_see_a_request_that_becomes_a_task_is_e009() -> None:
    ours, csrf = "taskkit.middleware.AsyncRequestMiddleware", "django.middleware.csrf.CsrfViewMiddleware"
    with override_settings(MIDDLEWARE=[ours, csrf]):
        [(id_, message)] = _found()
    assert id_ == "taskkit.E009"
    assert csrf in message
    with override_settings(MIDDLEWARE=[csrf, ours]):
        assert _found() == []


class OutboxApart:
    """A router that sends one of our tables elsewhere."""

    def allow_migrate(
        self, db: str, app_label: str, model_name: str | None = None, **hints: Any
    ) -> bool | None:
        return False if model_name == "outbox" else None


def test_tables_that_are_torn_apart_are_e010() -> None:
    with override_settings(DATABASE_ROUTERS=["tests.unit.taskkit.test_checks.OutboxApart"]):
        [(id_, message)] = _found()
    assert id_ == "taskkit.E010"
    assert "Outbox" in message
