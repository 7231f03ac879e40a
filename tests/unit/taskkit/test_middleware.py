"""What becomes of a request that asks to be a task, before a runner has it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import Client, override_settings
from django.urls import path
from django.utils import timezone

if TYPE_CHECKING:
    from taskkit.models import Outbox

pytestmark = pytest.mark.usefixtures("django_project")

ASKS = {"X-Async-Request": "true"}
CHANNEL = {"X-Async-Request": "a-channel-of-nobody"}

MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "taskkit.middleware.AsyncRequestMiddleware",
]


def view(request: HttpRequest) -> HttpResponse:
    """Answer at once."""
    return HttpResponse("at once")


def lane(request: HttpRequest) -> str | None:
    """Send what is large somewhere else."""
    return "heavy" if request.headers.get("X-Large") else None


def about(request: HttpRequest) -> str | None:
    """Tell what a request is about."""
    return request.headers.get("X-About")


@pytest.fixture(autouse=True)
def site() -> Iterator[None]:
    """Make this module a site."""
    from taskkit import registry
    from taskkit.models import Node, Outbox, Run, StoredRequest

    class Urls:
        urlpatterns = [path("view/", view)]

    with override_settings(
        ROOT_URLCONF=Urls,
        MIDDLEWARE=MIDDLEWARE,
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    ):
        registry.known.cache_clear()
        yield
        for model in (StoredRequest, Outbox, Run, Node):
            model.objects.all().delete()  # type: ignore[attr-defined]
    registry.known.cache_clear()


@pytest.fixture
def client() -> Client:
    """Give a user who is logged in."""
    from django.contrib.auth.models import User

    client = Client()
    client.force_login(User.objects.get_or_create(username="ann")[0])
    return client


def submitted() -> Outbox:
    """Return the only submission."""
    from taskkit.models import Outbox

    (entry,) = Outbox.objects.all()
    return entry


def with_requests(**options: Any) -> Any:
    """Set ASYNC_REQUEST for a block."""
    return override_settings(TASKKIT={"ASYNC_REQUEST": options})


def test_it_is_submitted_for_its_user(client: Client) -> None:
    from django.contrib.auth.models import User

    from taskkit.models import StoredRequest

    answer = client.post("/view/?a=b", b"body", content_type="text/plain", headers=ASKS)
    assert answer.status_code == 202
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Location" not in answer.headers, "this site has no route for it"
    key = str(User.objects.get(username="ann").pk)
    (stored,) = StoredRequest.objects.all()
    assert (stored.owner, stored.user, bytes(stored.body or b"")) == (key, key, b"body")
    assert (stored.method, stored.path, stored.endpoint) == ("POST", "/view/", "/view/?a=b")
    assert submitted().payload["subject"] == key
    assert answer.json()["meta"]["async_request_id"] == str(submitted().id) == str(stored.run)


def test_without_a_tree_it_waits_unless_the_project_says_else(client: Client) -> None:
    from taskkit.models import Node

    assert client.get("/view/", headers=ASKS).status_code == 202
    with with_requests(away="run"):
        assert client.get("/view/", headers=ASKS).content == b"at once"
    with with_requests(away="refuse"):
        answer = client.get("/view/", headers=ASKS)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        Node.objects.create(name="n", poke_address="@n", pid=1, seen_at=timezone.now() - timedelta(hours=1))
        assert client.get("/view/", headers=ASKS).status_code == 503
        Node.objects.update(seen_at=timezone.now())
        assert client.get("/view/", headers=ASKS).status_code == 202


def test_somebody_without_credentials_is_served_if_the_project_wants_it() -> None:
    nobody = Client()
    assert nobody.get("/view/", headers=ASKS).status_code == 401
    assert "ASYNC_REQUEST.anonymous" in nobody.get("/view/", headers=CHANNEL).json()["detail"]
    with with_requests(anonymous=True):
        assert nobody.get("/view/", headers=ASKS).status_code == 401
        assert nobody.get("/view/", headers=CHANNEL).status_code == 202
    assert submitted().payload["subject"] == "anon:a-channel-of-nobody"


def test_a_lane_is_a_pool(client: Client) -> None:
    with with_requests(pool="requests", lane=f"{__name__}.lane"):
        client.get("/view/", headers=ASKS)
        assert submitted().payload["pool"] == "requests"
        submitted().delete()
        client.get("/view/", headers={**ASKS, "X-Large": "1"})
        assert submitted().payload["pool"] == "heavy"


@pytest.mark.parametrize(
    ("body", "headers", "key"),
    [
        ('{"data": {"id": 7}}', {}, "object:7"),
        ('{"data": {"id": "seven"}}', {}, "object:seven"),
        ('{"data": {"id": 7}}', {"X-Partition-Key": "k"}, "header:<ann>:k"),
        ('{"data": [1]}', {}, None),
        ('{"data": {"id": [1]}}', {}, None),
        ('{"data": {"id": ""}}', {}, None),
        ("[" * 5_000, {}, None),
        ("{", {}, None),
    ],
)
def test_requests_about_one_object_share_a_key(
    client: Client, body: str, headers: dict[str, str], key: str | None
) -> None:
    from taskkit.models import StoredRequest

    client.post("/view/", body, content_type="application/json", headers={**ASKS, **headers})
    (stored,) = StoredRequest.objects.all()
    expected = str(stored.id) if key is None else key.replace("<ann>", stored.owner)
    assert submitted().payload["concurrency_key"] == expected


def test_what_a_client_without_credentials_names_is_its_own() -> None:
    with with_requests(anonymous=True):
        Client().post("/view/", '{"data": {"id": 7}}', content_type="application/json", headers=CHANNEL)
    assert submitted().payload["concurrency_key"] == "object:7:anon:a-channel-of-nobody"


def test_long_keys_stay_apart(client: Client) -> None:
    from taskkit.models import Outbox

    for end in "abb":
        client.get("/view/", headers={**ASKS, "X-Partition-Key": "k" * 500 + end})
    keys = [entry.payload["concurrency_key"] for entry in Outbox.objects.all()]
    assert all(len(key) <= 200 for key in keys)
    assert sorted(map(keys.count, set(keys))) == [1, 2]


def test_the_project_may_say_what_a_request_is_about(client: Client) -> None:
    with with_requests(partition=f"{__name__}.about"):
        client.get("/view/", headers={**ASKS, "X-About": "it", "X-Partition-Key": "else"})
    assert submitted().payload["concurrency_key"] == "partition:it"


def test_old_requests_go_when_they_have_been_performed(client: Client) -> None:
    from taskkit.models import Run, StoredRequest

    for _ in range(2):
        client.get("/view/", headers=ASKS)
    StoredRequest.objects.update(created_at=timezone.now() - timedelta(days=2))
    first, second = (stored.run for stored in StoredRequest.objects.order_by("run"))
    Run.objects.filter(id=first).update(status="SUCCESSFUL")
    client.get("/view/", headers=ASKS)
    left = set(StoredRequest.objects.values_list("run", flat=True))
    assert first not in left
    assert second in left, "nobody has performed it yet"
    assert len(left) == 2


def test_who_is_no_user_of_the_project_owns_nothing(client: Client) -> None:
    from django.core.exceptions import ImproperlyConfigured

    with (
        with_requests(user=f"{__name__}.somebody"),
        pytest.raises(ImproperlyConfigured, match=r"ASYNC_REQUEST\.user.*Somebody"),
    ):
        Client().get("/view/", headers=ASKS)


class Somebody:
    """Of another kind than the project's users."""

    pk = 1
    is_authenticated = True


