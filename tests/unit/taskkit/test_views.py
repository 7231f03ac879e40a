"""A logged-in user gets a token, anybody else a reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.test import Client, override_settings
from django.urls import include, path

from taskkit import tokens

if TYPE_CHECKING:
    from django.contrib.auth.models import User

pytestmark = pytest.mark.usefixtures("django_project")

URL = "/bulkhead/token/"

MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]


def of_staff(request: HttpRequest) -> dict[str, Any] | None:
    """Give staff everything, nobody else anything."""
    if not request.user.is_staff:  # type: ignore[union-attr]
        return None
    return {"actions": ["read", "logs"], "runs": "*", "ttl": 60}


def confused(request: HttpRequest) -> dict[str, Any]:
    """Return what no token says."""
    return {"run": "x"}


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    return tokens.load_or_create_key(tmp_path / "key")


@pytest.fixture(autouse=True)
def site(tmp_path: Path, key: bytes) -> Iterator[None]:
    """Make this module a site whose key lies in `tmp_path`."""

    class Urls:
        urlpatterns = [path("bulkhead/", include("taskkit.urls"))]

    with override_settings(
        ROOT_URLCONF=Urls,
        MIDDLEWARE=MIDDLEWARE,
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        TASKKIT={"KEY_FILE": str(tmp_path / "key")},
    ):
        yield


@pytest.fixture
def user() -> User:
    from django.contrib.auth.models import User  # Django is set up by now

    return User.objects.create_user("ann")


def logged_in(user: User, **options: Any) -> Client:
    client = Client(**options)
    client.force_login(user)
    return client


def test_a_user_reads_what_was_submitted_for_him(user: User, key: bytes) -> None:
    answer = logged_in(user).post(URL)
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert set(answer.json()) == {"token", "expires_at"}
    claims = tokens.verify(key, answer.json()["token"])
    assert (claims.subject, claims.actions, claims.runs, claims.tasks) == (str(user.pk), {"read"}, "own", ())
    assert claims.sees_run("r", "t", str(user.pk))
    assert not claims.sees_run("r", "t", "another")
    assert answer.json()["expires_at"].endswith("Z")


def test_a_ticket_comes_on_request_and_goes_with_its_token(user: User, key: bytes) -> None:
    answer = logged_in(user).post(URL, {"ticket": "1"}).json()
    ticket = tokens.read_ticket(key, answer["ticket"])
    assert ticket.claims.runs == "own"
    assert ticket.claims.id == tokens.verify(key, answer["token"]).id
    assert answer["ticket_expires_at"] < answer["expires_at"]


def test_nobody_gets_nothing_but_json() -> None:
    answer = Client().post(URL)
    assert (answer.status_code, answer.headers["Content-Type"]) == (401, "application/problem+json")
    assert answer.headers["WWW-Authenticate"]
    assert answer.json()["type"] == "urn:bulkhead:problem:login-needed"


def test_without_authentication_in_the_project_nobody_is_logged_in() -> None:
    with override_settings(MIDDLEWARE=[]):
        assert Client().post(URL).status_code == 401


@pytest.mark.parametrize("middleware", [MIDDLEWARE, [one for one in MIDDLEWARE if "csrf" not in one]])
def test_another_site_cannot_ask_for_the_user(user: User, middleware: list[str]) -> None:
    with override_settings(MIDDLEWARE=middleware):
        client = logged_in(user, enforce_csrf_checks=True)
        answer = client.post(URL)
        assert (answer.status_code, answer.headers["Content-Type"]) == (403, "application/problem+json")
        assert answer.json()["type"] == "urn:bulkhead:problem:csrf"
        client.cookies["csrftoken"] = "a" * 32
        assert client.post(URL, headers={"X-CSRFToken": "a" * 32}).status_code == 200


@pytest.mark.parametrize("method", ["get", "put", "delete"])
def test_only_a_post_makes_a_token(user: User, method: str) -> None:
    answer = getattr(logged_in(user), method)(URL)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_the_project_says_what_a_token_may(user: User, key: bytes, tmp_path: Path) -> None:
    settings = {"KEY_FILE": str(tmp_path / "key"), "TOKEN_CLAIMS": f"{__name__}.of_staff"}
    with override_settings(TASKKIT=settings):
        assert logged_in(user).post(URL).json()["type"] == "urn:bulkhead:problem:forbidden"
        user.is_staff = True
        user.save()
        claims = tokens.verify(key, logged_in(user).post(URL).json()["token"])
    assert (claims.runs, claims.actions, claims.subject) == ("*", {"read", "logs"}, str(user.pk))


@pytest.mark.parametrize(("name", "said"), [("confused", "returned run"), ("absent", "TOKEN_CLAIMS = ")])
def test_a_wrong_hook_is_the_projects_mistake(user: User, tmp_path: Path, name: str, said: str) -> None:
    settings = {"KEY_FILE": str(tmp_path / "key"), "TOKEN_CLAIMS": f"{__name__}.{name}"}
    with override_settings(TASKKIT=settings), pytest.raises(ImproperlyConfigured, match=said):
        logged_in(user).post(URL)


def test_without_a_key_the_log_says_why(user: User, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").unlink()
    with caplog.at_level(logging.ERROR, "bulkhead.django"):
        answer = logged_in(user).post(URL)
    assert (answer.status_code, "bulkhead run" in caplog.text) == (503, True)
    assert str(tmp_path) not in answer.json()["detail"]
