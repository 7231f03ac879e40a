"""Behind nginx or Caddy, set up by the files in deploy/, a stream is what it is without them."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.edges.listeners import Helper
from tests.edges.proxies import Proxy, caddy, nginx
from tests.helpers import RawResponse, SseDecoder, SseEvent, Tree, eventually, raw_get, wait_until_gone

PROXIES: dict[str, Callable[[str], AbstractContextManager[Proxy]]] = {
    "nginx": nginx,
    "nginx over HTTP/1.0": partial(nginx, http_1_0=True),
    "caddy": caddy,
}

EVENT_STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def tree(plain_tree: Tree) -> Tree:
    """Give the tree behind the proxies."""
    return plain_tree


@pytest.fixture(scope="module", params=PROXIES.values(), ids=PROXIES)
def proxy(request: pytest.FixtureRequest, tree: Tree) -> Iterator[Proxy]:
    """Give each proxy in turn."""
    with request.param(urllib.parse.urlsplit(tree.url).netloc) as proxy:
        yield proxy


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Give the file that a run waits for; it is there at the end, so that no run waits for ever."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def speaking(tree: Tree, gate: Path) -> str:
    """Start a run that says three things before the gate, prints and says one more behind it."""
    steps = [("step", {"n": n}) for n in (1, 2, 3)]
    return tree.submit("proj.say", first=steps, then=[("late", {"n": 4})], gate=str(gate))["id"]


def follow(tree: Tree, proxy: Proxy, run: str, **headers: str) -> RawResponse:
    url = f"{proxy.url}/api/v1/runs/{run}/events"
    return raw_get(url, token=tree.token(), headers=EVENT_STREAM | headers)


def until(events: Iterator[SseEvent], id: str) -> list[SseEvent]:
    """Read on to the event with this id."""
    found = []
    for event in events:
        found.append(event)
        if event.id == id:
            return found
    raise AssertionError(f"no event {id} among {found}")


def test_each_event_comes_when_it_is_said(tree: Tree, proxy: Proxy, gate: Path) -> None:
    """The run goes on only when the client has what was said so far: what is held back would be waited for in vain."""
    run = speaking(tree, gate)
    with follow(tree, proxy, run, **{"Accept-Encoding": "gzip, br, zstd"}) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers.get("content-encoding", "identity") == "identity"
        events = response.events()
        first = until(events, "4")
        assert response.decoder.retries
        assert response.decoder.comments
        gate.touch()
        rest = list(events)
    assert [event.id for event in first + rest] == ["1", "2", "3", "4", "5", "6"]
    assert rest[-1].type == "stream.end"


def test_the_first_byte_of_a_silent_run_comes_at_once(tree: Tree, proxy: Proxy) -> None:
    run = tree.submit("proj.asleepy", seconds=2.0)["id"]
    with follow(tree, proxy, run, **{"Last-Event-ID": "1"}) as response:
        assert response.read().startswith(b":\n\n")
        assert tree.snapshot(run)["status"] != "SUCCESSFUL", "it was there before anything was said"


@pytest.mark.parametrize("accept", ["application/x-ndjson", "text/plain"])
def test_other_renderings_are_not_held_either(tree: Tree, proxy: Proxy, gate: Path, accept: str) -> None:
    run = tree.submit("proj.say", first=[("step", "said at once")], gate=str(gate))["id"]
    url = f"{proxy.url}/api/v1/runs/{run}/events"
    headers = {"Accept": accept, "Accept-Encoding": "gzip"}
    with raw_get(url, token=tree.token(actions=["read"]), headers=headers) as response:
        found = b""
        while b"said at once" not in found:
            data = response.read()
            assert data, found
            found += data
        gate.touch()
        while response.read():
            pass


def test_a_client_continues_where_it_was(tree: Tree, proxy: Proxy, gate: Path) -> None:
    run = speaking(tree, gate)
    with follow(tree, proxy, run) as response:
        until(response.events(), "3")
    gate.touch()
    with follow(tree, proxy, run, **{"Last-Event-ID": "3"}) as response:
        assert [event.id for event in response.events()] == ["4", "5", "6"]
    with follow(tree, proxy, run, **{"Last-Event-ID": "6"}) as response:
        assert response.status == 204


def test_streams_outlive_a_gateway_by_coming_back(tree: Tree, proxy: Proxy, gate: Path) -> None:
    run = speaking(tree, gate)
    with follow(tree, proxy, run) as response:
        events = response.events()
        until(events, "4")
        assert not tree.operate("restart-gateway", timeout=60.0).error
        assert list(events) == [], "it ends, neither broken off nor with an error"
        assert len(response.decoder.retries) == 2
    gate.touch()
    with follow(tree, proxy, run, **{"Last-Event-ID": "4"}) as response:
        assert response.status == 200
        assert [event.id for event in response.events()] == ["5", "6"]


def test_a_gateway_that_dies_refuses_nobody(tree: Tree, proxy: Proxy) -> None:
    """Who comes in between waits: a 502 would be the last that an EventSource asks for."""
    run = tree.submit("proj.count", n=3)["id"]
    tree.wait(run)
    gateway = psutil.Process(tree.child("gateway").pid)
    tree.kill("gateway")
    assert not wait_until_gone([gateway], 5)
    with follow(tree, proxy, run) as response:
        assert response.status == 200
        assert [event.id for event in response.events()] == ["1", "2", "3", "4", "5"]


def test_the_gateway_hears_of_a_client_that_leaves(tree: Tree, proxy: Proxy, gate: Path) -> None:
    run = speaking(tree, gate)
    with follow(tree, proxy, run) as response:
        until(response.events(), "1")
        assert tree.snapshot(run)["subscribers"] == 1
    eventually(lambda: tree.snapshot(run)["subscribers"] == 0, 10, "nobody to follow any more")


@pytest.mark.parametrize(
    ("size", "status"),
    [(900_000, 202), (1_500_000, 413), (3_000_000, 413)],
    ids=["within", "above the gateway's limit", "above the proxy's limit"],
)
def test_bodies_reach_the_gateway(tree: Tree, proxy: Proxy, size: int, status: int) -> None:
    body = {"task": "proj.echo", "kwargs": {"value": "x" * size}}
    headers = {"Authorization": f"Bearer {tree.token()}"}
    with httpx.Client(trust_env=False, headers=headers, timeout=30) as client:
        response = client.post(f"{proxy.url}/api/v1/runs", json=body)
    assert response.status_code == status, response.text
    if status == 413:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"] == "urn:bulkhead:problem:too-large"
    else:
        tree.wait(response.json()["id"])


def test_a_page_of_the_same_host_may_use_its_cookie(tree: Tree, proxy: Proxy) -> None:
    """Origin and Host have to arrive alike, port included."""
    run = tree.submit("proj.count", n=1)["id"]
    headers = EVENT_STREAM | {"Origin": proxy.url, "Cookie": f"bulkhead_token={tree.token()}"}
    with raw_get(f"{proxy.url}/api/v1/runs/{run}/events", headers=headers) as response:
        assert response.status == 200
        assert [event.type for event in response.events()][-1] == "stream.end"


@pytest.mark.parametrize("kind", [nginx, caddy])  # not over HTTP/1.0, which has no upgrades
def test_a_websocket_reaches_the_gateway(
    kind: Callable[[str], AbstractContextManager[Proxy]], tree: Tree
) -> None:
    lines = [
        "GET /ws HTTP/1.1",
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==",
        f"Authorization: Bearer {tree.token()}",
    ]
    with kind(urllib.parse.urlsplit(tree.url).netloc) as proxy:
        target = urllib.parse.urlsplit(proxy.url)
        with socket.create_connection((target.hostname or "", target.port or 0), 10) as sock:
            sock.sendall("\r\n".join([*lines, "", ""]).encode())
            answer = b""
            while b"subscribed" not in answer and (data := sock.recv(65536)):
                answer += data
    assert answer.startswith(b"HTTP/1.1 101"), answer
    assert answer.endswith(b'{"type":"subscribed"}'), "a frame has come as well"


@contextlib.contextmanager
def nobody() -> Iterator[str]:
    """Give an address where nobody listens, and nobody else will meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize("kind", [nginx, caddy])
