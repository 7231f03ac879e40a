"""`tasks.js` in a real browser, followed by pages of another origin: whole, shared by tabs, never stuck."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.chromium import chromium
from tests.helpers import Tree, eventually
from tests.proxy import Proxy

#: The page reads what to do from its address; what it has seen is in `window`.
PAGE = b"""<!doctype html><meta charset="utf-8"><title>page</title><script type="module">
const { gateway, run, options, all, patience } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const { follow, times } = await import(gateway + "/tasks.js");
Object.assign(times, patience);
const keep = ({ id, type }) => {
  seen.push(`${id} ${type}`);
  sessionStorage.seen = JSON.stringify(seen);
};
window.seen = JSON.parse(sessionStorage.seen ?? "[]");
const after = seen.at(-1)?.split(" ")[0];
const names = ["run.started", "progress", "stream.end"];
const what = all ? { onEvent: keep } : { on: Object.fromEntries(names.map(name => [name, keep])) };
window.one = follow({ base: gateway, run }, { withCredentials: true, after, ...what, ...options });
one.result.then(result => window.outcome = { result }, ({ message, status }) => window.outcome = { message, status });
</script>"""


#: Not the run that is followed.
OTHER = "0190b5a0-0000-7000-8000-000000000001"


class Pages(http.server.BaseHTTPRequestHandler):
    """The site: PAGE, wherever one looks."""

    def do_GET(self) -> None:
        """Serve a page."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Give the origin of a site with the page."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def tree(site: str) -> Iterator[Tree]:
    """Give a tree whose gateway lets the site's pages in."""
    with Tree(runners=4, env={"TASKKIT_CORS_ORIGINS": json.dumps([site])}) as tree:
        yield tree


@pytest.fixture(scope="module")
def browser(tree: Tree) -> Iterator[Browser]:
    """Give a Chromium without a window."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser, tree: Tree) -> Iterator[BrowserContext]:
    """Give a profile that has logged in: tabs of one profile share locks, channels and the cookie."""
    context = browser.new_context()
    log_in(context, tree.token(actions=["read"]))
    yield context
    context.close()


def log_in(context: BrowserContext, token: str) -> None:
    """Set the cookie that EventSource sends."""
    cookie = {"name": "bulkhead_token", "value": token, "domain": "127.0.0.1", "path": "/"}
    context.add_cookies([cookie])  # type: ignore[list-item]


@pytest.fixture
def visit(context: BrowserContext, site: str, tree: Tree) -> Callable[..., Page]:
    """Give a function that opens a tab which follows a run."""

    def visit(
        run: str, *, gateway: str = "", all: bool = False, patience: Any = None, **options: Any
    ) -> Page:
        asked = {
            "gateway": gateway or tree.url,
            "run": run,
            "options": options,
            "all": all,
            "patience": patience or {},
        }
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.goto(f"{site}/#{urllib.parse.quote(json.dumps(asked))}")
        page.wait_for_function("window.one")
        return page

    return visit


def seen(page: Page) -> list[str]:
    """Return what a page was given, in order."""
    found: list[str] = page.evaluate("seen")
    return found


def saw(page: Page, count: int) -> None:
    """Wait until a page was given so many events."""
    page.wait_for_function("count => seen.length >= count", arg=count)


def outcome(page: Page) -> dict[str, Any]:
    """Return what the page's `result` came to."""
    page.wait_for_function("window.outcome")
    found: dict[str, Any] = page.evaluate("outcome")
    return found


def wanted(steps: int) -> list[str]:
    """Return what a run of `count` tells."""
    middle = [f"{number} progress" for number in range(2, steps + 2)]
    return ["1 run.started", *middle, f"{steps + 2} stream.end"]


@pytest.mark.parametrize("all", [False, True], ids=["EventSource", "fetch"])
def test_every_event_once_then_the_result(tree: Tree, visit: Callable[..., Page], all: bool) -> None:
    page = visit(tree.submit("proj.count", n=20, delay=0.01)["id"], all=all)
    assert outcome(page) == {"result": 20}
    assert seen(page) == wanted(20)


def endless(tree: Tree) -> str:
    """Submit a run that speaks until `cancelled`; return its id."""
    run: str = tree.submit("proj.count", n=10_000, delay=0.03)["id"]
    return run


def cancelled(tree: Tree, run: str, *, all: bool) -> list[str]:
    """End a run; return what a page has to be given of it: without `all`, what has the names in PAGE."""
    assert tree.http.post(f"/api/v1/runs/{run}/cancel", json={}).status_code == 202
    names = ("run.started", "progress", "stream.end")
    return [f"{event.id} {event.type}" for event in tree.events(run) if all or event.type in names]


