"""Chosen types, many runs on one connection, runs that end alone: over a real tree, one of whose gateways dies."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.helpers import ROOT, SseEvent, Tree, eventually, raw_get

#: Seconds after which a run that was left alone is cancelled.
GRACE = 1.0


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    limits = json.dumps({"disconnect_grace_seconds": GRACE})
    with Tree(runners=4, env={"TASKKIT_LIMITS": limits}) as tree:
        yield tree


def submit(tree: Tree, task: str, tags: Sequence[str] = (), **kwargs: Any) -> str:
    response = tree.http.post("/api/v1/runs", json={"task": task, "kwargs": kwargs, "tags": [*tags]})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


class Mixed(threading.Thread):
    """A client of many runs that is cut now and then, and comes back with the id that it saw last.

    Attributes:
      events: what it got; status: of the last answer; connections: how many it took.
    """

    def __init__(self, tree: Tree, query: str, rng: random.Random | None = None) -> None:
        super().__init__(daemon=True)
        self._tree, self._query, self._rng = tree, query, rng
        self._stopped = False
        self.events: list[SseEvent] = []
        self.status = 0
        self.connections = 0
        self.start()

    def run(self) -> None:
        last = ""
        while not self._stopped and self.status in (0, 200):
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
            patience = self._rng.randrange(1, 40) if self._rng else 10_000
            url = f"{self._tree.url}/api/v1/events?{self._query}"
            with contextlib.suppress(OSError, http.client.HTTPException):
                with raw_get(url, token=self._tree.token(), headers=headers) as response:
                    self.status = response.status
                    self.connections += 1
                    for _, event in zip(range(patience), response.events(), strict=False):
                        self.events.append(event)
                        last = event.id
                        if self._stopped:
                            return
            time.sleep(0.02)  # a reconnecting client's pause, not a wait for a state

    def finish(self, seconds: float = 30.0) -> list[SseEvent]:
        """Return the events when the stream is over."""
        self.join(seconds)
        assert not self.is_alive(), f"still reading; {len(self.events)} events, last {self.events[-1:]}"
        return self.events

    def stop(self) -> None:
        """Leave at the next event."""
        self._stopped = True


def by_run(events: Sequence[SseEvent]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for event in events:
        found.setdefault(event.json["_run"], []).append((event.type, event.data))
    return found


def test_chosen_types_keep_their_ids(tree: Tree) -> None:
    run = submit(tree, "proj.count", n=3)
    tree.wait(run)
    with tree.stream(run, query="?types=run.started,nothing") as response:
        assert [(event.id, event.type) for event in response.events()] == [
            ("1", "run.started"),
            ("5", "stream.end"),
        ]
    page = tree.http.get(
        f"/api/v1/runs/{run}/events?types=progress&limit=2", headers={"Accept": "application/json"}
    )
    assert [event["id"] for event in page.json()["events"]] == ["2", "3"]


def test_cuts_and_a_killed_gateway_lose_nothing_of_many_runs(tree: Tree, rng: random.Random) -> None:
    runs = [submit(tree, "proj.count", ["mixed"], n=60, delay=0.02) for _ in range(3)]
    named = Mixed(tree, "&".join(f"run={run}" for run in runs) + "&until=done", rng)
    steady = Mixed(tree, f"run={runs[0]}&tag=mixed&until=done")
    eventually(lambda: len(named.events) > 30 and len(steady.events) > 30, 20, "events of both")
    tree.kill("gateway")
    for client in (named, steady):
        client.finish()
        ids = [int(event.id) for event in client.events]
        assert ids == sorted(set(ids)), "one order, nothing twice"
        assert client.status == 204, "coming back to what is done"
    single = {run: [(event.type, event.data) for event in tree.events(run)] for run in runs}
    assert by_run(named.events) == single
    assert by_run(steady.events)[runs[0]] == single[runs[0]]
    assert named.connections > 2
    again = Mixed(tree, "tag=mixed&after=0&types=stream.end")
    eventually(lambda: len(again.events) == 3, 10, "the past of a tag")
    again.stop()


def test_a_tag_takes_in_what_is_submitted_later(tree: Tree) -> None:
    with raw_get(
        f"{tree.url}/api/v1/events?tag=later&after=now",
        token=tree.token(),
        headers={"Accept": "text/event-stream"},
    ) as response:
        events = response.events()
        first, other = submit(tree, "proj.count", ["later"], n=2), submit(tree, "proj.count", n=2)
        second = submit(tree, "proj.count", ["more", "later"], n=2)
        seen: list[SseEvent] = []
        while sum(event.type == "stream.end" for event in seen) < 2:
            seen.append(next(events))
    assert set(by_run(seen)) == {first, second}
    assert all(len(said) == 4 for said in by_run(seen).values())
    tree.wait(other)
    body = json.dumps({"tags": ["later"], "types": ["progress"], "after": seen[0].id}).encode()
    with raw_get(
        f"{tree.url}/api/v1/events", token=tree.token(), method="POST", body=body, headers={"Accept": "*/*"}
    ) as response:
        events = response.events()
        assert [next(events).type for _ in range(6)].count("progress") == 4


def test_a_token_for_one_run_reaches_no_other(tree: Tree) -> None:
    mine, others = (submit(tree, "proj.echo", ["reach"], value=n) for n in range(2))
    tree.wait(mine)
    tree.wait(others)
    client = tree.client(actions=["read"], runs=[mine], tasks=())
    assert client.get(f"/api/v1/events?run={mine}&run={others}").status_code == 404
    token = tree.token(actions=["read"], runs=[mine], tasks=())
    with raw_get(f"{tree.url}/api/v1/events?run={mine}&tag=reach&until=done", token=token) as response:
        assert set(by_run(list(response.events()))) == {mine}


def test_a_run_that_is_left_alone_ends_and_one_whose_client_comes_back_does_not(tree: Tree) -> None:
    left, kept, never = (submit(tree, "proj.shy") for _ in range(3))
    with tree.stream(left) as response:
        next(event for event in response.events() if event.type == "ready")
    client = Mixed(tree, f"run={kept}")
    eventually(lambda: len(client.events) >= 2, 10, "the client's events")
    snapshot = tree.wait(left)
    assert snapshot["status"] == "CANCELLED"
    events = tree.events(left)
    assert [event.json.get("reason") for event in events if event.type == "run.cancelling"] == [
        "disconnected"
    ]
    assert "cleaned_up" in {event.type for event in events}
    tree.kill("gateway")
    eventually(lambda: client.connections >= 2, 10, "the client is back")
    assert {tree.snapshot(run)["status"] for run in (kept, never)} == {"RUNNING"}
    client.stop()
    for run in (kept, never):
        assert tree.http.post(f"/api/v1/runs/{run}/cancel").status_code == 202
        tree.wait(run)
    client.join(10)


def test_a_tag_can_be_given_on_the_command_line(tree: Tree) -> None:
    command = [sys.executable, "-m", "supervisor", "submit", "proj.echo", "--tag", "by hand", "--tag", "x"]
    said = subprocess.run(
        [*command, "--state-dir", str(tree.state_dir)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=ROOT,
        env=tree.environment(),
    ).stdout
    (run,) = tree.http.get("/api/v1/runs", params={"tag": "by hand"}).json()["runs"]
    assert said.splitlines()[0] == run["id"]
    assert sorted(run["tags"]) == ["by hand", "x"]
