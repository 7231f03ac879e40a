"""A request that asks to be a task: the view runs in a runner as if it had come there, its answer is the result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.edges.proxies import free_port
from tests.helpers import ROOT, Tree, eventually
from tests.sites import serving

SETTINGS = "tests.background.settings"

#: Seconds for a view to answer.
PATIENCE = 20.0

#: What no database may have.
SECRET = "do-not-keep-me"

CHANNEL = "a-channel-of-nobody-in-particular"

_USERS = """
import django
django.setup()
from django.contrib.auth.models import User
for name in ("ann", "bob"):
    User.objects.create_user(name)
from django.test import Client
for name in ("ann", "bob"):
    client = Client()
    client.force_login(User.objects.get(username=name))
    print(client.cookies["sessionid"].value)
"""


def django(tree: Tree, *command: str) -> str:
    """Run Python with the site's settings; return what it prints."""
    environment = tree.environment() | {"DJANGO_SETTINGS_MODULE": SETTINGS}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, timeout=60, capture_output=True
    ).stdout.decode()


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give a tree of the site's project."""
    tree = Tree(settings=SETTINGS, runners=2)
    try:
        django(tree, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0")
    except BaseException:
        shutil.rmtree(tree.state_dir)
        raise
    with tree:
        yield tree


@pytest.fixture(scope="module")
def sessions(tree: Tree) -> list[str]:
    """Give the session keys of two users."""
    return django(tree, "-c", _USERS).split()


@pytest.fixture(scope="module", params=["wsgi", "asgi"])
def origin(tree: Tree, request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the site's origin, by each of Django's interfaces."""
    port = free_port()
    asgi = ("hypercorn", "tests.background.asgi:application", "--bind", f"127.0.0.1:{port}")
    command = asgi if request.param == "asgi" else None
    with serving(tree, SETTINGS, port, path="/token/", command=command) as url:
        yield url


class Visitor:
    """A client of the site."""

    def __init__(self, tree: Tree, origin: str, session: str) -> None:
        self.tree = tree
        cookies = {"sessionid": session} if session else {}
        self.http = httpx.Client(base_url=origin, cookies=cookies, trust_env=False, timeout=PATIENCE)
        self.csrf = ""

    def ask(self, path: str, method: str = "GET", **options: Any) -> httpx.Response:
        """Ask for a view to run as a task."""
        headers = {"X-Async-Request": "true", "X-CSRFToken": self.csrf, **options.pop("headers", {})}
        return self.http.request(method, path, headers=headers, **options)

    def answered(self, path: str, method: str = "GET", **options: Any) -> dict[str, Any]:
        """Return what a view answered as a task."""
        accepted = self.ask(path, method, **options)
        assert accepted.status_code == 202, accepted.text
        id = accepted.json()["meta"]["async_request_id"]
        assert accepted.json() == {"data": None, "meta": {"async_request_id": id}}
        assert accepted.headers["Location"] == f"/api/v1/async_request_response/{id}/"
        return self.outcome(id, **options)

    def outcome(self, id: str, headers: Any = None, **_: Any) -> dict[str, Any]:
        """Return what became of a request, when it has ended."""

        def look() -> dict[str, Any] | None:
            found = self.http.get(f"/api/v1/async_request_response/{id}/", headers=headers)
            assert found.status_code == 200, found.text
            return None if found.json() == {"status": "not ready"} else dict(found.json())

        found: dict[str, Any] = eventually(look, PATIENCE, f"the outcome of {id}")
        assert found["task_id"] == id
        return found


@contextmanager
def visiting(tree: Tree, origin: str, session: str = "") -> Iterator[Visitor]:
    """Give a client that has the site's CSRF token."""
    visitor = Visitor(tree, origin, session)
    with visitor.http:
        visitor.csrf = visitor.http.get("/token/").text
        yield visitor


@pytest.fixture
def ann(tree: Tree, origin: str, sessions: list[str]) -> Iterator[Visitor]:
    """Give a user who is logged in."""
    with visiting(tree, origin, sessions[0]) as visitor:
        yield visitor


@pytest.fixture
def bob(tree: Tree, origin: str, sessions: list[str]) -> Iterator[Visitor]:
    """Give another user."""
    with visiting(tree, origin, sessions[1]) as visitor:
        yield visitor


@pytest.fixture
def nobody(tree: Tree, origin: str) -> Iterator[Visitor]:
    """Give a visitor who is not logged in."""
    with visiting(tree, origin) as visitor:
        yield visitor


def test_a_view_gets_the_request_as_it_came(ann: Visitor) -> None:
    ann.http.cookies.set("theme", "dark")
    body = b'{"a": 1}'
    found = ann.answered(
        "/told/?q=a%3Fb&x=%C3%A9",
        "PUT",
        content=body,
        headers={"Content-Type": "application/json; charset=utf-8", "X-Own": "mine"},
    )
    assert (found["status"], found["endpoint"]) == (201, "/told/?q=a%3Fb&x=%C3%A9")
    assert ["X-Told", "yes"] in found["headers"]
    assert not [name for name, _ in found["headers"] if name == "Set-Cookie"]
    told = found["response"]
    assert told["pid"] != os.getpid()
    assert (told["method"], told["query"], told["user"]) == ("PUT", {"q": "a?b", "x": "é"}, "ann")
    assert (told["body"], told["type"]) == (hashlib.sha256(body).hexdigest(), "application/json")
    assert told["headers"]["X-Own"] == "mine"
    assert told["cookies"] == {"theme": "dark"}
    assert told["host"] == str(ann.http.base_url.netloc, "ascii")
    assert not [name for name in told["headers"] if name.startswith("X-Async")]


@pytest.mark.parametrize("header", ["X-Async-Request", "X-Async-Background"])
def test_either_header_asks_for_it_unless_it_says_no(ann: Visitor, header: str) -> None:
    ours = {"X-Async-Request": "false"} if header != "X-Async-Request" else {}
    assert ann.http.get("/told/", headers={header: "1"}).status_code == 202
    for no in ("false", "0", ""):
        assert ann.http.get("/told/", headers={**ours, header: no}).status_code == 201


def test_an_upload_of_five_megabytes_arrives_whole(ann: Visitor) -> None:
    data = os.urandom(5 * 1024 * 1024)
    found = ann.answered(
        "/told/", "POST", files={"file": ("a.bin", data)}, data={"csrfmiddlewaretoken": ann.csrf, "b": "c"}
    )
    assert found["response"]["files"] == {"file": hashlib.sha256(data).hexdigest()}
    assert found["response"]["form"]["b"] == "c"


def test_what_the_body_may_have_is_bounded(ann: Visitor) -> None:
    answer = ann.ask("/exempt/", "POST", content=b"x" * (32 * 1024 * 1024 + 1))
    assert answer.status_code == 413
    assert "ASYNC_REQUEST.body_bytes" in answer.json()["detail"]


@pytest.mark.parametrize("content", [b"hello", b"\xff\xfe\x00", b""])
def test_a_body_need_not_be_json(ann: Visitor, content: bytes) -> None:
    found = ann.answered("/exempt/", "POST", content=content)
    assert found["response"]["body"] == hashlib.sha256(content).hexdigest()


def test_csrf_is_checked_where_the_request_comes_in(ann: Visitor) -> None:
    refused = ann.http.post("/told/", headers={"X-Async-Request": "true"}, data={"a": "b"})
    assert refused.status_code == 403
    assert ann.answered("/told/", "POST", data={"a": "b"})["response"]["form"] == {"a": "b"}


def test_asynchronous_views_know_the_user_as_well(ann: Visitor) -> None:
    assert ann.answered("/awaited/")["response"]["user"] == "ann"


@pytest.mark.parametrize(("view", "count"), [("five", 10), ("five_awaited", 5)])
def test_chunks_are_events_and_the_body_is_kept(ann: Visitor, view: str, count: int) -> None:
    found = ann.answered(f"/{view}/")
    said = [
        event["data"]["text"] for event in events_of(ann.tree, found["task_id"]) if event["type"] == "chunk"
    ]
    assert "".join(said) == found["response"]
    assert len(said) == count
    expected = [f"chunk {n}" for n in range(5)]
    assert found["response"].replace("é", "\n").split("\n")[:5] == [
        f"{text}{' ' * (count == 10)}" for text in expected
    ]


def events_of(tree: Tree, run: str) -> list[dict[str, Any]]:
    """Return the events of a run as pages have them."""
    page = tree.http.get(f"/api/v1/runs/{run}/events", headers={"Accept": "application/json"})
    return list(page.json()["events"])


def test_a_large_answer_is_cut(ann: Visitor) -> None:
    found = ann.answered("/large/")
    assert (found["response"], found["truncated"]) == ("x" * 100_000, True)


def test_bytes_that_are_no_text_come_whole(ann: Visitor) -> None:
    found = ann.answered("/binary/")
    assert (found["response"], found["encoding"]) == ("/wD+", "base64")


@pytest.mark.parametrize(("path", "status"), [("/forbidden/", 403), ("/nowhere/", 404)])
def test_what_a_view_refuses_is_its_answer(ann: Visitor, path: str, status: int) -> None:
    if status == 404:  # there is no view that could run
        assert ann.ask(path).status_code == 404
    else:
        assert ann.answered(path)["status"] == status


@pytest.mark.parametrize("view", ["boom", "late", "leaving"])
def test_what_a_view_raises_stays_with_the_site(ann: Visitor, view: str) -> None:
    found = ann.answered(f"/{view}/")
    assert (found["status"], found["response"]) == (500, {"error": "Internal server error"})
    snapshot = ann.tree.http.get(f"/api/v1/runs/{found['task_id']}").json()
    assert snapshot["status"] == "FAILED"
    assert "secret=42" not in str(snapshot["error"])
    full = ann.http.get(f"/api/v1/async_request_response/{found['task_id']}/?full_response=true").json()
    assert (full["status"], full["response"]["status"]) == ("failed", 500)


def test_progress_is_told_while_it_works(ann: Visitor) -> None:
    found = ann.answered("/working/")
    assert found["response"] == "done"
    assert ann.tree.http.get(f"/api/v1/runs/{found['task_id']}").json()["progress"]["done"] == 3


@pytest.mark.parametrize("view", ["only", "only-awaited", "within"])
def test_a_view_may_be_for_tasks_only_and_nobody_can_pretend(ann: Visitor, view: str) -> None:
    forged = {"X-Async-Request-Internal": "true", "Bulkhead.Request": "1", "bulkhead-request": "1"}
    for headers in ({}, forged):
        refused = ann.http.get(f"/{view}/", headers=headers)
        assert refused.status_code == 409
        assert refused.json() == {"detail": "This endpoint is available only via async request."}
    assert ann.answered(f"/{view}/")["response"] == "as a task"


def test_a_request_is_somebodys_and_its_result_is_his(ann: Visitor, bob: Visitor, nobody: Visitor) -> None:
    id = ann.answered("/told/")["task_id"]
    for route in ("async_request_response", "async_background_response"):
        path = f"/api/v1/{route}/{id}/"
        assert ann.http.get(path).status_code == 200
        assert bob.http.get(path).status_code == 403
        assert nobody.http.get(path).status_code == 401
        assert nobody.http.get(path, headers={"X-Async-Request": CHANNEL}).status_code == 403
    unknown = "/api/v1/async_request_response/01900000-0000-7000-8000-000000000000/"
    assert ann.http.get(unknown).status_code == 404
    assert nobody.ask("/told/").status_code == 401


def test_clients_without_credentials_have_channels_of_their_own(
    ann: Visitor, nobody: Visitor, tree: Tree
) -> None:
    headers = {"X-Async-Request": CHANNEL}
    found = nobody.answered("/told/", headers=headers)
    assert found["response"]["user"] == ""
    id = found["task_id"]
    full = nobody.http.get(f"/api/v1/async_request_response/{id}/?full_response=1", headers=headers).json()
    assert (full["status"], full["channel_name"]) == ("completed", f"anon:{CHANNEL}")
    assert nobody.ask("/told/", headers={"X-Async-Request": "too short"}).status_code == 401
    # A user's channel follows from who he is, whatever he says.
    assert ann.answered("/told/", headers=headers)["response"]["user"] == "ann"
    with httpx.Client(base_url=tree.url, trust_env=False) as gateway:
        for token, status in ((CHANNEL, 200), (CHANNEL[::-1], 403), ("short", 401)):
            answer = gateway.get(
                f"/api/v1/async_background_response/{id}/", headers={"Authorization": f"Bearer {token}"}
            )
            assert answer.status_code == status, token
        assert gateway.get("/api/v1/runs", headers={"Authorization": f"Bearer {CHANNEL}"}).json()["runs"]
        submitted = gateway.post(
            "/api/v1/runs", json={"task": "proj.echo"}, headers={"Authorization": f"Bearer {CHANNEL}"}
        )
        assert submitted.status_code == 403


def test_the_project_may_say_who_a_user_is(nobody: Visitor) -> None:
    headers = {"X-Api-Key": "ann"}
    found = nobody.answered("/told/", headers=headers)
    assert found["response"]["user"] == "ann"
    assert "X-Api-Key" not in found["response"]["headers"]


def test_the_gateway_answers_in_the_same_words(ann: Visitor, tree: Tree) -> None:
    id = ann.answered("/told/?a=b")["task_id"]
    site = ann.http.get(f"/api/v1/async_background_response/{id}/").json()
    for route in ("async_background_response", "async_request_response"):
        assert tree.http.get(f"/api/v1/{route}/{id}/").json() == site
    failed = ann.answered("/boom/")
    assert tree.http.get(f"/api/v1/async_request_response/{failed['task_id']}/").json() == failed


def test_no_credential_is_kept(ann: Visitor, tree: Tree, sessions: list[str]) -> None:
    ann.answered(
        "/told/",
        headers={"Authorization": f"Bearer {SECRET}", "Proxy-Authorization": SECRET, "X-Api-Key": SECRET},
    )
    kept = [path for path in tree.state_dir.rglob("*") if path.is_file() and path.suffix != ".log"]
    assert any("store" in path.name for path in kept)
    for path in (*kept, *tree.database.parent.glob(f"{tree.database.name}*")):
        data = path.read_bytes()
        assert SECRET.encode() not in data, path
        if not path.name.startswith(tree.database.name):  # Django's own table of sessions is there
            assert not [key for key in sessions if key.encode() in data], path


def test_a_request_that_was_answered_is_not_performed_again(ann: Visitor, tree: Tree) -> None:
    id = ann.answered("/told/")["task_id"]
    again = tree.http.post(f"/api/v1/runs/{id}/replay").json()["id"]
    snapshot = tree.wait(again, PATIENCE)
    assert snapshot["status"] == "FAILED"
    assert snapshot["error"]["exception"].endswith("RequestGone")
    failed = ann.answered("/boom/")["task_id"]
    again = tree.http.post(f"/api/v1/runs/{failed}/replay").json()["id"]
    assert tree.wait(again, PATIENCE)["error"]["exception"].endswith("ViewFailed"), (
        "it could be performed again"
    )


_ROWS = """
import django, json
django.setup()
from tests.project.models import Row
if {create}:
    print(json.dumps([Row.objects.create(message="m").pk for _ in range(4)]))
else:
    print(json.dumps(dict(Row.objects.values_list("pk", "final_value"))))
"""


def test_requests_about_one_object_are_performed_in_their_order(ann: Visitor, tree: Tree) -> None:
    rows = json.loads(django(tree, "-c", _ROWS.format(create=True)))
    asked = []
    for value in range(6):
        for row in rows:
            body = {"data": {"id": row, "value": value}}
            asked.append(ann.ask("/patch/", "PATCH", json=body).json()["meta"]["async_request_id"])
    for id in asked:
        assert ann.outcome(id)["response"] == "noted"
    noted = json.loads(django(tree, "-c", _ROWS.format(create=False)))
    assert [noted[str(row)] for row in rows] == [list(range(6))] * len(rows)