def test_without_a_tree_clients_are_told_to_come_back(
    kind: Callable[[str], AbstractContextManager[Proxy]],
) -> None:
    with nobody() as upstream, kind(upstream) as proxy, httpx.Client(trust_env=False, timeout=20) as client:
        stream = client.get(f"{proxy.url}/api/v1/runs/1/events", headers=EVENT_STREAM)
        other = client.get(f"{proxy.url}/api/v1/runs")
    assert stream.status_code == 200
    assert stream.headers.get_list("content-type") == ["text/event-stream; charset=utf-8"]
    decoder = SseDecoder()
    assert [(event.type, event.data) for event in decoder.receive(stream.content)] == [("stream.busy", "{}")]
    assert decoder.retries == [5000]
    assert other.status_code == 503
    assert other.headers.get_list("content-type") == ["application/problem+json"]
    assert other.headers["retry-after"] == "5"
    assert other.json()["status"] == 503


#: More than the six that a browser opens to one host over HTTP/1.1.
STREAMS = 20

_MULTIPLEX = """async ({run, streams}) => {
    const sources = Array.from({length: streams}, () => new EventSource(`/api/v1/runs/${run}/events`));
    const ends = sources.map(source => new Promise((resolve, reject) => {
        let events = 0;
        for (const name of ["run.started", "step", "late"]) source.addEventListener(name, () => events += 1);
        source.addEventListener("stream.end", () => { source.close(); resolve(events); });
        source.onerror = () => reject(new Error("a stream broke"));
    }));
    await Promise.all(sources.map(source => new Promise(resolve => source.onopen = resolve)));
    await fetch("/health");
    const protocol = performance.getEntriesByType("resource").at(-1).nextHopProtocol;
    return {protocol, events: await Promise.all(ends)};
}"""


def test_a_browser_opens_twenty_streams_over_one_connection(tree: Tree, chromium: Helper, gate: Path) -> None:
    """Caddy speaks HTTP/2 to it, under a certificate of its own authority."""
    run = speaking(tree, gate)
    with caddy(urllib.parse.urlsplit(tree.url).netloc, tls=True) as proxy:

        def open_the_gate() -> None:
            eventually(lambda: tree.snapshot(run)["subscribers"] == STREAMS, 60, "all streams at once")
            gate.touch()

        opener = threading.Thread(target=open_the_gate)
        opener.start()
        seen = chromium.ask(
            op="run",
            page=f"{proxy.url}/health",
            cookies=[{"name": "bulkhead_token", "value": tree.token(), "url": proxy.url}],
            script=_MULTIPLEX,
            argument={"run": run, "streams": STREAMS},
        )["value"]
        opener.join()
    assert seen == {"protocol": "h2", "events": [5] * STREAMS}
