"""What visitors of a Django site see, in a real browser: `{% stream run %}` to its end, the admin's page of a run.

BULKHEAD_PICTURES=1 makes the README's pictures anew.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.chromium import chromium
from tests.edges.proxies import free_port
from tests.helpers import ROOT, Tree, eventually
from tests.proxy import Proxy
from tests.sites import serving

PICTURES = ROOT / "deploy" / "pictures"

SETTINGS = "tests.site.settings"

#: Milliseconds for what a page shows sooner or later.
PATIENCE = 15_000

_USERS = """
import django
django.setup()
from django.contrib.auth.models import Permission, User
User.objects.create_superuser("root", password="root")
looker = User.objects.create_user("looker", password="looker", is_staff=True)
looker.user_permissions.add(Permission.objects.get(codename="view_run"))
"""


def django(tree: Tree, *command: str) -> None:
    """Run Python with the site's settings."""
    environment = tree.environment() | {"DJANGO_SETTINGS_MODULE": SETTINGS}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, timeout=60)


@pytest.fixture(scope="module")
def port() -> int:
    """Give the port of the site."""
    return free_port()


@pytest.fixture(scope="module")
def tree(port: int) -> Iterator[Tree]:
    """Give a tree whose gateway lets the site's pages in; `root` and `looker` are users of the site."""
    origins = json.dumps([f"http://{host}:{port}" for host in ("127.0.0.1", "localhost")])
    tree = Tree(settings=SETTINGS, runners=4, env={"TASKKIT_CORS_ORIGINS": origins})
    try:
        django(tree, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0")
        django(tree, "-c", _USERS)
    except BaseException:
        shutil.rmtree(tree.state_dir)
        raise
    with tree:
        yield tree


@pytest.fixture(scope="module")
def site(tree: Tree, port: int) -> Iterator[str]:
    """Give the origin of the site."""
    with serving(tree, SETTINGS, port, path="/admin/login/") as origin:
        yield origin


@pytest.fixture(scope="module")
def browser(tree: Tree, site: str) -> Iterator[Browser]:
    """Give a Chromium without a window."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Give a profile of its own."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """Give a tab."""
    return context.new_page()


def shown(page: Page) -> Locator:
    """Return the element of `{% stream %}`."""
    return page.locator("bulkhead-stream")


def says(page: Page, status: str) -> None:
    """Wait until the page shows a state, in words as well."""
    expect(shown(page)).to_have_attribute("data-status", status, timeout=PATIENCE)
    expect(page.locator("[data-when]:visible")).to_have_attribute("data-when", status, timeout=PATIENCE)


def value(page: Page) -> float:
    """Return how far the bar is, from 0 to 1; -1 when it does not know."""
    return float(page.locator("progress").evaluate("bar => bar.position"))


def picture(where: Page | Locator, name: str) -> None:
    """Keep what is seen, when asked for."""
    if os.environ.get("BULKHEAD_PICTURES"):
        PICTURES.mkdir(exist_ok=True)
        where.screenshot(path=PICTURES / name)


def log_in(page: Page, site: str, user: str = "root") -> None:
    """Log in to the admin."""
    page.goto(f"{site}/admin/login/?next=/admin/")
    page.fill("#id_username", user)
    page.fill("#id_password", user)
    page.click("[type=submit]")
    page.wait_for_url(f"{site}/admin/")


def run_page(page: Page, site: str, tree: Tree, run: str) -> None:
    """Open the admin's page of a run, once Django has been told of it."""
    eventually(lambda: _status_of(tree, run), 10, f"{run} in Django's database")
    page.goto(f"{site}/admin/taskkit/run/{run}/change/")


def _status_of(tree: Tree, run: str) -> str:
    with closing(sqlite3.connect(f"file:{tree.database}?mode=ro", uri=True, timeout=5)) as connection:
        (row,) = connection.execute(
            "SELECT status FROM taskkit_run WHERE id = ?", [run.replace("-", "")]
        ).fetchall() or [("",)]
    return str(row[0])


def told(tree: Tree, run: str, status: str) -> None:
    """Wait until Django knows that a run has this state."""
    eventually(lambda: _status_of(tree, run) == status, 10, f"{status} of {run} in Django's database")


# -- a page of the site


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_shows_progress_to_the_end(page: Page, site: str, tree: Tree, host: str) -> None:
    run = tree.submit("proj.telling", n=40, delay=0.1)["id"]
    page.goto(f"{site.replace('127.0.0.1', host)}/runs/{run}/?log")
    says(page, "RUNNING")
    page.wait_for_function("document.querySelector('progress').position > 0.2")
    picture(shown(page), "stream.png")
    first = value(page)
    page.wait_for_function("first => document.querySelector('progress').position > first", arg=first)
    says(page, "SUCCESSFUL")
    assert value(page) == 1
    expect(page.locator("[data-part=message]")).to_have_text("40 / 40 · part 40")
    lines = page.locator("[data-part=lines]")
    expect(lines).to_contain_text('part{"number":40}')
    expect(lines).to_contain_text("printed 40")
    expect(page.locator("[data-part=result]")).to_have_text(re.compile('"parts": 40'))


def test_a_page_of_a_finished_run_shows_its_outcome(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.count", n=300)["id"]
    tree.wait(run)
    page.goto(f"{site}/runs/{run}/")
    says(page, "SUCCESSFUL")
    expect(page.locator("[data-part=result]")).to_have_text("300")
    lines = page.locator("[data-part=lines] > div")
    expect(lines.last).to_have_text('progress{"step":300,"total":300}')
    assert lines.count() <= 101, "a page begins with the newest, not with all"


def test_a_run_that_fails_says_why_and_markup_is_text(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.boom", message="<img src=x onerror='document.title=1'>no luck")["id"]
    page.goto(f"{site}/runs/{run}/")
    says(page, "FAILED")
    expect(page.locator("[data-part=error]")).to_contain_text("no luck")
    expect(page.locator("[data-part=error]")).to_contain_text("<img src=x")
    assert page.title() == "A run"


def test_a_gateway_that_dies_is_not_noticed(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.telling", n=40, delay=0.1)["id"]
    page.goto(f"{site}/runs/{run}/")
    page.wait_for_function("document.querySelector('progress').position > 0.1")
    tree.kill("gateway")
    says(page, "SUCCESSFUL")
    told = [
        text for text in page.locator("[data-part=lines] > div").all_inner_texts() if text.startswith("part")
    ]
    assert [json.loads(text[4:])["number"] for text in told] == list(range(1, 41))


def test_a_page_that_was_kept_gets_another_ticket(context: BrowserContext, site: str, tree: Tree) -> None:
    run = tree.submit("proj.count", n=3)["id"]
    tree.wait(run)
    for _ in range(2):
        page = context.new_page()
        page.goto(f"{site}/kept/{run}/")
        says(page, "SUCCESSFUL")
        page.close()
        context.clear_cookies()


def test_a_page_in_front_of_its_run_waits_for_it(page: Page, site: str, tree: Tree) -> None:
    """As behind `submit` while no tree runs: the run is in the outbox, the gateway does not know it."""
    from taskkit.identifiers import new_run_id

    run = new_run_id()
    page.goto(f"{site}/runs/{run}/")
    page.wait_for_timeout(300)
    says(page, "READY")
    assert tree.http.post(
        "/api/v1/runs", json={"id": run, "task": "proj.echo", "kwargs": {"value": 7}}
    ).is_success
    says(page, "SUCCESSFUL")
    expect(page.locator("[data-part=result]")).to_have_text("7")


def test_a_site_that_the_gateway_does_not_let_in_is_told(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.echo", value=1)["id"]
    with Proxy(site) as elsewhere:  # another port is another origin
        page.goto(f"{elsewhere.url}/runs/{run}/")
        expect(page.locator("[data-when=shut]")).to_be_visible(timeout=PATIENCE)


def test_a_page_under_a_content_security_policy(page: Page, site: str, tree: Tree) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    run = tree.submit("proj.telling", n=20, delay=0.05)["id"]
    page.goto(f"{site}/runs/{run}/?log&csp")
    says(page, "SUCCESSFUL")
    assert value(page) == 1
    assert not [text for text in complaints if "Content Security Policy" in text or "Refused" in text]


# -- the admin


def test_the_admin_shows_a_run_live_and_cancels_it(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.telling", n=600, delay=0.05)["id"]
    told(tree, run, "RUNNING")
    log_in(page, site)
    page.goto(f"{site}/admin/taskkit/run/")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.get_by_role("link", name=run).click()
    says(page, "RUNNING")
    page.wait_for_function("document.querySelector('progress').position > 0.1")
    lines = page.locator("[data-part=lines]")
    expect(lines).to_contain_text("printed 60")
    scrolled = "list => list.scrollTop > 0 && list.scrollHeight - list.scrollTop - list.clientHeight < 8"
    assert lines.evaluate(scrolled), "the newest line is in sight"
    picture(page, "admin.png")
    lines.evaluate("list => list.scrollTop = 0")
    before = value(page)
    page.wait_for_function("before => document.querySelector('progress').position > before", arg=before)
    assert lines.evaluate("list => list.scrollTop") == 0, "who has scrolled back is left alone"
    asked = [url.partition("?")[0].rpartition("/")[2] for url in requests if url.startswith(tree.url)]
    assert asked == [run, "tasks.js", "events"], "how it stands, then one stream: no polling"
    expect(page.get_by_role("button", name="Run again")).to_be_hidden()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".messagelist")).to_contain_text("was asked to stop")
    says(page, "CANCELLED")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    assert tree.wait(run)["status"] == "CANCELLED"


def go_on(tree: Tree, run: str) -> None:
    """Tell a run that asks to go on."""
    assert tree.http.post(f"/api/v1/runs/{run}/input/go").status_code == 202


def test_the_page_turns_with_the_end_of_the_run(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.telling", n=20, delay=0.01, ask=True)["id"]
    log_in(page, site)
    run_page(page, site, tree, run)
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    go_on(tree, run)
    says(page, "SUCCESSFUL")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    told(tree, run, "SUCCESSFUL")
    page.get_by_role("link", name="Show its outcome").click()
    expect(page.locator(".field-shown_result")).to_contain_text('"parts": 20')
    page.get_by_role("button", name="Run again").click()
    expect(page.locator(".messagelist")).to_contain_text("is performed again as")
    made = page.locator(".messagelist a").inner_text()
    run_page(page, site, tree, made)
    go_on(tree, made)
    says(page, "SUCCESSFUL")
    assert tree.snapshot(made)["replay_of"] == run


def test_the_list_cancels_what_is_selected(page: Page, site: str, tree: Tree) -> None:
    runs = [tree.submit("proj.sleepy", seconds=60)["id"] for _ in range(2)]
    for run in runs:
        told(tree, run, "RUNNING")
    log_in(page, site)
    page.goto(f"{site}/admin/taskkit/run/?open=yes&task=proj.sleepy")
    expect(page.locator("#result_list tbody tr")).to_have_count(2)
    page.check("#action-toggle")
    page.select_option("select[name=action]", "cancel_runs")
    page.click("button[name=index]")
    expect(page.locator(".messagelist li")).to_have_count(2)
    for run in runs:
        assert tree.wait(run)["status"] == "CANCELLED"


def test_who_may_only_look_sees_it_live_and_has_no_button(page: Page, site: str, tree: Tree) -> None:
    run = tree.submit("proj.telling", n=20, delay=0.1)["id"]
    log_in(page, site, "looker")
    run_page(page, site, tree, run)
    says(page, "SUCCESSFUL")
    assert page.locator(".object-tools button").count() == 0


# -- schedules in the admin


def test_schedules_are_switched_and_their_runs_are_a_click_away(page: Page, site: str, tree: Tree) -> None:
    for body in (
        {"task": "proj.add", "kwargs": {"a": 1, "b": 2}, "every": 86_400, "name": "daily"},
        {
            "task": "proj.count",
            "kwargs": {"n": 3},
            "cron": "30 3 * * MON-FRI",
            "tz": "Europe/Berlin",
            "name": "books",
        },
        {"task": "proj.echo", "kwargs": {"value": "now"}, "at": in_a_moment(), "name": "once"},
    ):
        answer = tree.http.post("/api/v1/schedules", json=body)
        assert answer.status_code == 201, answer.text
    log_in(page, site)
    page.goto(f"{site}/admin/taskkit/schedule/?q=proj")
    expect(page.locator("#result_list")).to_contain_text("30 3 * * MON-FRI Europe/Berlin")
    row = page.locator("#result_list tr", has_text="daily")
    row.locator("input[type=checkbox]").check()
    page.select_option("select[name=action]", "disable_schedules")
    page.click("button[name=index]")
    expect(page.locator(".messagelist")).to_contain_text("1 disabled.")
    expect(row.locator(".field-enabled img")).to_have_attribute("alt", "False")
    expect(row.locator(".field-next")).to_have_text("-")
    page.set_viewport_size({"width": 1500, "height": 620})
    picture(page, "schedules.png")
    row.locator("th a").click()
    page.check("#id_enabled")
    page.click("[name=_continue]")
    expect(page.locator(".field-next .readonly")).not_to_have_text("-")

    eventually(lambda: runs_of(tree, "proj.echo"), 30, "the run of a moment")
    page.goto(f"{site}/admin/taskkit/schedule/?q=once")
    page.locator("#result_list tbody th a").click()
    page.locator(".field-newest_slots a").click()
    says(page, "SUCCESSFUL")
    expect(page.locator("[data-part=result]")).to_have_text("now")


def test_a_schedule_that_is_not_in_the_code_can_be_deleted(page: Page, site: str, tree: Tree) -> None:
    body = {"task": "proj.add", "kwargs": {"a": 1, "b": 2}, "every": 3_600, "name": "gone"}
    assert tree.http.post("/api/v1/schedules", json=body).status_code == 201
    log_in(page, site)
    page.goto(f"{site}/admin/taskkit/schedule/?q=gone")
    page.locator("#result_list tbody th a").click()
    page.locator(".deletelink").click()
    page.click("#content [type=submit]")
    expect(page.locator(".messagelist")).to_contain_text("was deleted successfully")
    assert all(one["name"] != "gone" for one in tree.http.get("/api/v1/schedules").json()["schedules"])


def in_a_moment() -> str:
    """Return a time that is about to come."""
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5)).isoformat()


def runs_of(tree: Tree, task: str) -> list[str]:
    """Return the runs of a task that have succeeded, as far as Django knows."""
    with closing(sqlite3.connect(f"file:{tree.database}?mode=ro", uri=True, timeout=5)) as connection:
        asked = (
            "SELECT id FROM taskkit_run WHERE task = ? AND status = 'SUCCESSFUL' AND tags LIKE '%schedule:%'"
        )
        return [str(id) for (id,) in connection.execute(asked, [task])]