@pytest.mark.parametrize("all", [False, True], ids=["EventSource", "fetch"])
def test_reload_of_the_page_and_death_of_the_gateway_lose_and_repeat_nothing(
    tree: Tree, visit: Callable[..., Page], all: bool
) -> None:
    run = endless(tree)
    page = visit(run, all=all)
    saw(page, 5)
    page.reload()
    page.wait_for_function("window.one")
    saw(page, len(seen(page)) + 5)
    tree.kill("gateway")
    saw(page, len(seen(page)) + 5)
    told = cancelled(tree, run, all=all)
    assert outcome(page)["status"] == "CANCELLED"
    assert seen(page) == told


@pytest.mark.parametrize("all", [False, True], ids=["EventSource", "fetch"])
def test_tabs_share_one_connection_and_the_next_one_takes_it_over(
    tree: Tree, visit: Callable[..., Page], all: bool
) -> None:
    run = endless(tree)
    leader = visit(run, all=all)
    saw(leader, 5)
    others = [visit(run, all=all), visit(run, all=all)]  # late: they have to read what was
    for page in others:
        page.wait_for_function("one.via === 'shared'")
    eventually(lambda: tree.snapshot(run)["subscribers"] == 1, 5, "one connection for three tabs")
    saw(others[0], len(seen(leader)))
    leader.close()
    for page in others:
        saw(page, len(seen(page)) + 10)
    eventually(lambda: tree.snapshot(run)["subscribers"] == 1, 5, "one connection for two tabs")
    assert sorted(page.evaluate("one.via") for page in others) == ["shared", "stream"]
    told = cancelled(tree, run, all=all)
    for page in others:
        assert outcome(page)["status"] == "CANCELLED"
        assert seen(page) == told


@pytest.mark.parametrize("all", [False, True], ids=["EventSource", "fetch"])
def test_a_proxy_that_holds_streams_back_is_found_out(
    tree: Tree, visit: Callable[..., Page], all: bool
) -> None:
    with Proxy(tree.url) as proxy:
        proxy.swallows = True
        run = endless(tree)
        page = visit(run, gateway=proxy.url, all=all, patience={"opens": 300, "pause": 50})
        page.wait_for_function("one.via === 'poll'")
        saw(page, len(seen(page)) + 5)
        told = cancelled(tree, run, all=all)
        assert outcome(page)["status"] == "CANCELLED"
        assert seen(page) == told
        assert any("wait=15" in line for line in proxy.requests), "the gateway holds the page for up to 15 s"


def test_a_cut_line_is_mended(tree: Tree, visit: Callable[..., Page]) -> None:
    with Proxy(tree.url, [None, 3000]) as proxy:
        run = tree.submit("proj.count", n=40, delay=0.02)["id"]
        page = visit(run, gateway=proxy.url, patience={"pause": 50})
        assert outcome(page) == {"result": 40}
        assert seen(page) == wanted(40)


def test_without_eventsource_fetch_reads(
    tree: Tree, context: BrowserContext, visit: Callable[..., Page]
) -> None:
    context.add_init_script("delete window.EventSource")
    page = visit(tree.submit("proj.count", n=3)["id"])
    assert outcome(page) == {"result": 3}
    assert seen(page) == wanted(3)


def test_an_eventsource_that_never_opens_is_left(
    tree: Tree, context: BrowserContext, visit: Callable[..., Page]
) -> None:
    context.add_init_script("window.EventSource = class extends EventTarget { close() {} }")
    run = tree.submit("proj.count", n=30, delay=0.05)["id"]
    page = visit(run, patience={"opens": 300, "pause": 100})
    assert outcome(page) == {"result": 30}
    assert seen(page) == wanted(30)


@pytest.mark.parametrize("all", [False, True], ids=["EventSource", "fetch"])
def test_a_refusal_surfaces(
    tree: Tree, context: BrowserContext, visit: Callable[..., Page], all: bool
) -> None:
    run = tree.submit("proj.count", n=1)["id"]
    context.clear_cookies()
    assert outcome(visit(run, all=all))["status"] == 401
    log_in(context, tree.token(actions=["read"], tasks=[], runs=[OTHER]))
    assert outcome(visit(run, all=all))["status"] == 404


def test_a_token_is_sent_as_bearer(tree: Tree, context: BrowserContext, visit: Callable[..., Page]) -> None:
    context.clear_cookies()
    answer = tree.submit("proj.count", n=3)
    page = visit(answer["id"], token=answer["token"])
    assert outcome(page) == {"result": 3}


def test_a_run_that_failed_says_how(tree: Tree, visit: Callable[..., Page]) -> None:
    page = visit(tree.submit("proj.boom", message="no luck")["id"])
    assert outcome(page) == {"message": "no luck", "status": "FAILED"}
