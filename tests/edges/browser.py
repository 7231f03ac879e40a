"""Debian's Chromium in a process of its own: commands come as JSON lines, one answer each.

    python -m tests.edges.browser PATH_OF_CHROMIUM

The first line it says is `{"origin": …}`: that of the page which listens. Cookies are the only way in for a native
EventSource, so each token gets a context, that is a jar, of its own.
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

#: A public name (README, HTTP).
_COOKIE = "bulkhead_token"

_PAGE = """<!doctype html><title>listener</title>
<script type="module">import {record} from "/record.mjs"; window.record = record;</script>"""

_OPEN = """async ({id, url, names, until}) => {
    while (!window.record) await new Promise(resolve => setTimeout(resolve, 5));
    window.open_ = window.open_ ?? new Map();
    window.open_.set(id, window.record(EventSource, url, {withCredentials: true}, names, until));
}"""
_PEEK = """id => {
    const {heard} = window.open_.get(id);
    return {count: heard.events.length, opens: heard.opens, done: heard.done};
}"""
_TAKE = "id => window.open_.get(id).heard"
_CLOSE = "id => { window.open_.get(id).close(); window.open_.delete(id); }"


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        script = self.path == "/record.mjs"
        body = Path(__file__).with_name("record.mjs").read_bytes() if script else _PAGE.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if script else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: standard output is for answers."""


class _Listeners:
    """What is open in one browser: a page per token, since a token is a cookie here."""

    def __init__(self, browser: Browser, origin: str) -> None:
        self._browser = browser
        self._origin = origin
        self._pages: dict[tuple[str, str], Page] = {}
        self._open: dict[int, Page] = {}

    def open(self, command: dict[str, Any]) -> dict[str, Any]:
        """Listen, with the token as cookie of the URL's host."""
        host = urllib.parse.urlsplit(command["url"])
        page = self._page(f"{host.scheme}://{host.netloc}/", command["token"])
        self._open[command["id"]] = page
        page.evaluate(_OPEN, command)
        return {}

    def peek(self, command: dict[str, Any]) -> Any:
        """Return how much has been heard."""
        return self._open[command["id"]].evaluate(_PEEK, command["id"])

    def take(self, command: dict[str, Any]) -> Any:
        """Return what has been heard."""
        return self._open[command["id"]].evaluate(_TAKE, command["id"])

    def close(self, command: dict[str, Any]) -> dict[str, Any]:
        """Leave."""
        self._open.pop(command["id"]).evaluate(_CLOSE, command["id"])
        return {}

    def run(self, command: dict[str, Any]) -> Any:
        """Run a script on a fresh page at `page`, return what it returns. `cookies` are playwright's."""
        context = self._browser.new_context(ignore_https_errors=True)
        try:
            context.add_cookies(command.get("cookies", []))
            page = context.new_page()
            page.goto(command.get("page") or self._origin)
            return {"value": page.evaluate(command["script"], command.get("argument"))}
        finally:
            context.close()

    def _page(self, site: str, token: str) -> Page:
        if (site, token) not in self._pages:
            context = self._browser.new_context()
            if token:
                context.add_cookies([{"name": _COOKIE, "value": token, "url": site}])
            page = context.new_page()
            page.goto(self._origin)
            self._pages[site, token] = page
        return self._pages[site, token]


def main(chromium: str) -> None:
    """Serve commands until standard input ends."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    origin = f"http://127.0.0.1:{server.server_port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        listeners = _Listeners(browser, origin)
        print(json.dumps({"origin": origin}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(listeners, command["op"])(command)
            print(json.dumps(answer), flush=True)
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
