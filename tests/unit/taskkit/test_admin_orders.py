"""Cancel, replay, release from the admin: who may, what the gateway is asked for, what people are told."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.test import Client, override_settings

from taskkit import calls, tokens
from tests.unit.taskkit.site import site

if TYPE_CHECKING:
    from taskkit.models import Run

pytestmark = pytest.mark.usefixtures("django_project")

LIST = "/admin/taskkit/run/"
MADE = "0190b5a0-0000-7000-8000-000000000001"
ORDERS = ("cancel", "replay", "release")


@dataclass
class Gateway:
    """Answers every request with `answer`, and keeps what it was asked."""

    answer: tuple[int, dict[str, Any]] = (202, {"id": MADE, "status": "READY"})
    asked: list[tuple[str, tokens.Claims, str]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    return tokens.load_or_create_key(tmp_path / "key")


@pytest.fixture
def gateway(key: bytes) -> Iterator[Gateway]:
    made = Gateway()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers["Authorization"].removeprefix("Bearer ")
            made.asked.append((self.path, tokens.verify(key, token), self.headers.get("Idempotency-Key", "")))
            status, document = made.answer
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header(
                "Content-Type", "application/json" if status < 400 else "application/problem+json"
            )
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _site(django_project: Any, tmp_path: Path, gateway: Gateway) -> Iterator[None]:
    from taskkit.client import close_clients

    with site(KEY_FILE=str(tmp_path / "key"), URL=gateway.url):
        yield
    close_clients()


def user(*permissions: str) -> Client:
    """Return the client of a member of the staff with these permissions; `root` is a superuser's."""
    from django.contrib.auth.models import Permission, User

    client = Client()
    if permissions == ("root",):
        client.force_login(User.objects.create_superuser("root"))
        return client
    member = User.objects.create_user("-".join(permissions) or "nobody", is_staff=True)
    found = Permission.objects.filter(codename__in=permissions, content_type__app_label="taskkit")
    assert found.count() == len(permissions)
    member.user_permissions.set(found)
    client.force_login(member)
    return client


@pytest.fixture
def run() -> Run:
    """Give a run in quarantine: of all orders the gateway alone would refuse it `cancel`."""
    return made(1)[0]


def made(count: int) -> list[Run]:
    from taskkit.models import Run
    from taskkit.outbox import submit

    runs = [submit("proj.echo", kwargs={"value": n}).run() for n in range(count)]
    Run.objects.update(
        status="FAILED", error={"code": "quarantined", "message": "killed three", "traceback": "tb"}
    )
    return list(Run.objects.filter(pk__in=[run.pk for run in runs]))


def page(run: Run) -> str:
    return f"{LIST}{run.pk}/change/"


def said(client: Client, url: str) -> str:
    """Return the messages that the next page shows, as text."""
    html = client.get(url).content.decode()
    found = re.search(r'<ul class="messagelist">(.*?)</ul>', html, re.DOTALL)
    return re.sub(r"<[^>]*>", "", found[1]).strip() if found else ""


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_sent_with_a_token_for_just_that(order: str, run: Run, gateway: Gateway) -> None:
    client = user("view_run", f"{order}_run")
    answer = client.post(f"{LIST}{run.pk}/{order}/", {"key": "k"})
    assert (answer.status_code, answer["Location"]) == (302, page(run))
    [(path, claims, key)] = gateway.asked
    assert path == f"/api/v1/runs/{run.pk}/{'cancel' if order == 'cancel' else 'replay'}"
    assert claims.runs == frozenset({str(run.pk)})
    assert claims.actions == {"read", "cancel" if order == "cancel" else "submit"}
    assert claims.tasks == ("proj.echo",)
    assert claims.subject == client.session["_auth_user_id"]
    assert 0 < claims.expires_at - claims.issued_at <= 60
    assert key == {"cancel": "", "replay": f"admin-{run.pk}-k", "release": f"release-{run.pk}"}[order]
    text = said(client, page(run))
    assert str(run.pk) in text
    assert (MADE in text) is (order != "cancel")