def somebody(request: HttpRequest) -> Somebody:
    """Name somebody."""
    return Somebody()


def test_a_user_could_not_pass_for_a_channel() -> None:
    from taskkit.async_request.owners import Unknown, owner_of
    from taskkit.settings import AsyncRequestSettings

    class Strange(Somebody):
        pk = "anon:a-channel-of-nobody"  # type: ignore[assignment]

    request = HttpRequest()
    request.user = Strange()  # type: ignore[assignment]
    with pytest.raises(Unknown, match="anon:"):
        owner_of(request, AsyncRequestSettings())


@pytest.mark.parametrize(
    ("sent", "drop", "kept"),
    [
        ("a=1; sessionid=S; csrftoken=C; b=2", [], "a=1; b=2"),
        ("a=1,sessionid=S; b=2", [], "b=2"),
        ("a=1; mysessionid=x", [], "a=1; mysessionid=x"),
        ("jwt=J; a=1", ["cookie"], None),
        ("sessionid=S", [], None),
    ],
)
def test_cookies_that_log_in_are_not_kept(sent: str, drop: list[str], kept: str | None) -> None:
    from django.test import RequestFactory

    from taskkit.async_request.recording import meta_of

    request = RequestFactory().get("/", headers={"Cookie": sent, "X-CSRFToken": "C"})
    meta = meta_of(request, drop)
    assert meta.get("HTTP_COOKIE") == kept
    assert "HTTP_X_CSRFTOKEN" not in meta
