"""A run's stream as clients see it: whole, in order, from wherever they left off."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers import SseEvent, Tree

#: Seconds for response headers of a run that says nothing (acceptance line).
HEADERS_WITHIN = 0.2


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the demo project's tree."""
    with Tree(settings=None, runners=6) as tree:
        yield tree


def ids(events: list[SseEvent]) -> list[int]:
    return [int(event.id) for event in events]


def same(events: list[SseEvent]) -> list[tuple[str, str, str]]:
    """Return what two clients must agree on: everything but the time of arrival."""
    return [(event.id, event.type, event.data) for event in events]


def curl(tree: Tree, run: str, *options: str, query: str = "") -> str:
    """Return the body that `curl -N` prints."""
    url = f"{tree.url}/api/v1/runs/{run}/events{query}"
    command = ["curl", "--no-buffer", "--silent", "--show-error", "--fail", "--max-time", "20", *options, url]
    finished = subprocess.run(
        [*command, "--header", f"Authorization: Bearer {tree.token()}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_ids_count_from_1_and_the_last_event_is_the_end(tree: Tree) -> None:
    events = tree.events(tree.submit("demo.count", n=5, delay=0.02)["id"])
    assert ids(events) == [1, 2, 3, 4, 5, 6, 7]
    assert [event.type for event in events] == ["run.started", *["progress"] * 5, "stream.end"]
    assert [event.json["step"] for event in events[1:-1]] == [1, 2, 3, 4, 5]
    assert events[-1].json["status"] == "SUCCESSFUL"
    assert events[-1].json["result"] == 5


def test_every_event_names_its_run_attempt_and_time(tree: Tree) -> None:
    run = tree.submit("demo.count", n=2, delay=0)["id"]
    for event in tree.events(run):
        assert event.json["_run"] == run
        assert event.json["_attempt"] == 1
        assert event.json["_timestamp"].endswith("Z")


def test_curl_sees_ids_as_they_happen(tree: Tree) -> None:
    run = tree.submit("demo.count", n=3, delay=0.05)["id"]
    lines = curl(tree, run, "--header", "Accept: text/event-stream").splitlines()
    assert [line for line in lines if line.startswith("id:")] == [f"id: {n}" for n in range(1, 6)]
    assert [line for line in lines if line.startswith("event:")][-1] == "event: stream.end"


def test_curl_needs_no_accept_header(tree: Tree) -> None:
    run = tree.submit("demo.count", n=1, delay=0)["id"]
    assert "\nid: 1\nevent: run.started\n" in curl(tree, run)


def test_joining_late_replays_from_1(tree: Tree) -> None:
    run = tree.submit("demo.count", n=20, delay=0.02)["id"]
    with tree.stream(run) as early:
        seen: list[SseEvent] = []
        for event in early.events():
            seen.append(event)
            if event.id == "10":
                break
    assert ids(seen) == list(range(1, 11))
    late = tree.events(run)
    assert ids(late) == list(range(1, 23))
    assert same(late[:10]) == same(seen)


def test_last_event_id_continues_behind_it(tree: Tree) -> None:
    run = tree.submit("demo.count", n=10, delay=0.05)["id"]
    with tree.stream(run) as response:
        next(event for event in response.events() if event.id == "4")
    while_running = tree.events(run, after="4")
    afterwards = tree.events(run, after="4")
    assert ids(while_running) == list(range(5, 13))
    assert same(afterwards) == same(while_running)


def test_after_in_the_query_is_the_same_cursor(tree: Tree) -> None:
    run = tree.submit("demo.count", n=3, delay=0)["id"]
    tree.wait(run)
    with tree.stream(run, query="?after=3") as response:
        assert ids(list(response.events())) == [4, 5]


def test_the_header_stands_over_the_query(tree: Tree) -> None:
    run = tree.submit("demo.count", n=3, delay=0)["id"]
    tree.wait(run)
    with tree.stream(run, query="?after=1", headers={"Last-Event-ID": "4"}) as response:
        assert ids(list(response.events())) == [5]


def test_reconnecting_at_the_end_is_204(tree: Tree) -> None:
    run = tree.submit("demo.count", n=2, delay=0)["id"]
    last = tree.events(run)[-1]
    for cursor in (last.id, "999"):
        with tree.stream(run, headers={"Last-Event-ID": cursor}) as response:
            assert response.status == 204
            assert response.read() == b""


@pytest.mark.alone
def test_headers_of_a_silent_run_come_at_once(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    run = tree.submit("demo.quiet", seconds=1.0)["id"]
    with tree.stream(run) as response:
        assert response.status == 200
        assert response.seconds_to_headers < HEADERS_WITHIN
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "no-store" in response.headers["cache-control"]
        assert "no-transform" in response.headers["cache-control"]
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["content-encoding"] == "identity"
        assert response.headers["x-content-type-options"] == "nosniff"
        events = list(response.events())
        assert 1000 <= response.decoder.retries[0] <= 3000
        assert response.decoder.comments, "a first comment tells proxies that this is a stream"
    with capsys.disabled():
        print(f"\nRECORD headers of demo.quiet after {response.seconds_to_headers * 1000:.1f} ms")
    assert [event.type for event in events] == ["run.started", "stream.end"]


def test_after_latest_begins_with_the_newest(tree: Tree) -> None:
    run = tree.submit("demo.count", n=2, delay=1.0)["id"]
    with tree.stream(run) as watcher:
        next(event for event in watcher.events() if event.type == "progress")
    with tree.stream(run, query="?after=latest") as response:
        assert ids(list(response.events())) == [2, 3, 4]


def test_after_now_is_only_what_is_new(tree: Tree) -> None:
    run = tree.submit("demo.count", n=2, delay=1.0)["id"]
    with tree.stream(run) as watcher:
        next(event for event in watcher.events() if event.type == "progress")
    with tree.stream(run, query="?after=now") as response:
        assert ids(list(response.events())) == [3, 4]


def test_a_cursor_ahead_of_a_running_run_is_reset_in_band(tree: Tree) -> None:
    run = tree.submit("demo.count", n=3, delay=0.4)["id"]
    with tree.stream(run, headers={"Last-Event-ID": "1000"}) as response:
        assert response.status == 200
        events = list(response.events())
    assert events[0].type == "stream.reset"
    start = events[0].json["from"]
    assert ids(events[1:]) == list(range(start, 6))


def test_two_clients_see_the_same_flood(tree: Tree) -> None:
    run = tree.submit("demo.flood", n=1000, size=50)["id"]
    with ThreadPoolExecutor(2) as clients:
        first, second = clients.map(lambda _: tree.events(run), range(2))
    assert ids(first) == list(range(1, 1003))
    assert same(first) == same(second)


def test_ten_cuts_in_a_thousand_events_lose_and_repeat_nothing(tree: Tree, rng: random.Random) -> None:
    total = 1002  # 1000, run.started and stream.end
    cuts = sorted(rng.sample(range(20, total - 20), 10))
    run = tree.submit("demo.count", n=1000, delay=0.001)["id"]
    union: list[SseEvent] = []
    for cut in (*cuts, total):
        headers = {"Last-Event-ID": union[-1].id} if union else {}
        with tree.stream(run, headers=headers) as response:
            for event in response.events():
                union.append(event)
                if len(union) >= cut:
                    break
    assert ids(union) == list(range(1, total + 1))
    assert [event.json["step"] for event in union[1:-1]] == list(range(1, 1001))


def test_large_events_arrive_intact(tree: Tree) -> None:
    size = 200_000
    run = tree.submit("demo.flood", n=3, size=size)["id"]
    for events in (tree.events(run), tree.events(run)):  # live, then as history
        assert ids(events) == [1, 2, 3, 4, 5]
        for number, event in enumerate(events[1:4], 1):
            frame = len(json.dumps({"i": number, "fill": ""}, separators=(",", ":")))
            assert event.json["i"] == number
            wanted = hashlib.sha256(b"x" * (size - frame)).hexdigest()
            assert hashlib.sha256(event.json["fill"].encode()).hexdigest() == wanted
    assert list((tree.state_dir / "blobs").iterdir()), "they went through blobs/, not the pipe"


def test_large_and_small_events_keep_their_order(tree: Tree) -> None:
    # One run after another on the same stream would hide it: sizes alternate around the frame's limit of 60 KiB.
    runs = [tree.submit("demo.flood", n=5, size=size)["id"] for size in (61_000, 62_000, 100)]
    for run in runs:
        assert [event.json["i"] for event in tree.events(run)[1:-1]] == [1, 2, 3, 4, 5]


def test_output_comes_only_when_asked_for(tree: Tree) -> None:
    run = tree.submit("demo.noisy", lines=3)["id"]
    tree.wait(run)
    assert [event.type for event in tree.events(run)] == ["run.started", "stream.end"]
    with tree.stream(run, query="?include=log") as response:
        events = list(response.events())
    logs = [event for event in events if event.type == "log"]
    assert events[-1].type == "stream.end", "what was printed comes before the end"
    told = [event.json["text"] for event in logs]
    for number in (1, 2, 3):
        for source in ("print", "stderr", "os.write"):
            assert f"{source}: line {number}" in told
        assert any(f"logging: line {number}" in text for text in told)
    assert len(told) == 12
    assert all("." in event.id for event in logs), "a counter of its own"
    assert {event.json["stream"] for event in logs} >= {"stdout", "stderr"}


def test_a_cursor_among_output_lines_continues_behind_it(tree: Tree) -> None:
    run = tree.submit("demo.noisy", lines=3)["id"]
    tree.wait(run)
    with tree.stream(run, query="?include=log") as response:
        everything = list(response.events())
    middle = everything[len(everything) // 2]
    with tree.stream(run, query="?include=log", headers={"Last-Event-ID": middle.id}) as response:
        rest = list(response.events())
    assert same(rest) == same(everything[len(everything) // 2 + 1 :])


def test_output_needs_its_own_action(tree: Tree) -> None:
    run = tree.submit("demo.noisy", lines=1)["id"]
    tree.wait(run)
    with tree.stream(run, query="?include=log", token=tree.token(actions=["read"], runs=[run])) as response:
        assert response.status == 403


def test_plain_text_is_what_the_run_printed(tree: Tree) -> None:
    run = tree.submit("demo.noisy", lines=2)["id"]
    text = curl(tree, run, "--header", "Accept: text/plain")
    assert "print: line 1\n" in text
    assert "os.write: line 2\n" in text
    assert "run.started" not in text


def test_ndjson_is_one_object_per_line(tree: Tree) -> None:
    run = tree.submit("demo.count", n=3, delay=0.02)["id"]
    lines = curl(tree, run, "--header", "Accept: application/x-ndjson").splitlines()
    events = [json.loads(line) for line in lines if line]
    assert [event["id"] for event in events] == ["1", "2", "3", "4", "5"]
    assert events[-1]["type"] == "stream.end"
    assert events[1]["data"]["step"] == 1


def test_json_comes_in_pages(tree: Tree) -> None:
    run = tree.submit("demo.count", n=8, delay=0)["id"]
    tree.wait(run)
    found: list[str] = []
    after, pages, ended = "0", 0, False
    while not ended:
        response = tree.http.get(
            f"/api/v1/runs/{run}/events",
            params={"after": after, "limit": 4},
            headers={"Accept": "application/json"},
        )
        assert response.status_code == 200, response.text
        page = response.json()
        found += [event["id"] for event in page["events"]]
        after, ended, pages = page["next"], page["ended"], pages + 1
        assert pages < 10
    assert found == [str(n) for n in range(1, 11)]


@pytest.mark.alone
def test_a_json_page_can_wait_for_what_comes(tree: Tree) -> None:
    run = tree.submit("demo.count", n=1, delay=0.5)["id"]
    with tree.stream(run) as watcher:
        next(event for event in watcher.events() if event.type == "progress")
    started = time.monotonic()
    response = tree.http.get(
        f"/api/v1/runs/{run}/events",
        params={"after": "2", "wait": 5},
        headers={"Accept": "application/json"},
    )
    assert [event["type"] for event in response.json()["events"]] == ["stream.end"]
    assert response.json()["ended"] is True
    assert 0.1 < time.monotonic() - started < 3.0


def test_head_has_the_headers_and_no_body(tree: Tree) -> None:
    run = tree.submit("demo.quiet", seconds=0.5)["id"]
    with tree.stream(run, method="HEAD") as response:
        assert response.status == 200
        assert response.read() == b""


def test_a_stream_over_http_1_0_is_the_same(tree: Tree) -> None:
    run = tree.submit("demo.count", n=3, delay=0.02)["id"]
    text = curl(tree, run, "--http1.0", "--header", "Accept: text/event-stream")
    assert [line for line in text.splitlines() if line.startswith("id:")] == [f"id: {n}" for n in range(1, 6)]