def test_what_was_done_is_in_the_history(run: Run) -> None:
    client = user("root")
    client.post(f"{LIST}{run.pk}/replay/")
    assert f"Replay {MADE}" in client.get(f"{LIST}{run.pk}/history/").content.decode()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("target", ["run", "nothing"])
def test_without_the_permission_nothing_is_sent_nor_told(
    order: str, target: str, run: Run, gateway: Gateway
) -> None:
    others = [f"{other}_run" for other in ORDERS if other != order]
    client = user("view_run", *others)
    assert client.post(f"{LIST}{run.pk if target == 'run' else MADE}/{order}/").status_code == 403
    data = {"action": f"{order}_runs", "_selected_action": [run.pk], "index": "0"}
    assert f"{order}_runs" not in client.get(LIST).content.decode()
    client.post(LIST, data)
    client.post(LIST, data | {"select_across": "1"})
    assert gateway.asked == []


def test_an_order_needs_sight_of_the_run(run: Run, gateway: Gateway) -> None:
    client = user("cancel_run")
    assert client.post(f"{LIST}{run.pk}/cancel/").status_code == 403
    assert client.post(LIST, {"action": "cancel_runs", "_selected_action": [run.pk]}).status_code == 403
    assert gateway.asked == []


def test_strangers_are_sent_to_log_in(run: Run, gateway: Gateway) -> None:
    answer = Client().post(f"{LIST}{run.pk}/cancel/")
    assert answer.status_code == 302
    assert "/admin/login/" in answer["Location"]
    assert gateway.asked == []


def test_an_order_is_a_post_with_a_csrf_token(run: Run, gateway: Gateway) -> None:
    client = user("root")
    assert client.get(f"{LIST}{run.pk}/cancel/").status_code == 405
    client.handler.enforce_csrf_checks = True
    assert client.post(f"{LIST}{run.pk}/cancel/").status_code == 403
    assert gateway.asked == []


@pytest.mark.parametrize("id", [MADE, "nonsense"])
def test_of_a_run_that_is_not_there_people_are_told(id: str, gateway: Gateway) -> None:
    client = user("root")
    assert client.post(f"{LIST}{id}/cancel/")["Location"] == "/admin/"
    assert "exist. Perhaps it was deleted?" in said(client, "/admin/")
    assert gateway.asked == []


@pytest.mark.parametrize("order", ORDERS)
def test_the_list_sends_one_request_for_each(order: str, gateway: Gateway) -> None:
    runs = made(3)
    client = user("view_run", f"{order}_run")
    data = {"action": f"{order}_runs", "_selected_action": [str(run.pk) for run in runs[:2]]}
    assert client.post(LIST, data).status_code == 302
    assert len(gateway.asked) == 2
    text = said(client, LIST)
    assert [str(run.pk) in text for run in runs] == [True, True, False]


