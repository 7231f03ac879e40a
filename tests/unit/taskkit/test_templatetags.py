"""`{% stream %}` puts a run on a page, with a ticket for this run alone; `{% stream_ticket %}` gives the ticket."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.template import Context, Template
from django.test import RequestFactory, override_settings

from taskkit import tokens
from taskkit.errors import SettingsError
from tests.unit.taskkit.site import site

pytestmark = pytest.mark.usefixtures("django_project")

ID = "0190b5a0-0000-7000-8000-000000000001"


@pytest.fixture
def key(tmp_path: Path) -> bytes:
    return tokens.load_or_create_key(tmp_path / "key")


@pytest.fixture(autouse=True)
def _site(django_project: Any, tmp_path: Path, key: bytes) -> Iterator[None]:
    with site(KEY_FILE=str(tmp_path / "key"), URL="https://tasks.example.com/deep/"):
        yield


def rendered(source: str, **context: Any) -> str:
    return Template("{% load bulkhead %}" + source).render(Context(context))


def attribute(html: str, name: str) -> str:
    (value,) = re.findall(rf'data-{name}="([^"]*)"', html)
    return str(value)


def visible(html: str) -> list[str]:
    return re.findall(r'data-when="(\w+)">', html)


@pytest.mark.parametrize("kind", ["id", "uuid", "handle", "run"])
def test_a_run_is_named_in_any_way(key: bytes, kind: str) -> None:
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    run = {"id": handle.id, "uuid": uuid.UUID(handle.id), "handle": handle, "run": handle.run()}[kind]
    html = rendered("{% stream run %}", run=run)
    assert attribute(html, "run") == handle.id
    url = f"https://tasks.example.com/deep/api/v1/runs/{handle.id}/events"
    assert attribute(html, "url") == url == handle.stream_url == handle.run().stream_url
    ticket = tokens.read_ticket(key, attribute(html, "ticket"))
    assert (ticket.claims.actions, ticket.claims.runs) == (frozenset({"read"}), frozenset({handle.id}))
    assert "data-log" not in html
    assert visible(html) == ["READY"]


def test_the_ticket_reads_output_only_where_it_is_shown(key: bytes) -> None:
    html = rendered("{% stream run log=True %}", run=ID)
    assert " data-log>" in html
    claims = tokens.read_ticket(key, attribute(html, "ticket")).claims
    assert claims.actions == frozenset({"read", "logs"})


def test_the_ticket_is_that_of_whoever_looks_on(key: bytes) -> None:
    from django.contrib.auth.models import AnonymousUser, User

    request = RequestFactory().get("/")
    for user, subject in ((AnonymousUser(), ""), (User.objects.create_user("ann"), "1")):
        request.user = user
        text = rendered("{% stream_ticket run %}", run=ID, request=request)
        claims = tokens.read_ticket(key, text).claims
        assert (claims.subject, claims.runs, claims.tasks) == (subject, frozenset({ID}), ())


def test_script_and_style_are_there_once_per_page() -> None:
    html = rendered("{% stream a %}{% for run in more %}{% stream run %}{% endfor %}", a=ID, more=[ID, ID])
    assert html.count("<bulkhead-stream") == 3
    assert html.count("/static/taskkit/stream.js") == html.count("/static/taskkit/stream.css") == 1
    again = rendered("{% stream a %}", a=ID)
    assert again.count("<script") == 1, "the next page has them as well"


def test_each_has_a_ticket_of_its_own() -> None:
    html = rendered("{% stream a %}{% stream a %}", a=ID)
    assert len(set(re.findall('data-ticket="([^"]*)"', html))) == 2


def test_without_a_run_there_is_nothing() -> None:
    assert rendered("{% stream nothing %}{% stream run %}", run=None).strip() == ""


@pytest.mark.parametrize("run", ["nonsense", 7, object()])
def test_what_is_no_run_raises(run: Any) -> None:
    for source in ("{% stream run %}", "{% stream_ticket run %}"):
        with pytest.raises(ValueError, match="is no run"):
            rendered(source, run=run)


def test_a_finished_run_is_shown_as_the_site_knows_it() -> None:
    from taskkit.outbox import submit

    run = submit("proj.echo").run()
    run.status, run.result = "SUCCESSFUL", {"rows": "<b>"}
    html = rendered("{% stream run %}", run=run)
    assert visible(html) == ["SUCCESSFUL"]
    assert "&quot;rows&quot;: &quot;&lt;b&gt;&quot;" in html
    assert 'aria-label="Run of proj.echo"' in html
    run.status, run.error = "FAILED", {"code": "raised", "message": "no <luck>"}
    html = rendered("{% stream run %}", run=run)
    assert visible(html) == ["FAILED"]
    assert "no &lt;luck&gt;" in html
    assert "rows" not in html


@pytest.mark.parametrize(
    ("taskkit", "reason"),
    [({"KEY_FILE": "/nowhere/key"}, "/nowhere/key"), ({"UDS": "/run/bulkhead.sock"}, "set URL")],
)
def test_a_page_stands_without_a_tree(taskkit: dict[str, str], reason: str) -> None:
    with override_settings(TASKKIT=taskkit, DEBUG=False):
        html = rendered("{% stream run %}", run=ID)
        assert visible(html) == ["READY", "refused"]
        assert "ticket" not in html
        assert reason not in html, "visitors need not know"
        with override_settings(DEBUG=True):
            assert reason in rendered("{% stream run %}", run=ID)


def test_a_ticket_that_cannot_be_made_raises() -> None:
    with override_settings(TASKKIT={"KEY_FILE": "/nowhere/key"}), pytest.raises(SettingsError):
        rendered("{% stream_ticket run %}", run=ID)


def test_the_url_follows_the_settings() -> None:
    from taskkit import conf

    with override_settings(TASKKIT={"BIND": "[::1]:9999"}):
        assert conf.stream_url(ID) == f"http://[::1]:9999/api/v1/runs/{ID}/events"
    with override_settings(TASKKIT={"UDS": "/run/b.sock"}), pytest.raises(SettingsError, match="UDS"):
        conf.stream_url(ID)


def test_this_process_reaches_the_gateway_by_its_socket_or_as_browsers_do(tmp_path: Path) -> None:
    from taskkit import conf

    for taskkit, address in (
        ({}, "http://127.0.0.1:8888"),
        ({"URL": "https://a.example/b/"}, "https://a.example/b"),
        ({"UDS": "/nowhere.sock"}, "unix:/nowhere.sock"),
        ({"UDS": "/nowhere.sock", "URL": "http://a.example"}, "http://a.example"),
        ({"UDS": str(tmp_path), "URL": "http://a.example"}, f"unix:{tmp_path}"),
    ):
        with override_settings(TASKKIT=taskkit):
            assert conf.gateway_address() == address