def test_the_list_takes_so_many_at_most(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit import admin_orders

    monkeypatch.setattr(admin_orders, "MOST", 2)
    client = user("root")
    client.post(LIST, {"action": "cancel_runs", "_selected_action": [str(run.pk) for run in made(3)]})
    assert said(client, LIST) == "Select at most 2 runs."
    assert gateway.asked == []


def test_a_refusal_is_told_and_the_next_run_has_its_turn(gateway: Gateway) -> None:
    gateway.answer = (
        409,
        {"type": "urn:bulkhead:problem:run-finished", "status": 409, "detail": "has ended"},
    )
    client = user("root")
    runs = made(2)
    client.post(LIST, {"action": "cancel_runs", "_selected_action": [str(run.pk) for run in runs]})
    assert len(gateway.asked) == 2
    assert said(client, LIST).count("has ended") == 2


def test_an_absent_gateway_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PATIENCE", 0.0)
    client = user("root")
    data = {"action": "cancel_runs", "_selected_action": [str(run.pk) for run in made(2)]}
    from django.conf import settings

    with override_settings(TASKKIT={**settings.TASKKIT, "URL": "http://127.0.0.1:1"}):
        client.post(LIST, data)
        text = said(client, LIST)
    assert text.count("no answer from the gateway at http://127.0.0.1:1") == 1
    assert "is it running?" in text


def test_an_absent_key_is_told(run: Run) -> None:
    client = user("root")
    with override_settings(TASKKIT={"KEY_FILE": "/nowhere/key"}):
        client.post(f"{LIST}{run.pk}/cancel/")
        assert "/nowhere/key" in said(client, page(run))
        html = client.get(page(run)).content.decode()
    assert "Not live. Load the page anew. KEY_FILE" in html


def test_only_what_is_in_quarantine_is_released(gateway: Gateway) -> None:
    from taskkit.models import Run

    (run,) = made(1)
    Run.objects.update(error={"code": "raised", "message": "no"})
    client = user("root")
    client.post(f"{LIST}{run.pk}/release/")
    assert "not in quarantine" in said(client, page(run))
    assert gateway.asked == []


def test_buttons_are_those_that_the_user_may_press(run: Run) -> None:
    from taskkit.models import Run

    def buttons(client: Client) -> list[str]:
        return re.findall(r"<button>(.*?)</button>", client.get(page(run)).content.decode())

    client = user("root")
    assert buttons(client) == ["Cancel", "Release"]
    assert buttons(user("view_run")) == []
    assert buttons(user("view_run", "replay_run")) == []
    Run.objects.update(error={"code": "raised", "message": "no"})
    assert buttons(client) == ["Cancel", "Run again"], "the page's style hides what does not fit the state"


def test_the_page_shows_the_run_with_a_ticket_that_reads_it(run: Run, key: bytes) -> None:
    html = user("view_run").get(page(run)).content.decode()
    (ticket,) = re.findall('data-ticket="([^"]*)"', html)
    claims = tokens.read_ticket(key, ticket).claims
    assert claims.actions == {"read", "logs"}
    assert claims.runs == frozenset({str(run.pk)})
    assert claims.tasks == ()
    assert "quarantined: killed three\n\ntb" in html
    assert "value=0" in html
    assert "Show its outcome" not in html, "it is there"


def test_nothing_can_be_edited(run: Run) -> None:
    client = user("root")
    assert client.post(page(run), {"status": "SUCCESSFUL"}).status_code == 403
    assert client.post(f"{LIST}{run.pk}/delete/", {"post": "yes"}).status_code == 403
    assert client.get(f"{LIST}add/").status_code == 403
    assert "delete_selected" not in client.get(LIST).content.decode()


def test_a_list_takes_as_many_queries_for_many_runs_as_for_one() -> None:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    client = user("root")

    def queries(url: str) -> list[str]:
        with CaptureQueriesContext(connection) as found:
            assert client.get(url).status_code == 200
        return [query["sql"] for query in found.captured_queries]

    for url in (LIST, "/admin/taskkit/outbox/", "/admin/taskkit/node/"):
        made(1)
        queries(url)  # what is cached once
        few = queries(url)
        made(30)
        many = queries(url)
        assert len(many) == len(few)
    assert not any('"taskkit_run"."result"' in sql for sql in queries(LIST))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", 4),
        ("?open=yes", 1),
        ("?open=no", 3),
        ("?status__exact=FAILED", 3),
        ("?task=proj.echo", 3),
        ("?task=gone.task", 0),
        ("?age=hour", 3),
        ("?age=week", 4),
        ("?age=nonsense&open=nonsense", 4),
        ("?age=hour&task=proj.echo&open=no", 2),
    ],
)
def test_filters(query: str, found: int) -> None:
    import time
    import uuid

    from taskkit.models import Run
    from taskkit.outbox import submit

    first, *_ = made(3)
    old = uuid.UUID(int=(int((time.time() - 2 * 86_400) * 1000) << 80) | 7)
    Run.objects.filter(pk=first.pk).update(id=old)
    submit("proj.add", kwargs={"a": 1, "b": 2})
    html = user("root").get(LIST + query).content.decode()
    assert len(re.findall(r'class="action-select"', html)) == found
