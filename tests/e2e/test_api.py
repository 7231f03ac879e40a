"""The API around the streams, on a real tree: batches, metrics, waiting, connections that are kept."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers import TERMINAL, Tree, eventually

BATCH = "/api/v1/runs/batch"


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the tests' project's tree."""
    with Tree(runners=2) as tree:
        yield tree


def batch(tree: Tree, items: list[Any], **headers: str) -> dict[str, Any]:
    response = tree.http.post(BATCH, json={"runs": items}, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def metrics(tree: Tree) -> dict[str, float]:
    """Return the samples of a scrape, `name{value of its label}`."""
    text = tree.http.get("/metrics").text
    return {
        f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- batches


def test_a_batch_of_functions_and_rows_is_performed(tree: Tree) -> None:
    items: list[Any] = [{"task": "proj.echo", "kwargs": {"value": n}} for n in range(20)]
    items[3] = {"task": "proj.nobody"}
    items[7] = {"task": "proj.Row", "fields": {"message": "seven", "steps": 1}}
    items[9] = {"task": "proj.Row", "fields": {"message": "", "steps": -1}}
    found = batch(tree, items)
    assert (found["accepted"], found["replayed"], found["refused"]) == (18, 0, 2)
    assert [one["index"] for one in found["runs"] if "type" in one] == [3, 9]
    assert set(found["runs"][9]["errors"]) <= {"message", "steps"}
    results = [tree.wait(one["id"])["result"] for one in found["runs"] if "type" not in one]
    assert results == [0, 1, 2, 4, 5, 6, "seven", 8, *range(10, 20)]


def test_a_batch_that_is_sent_again_makes_nothing_twice(tree: Tree) -> None:
    items = [{"task": "proj.echo"}, {"task": "proj.Row", "fields": {"message": "once"}}]
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first, again = batch(tree, items, **headers), batch(tree, items, **headers)
    assert [one["id"] for one in again["runs"]] == [one["id"] for one in first["runs"]]
    assert (again["accepted"], again["replayed"]) == (0, 2)
    assert [tree.wait(one["id"])["status"] for one in first["runs"]] == ["SUCCESSFUL"] * 2


def test_a_thousand_items_are_well_below_a_second_on_a_quiet_machine(tree: Tree) -> None:
    later = {"task": "proj.echo", "run_after": "2099-01-01T00:00:00Z", "tags": ["thousand"]}
    before = metrics(tree)
    began = time.monotonic()
    found = batch(tree, [later] * 1000)
    took = time.monotonic() - began
    assert found["accepted"] == 1000
    after = metrics(tree)
    assert after["bulkhead_runs_accepted_total{http}"] - before["bulkhead_runs_accepted_total{http}"] == 1000
    print(f"RECORD batch of 1000 items: {took * 1000:.0f} ms")
    assert took < 10


def test_a_client_that_leaves_within_its_batch_has_its_runs(tree: Tree) -> None:
    key = uuid.uuid4().hex
    body = (
        b'{"runs": [{"task": "proj.echo", "kwargs": {"value": 5}, "idempotency_key": "%s"}]}' % key.encode()
    )
    host, _, port = tree.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        head = f"POST {BATCH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {tree.token()}\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def replayed() -> str | None:
        (one,) = batch(tree, [{"task": "proj.echo", "kwargs": {"value": 5}, "idempotency_key": key}])["runs"]
        return one["id"] if one["replayed"] else None

    # The first of these may be faster than the one that was left behind; either way there is one run.
    assert tree.wait(eventually(replayed))["result"] == 5


# --- metrics


def test_metrics_follow_what_happens(tree: Tree) -> None:
    before = metrics(tree)
    runs = [
        tree.submit("proj.count", n=3)["id"],
        tree.submit("proj.boom")["id"],
        tree.submit("proj.leave", code=3)["id"],
    ]
    events = sum(len(tree.events(run)) for run in runs)

    def counted() -> dict[str, float] | None:
        now = metrics(tree)
        done = (
            now["bulkhead_attempts_ended_total{crashed}"] > before["bulkhead_attempts_ended_total{crashed}"]
        )
        return now if done and now["bulkhead_runner_exits_total{exit}"] else None

    after = eventually(counted)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["bulkhead_runs_ended_total{SUCCESSFUL}"] == 1
    assert grown["bulkhead_runs_ended_total{FAILED}"] == 2
    assert grown["bulkhead_attempts_ended_total{returned}"] == 1
    assert grown["bulkhead_attempts_ended_total{raised}"] == 1
    assert grown["bulkhead_events_stored_total{}"] == events
    assert grown["bulkhead_deliveries_total{}"] == events
    assert grown["bulkhead_commit_seconds_count{}"] > 0
    assert after["bulkhead_connections{}"] >= 1
    assert after["bulkhead_courier_up{}"] == after["bulkhead_store_writable{}"] == 1
    assert after["bulkhead_runner_resident_bytes{default}"] > 1024 * 1024
    assert after["bulkhead_store_bytes{file}"] > 0
    falling = [name for name, by in grown.items() if by < 0 and ("_total" in name or "_bucket" in name)]
    assert falling == []


def test_stats_tell_of_pools(tree: Tree) -> None:
    document = tree.http.get("/api/v1/stats").json()
    assert document["pools"]["default"]["size"] == 2
    assert set(document["restarts"]) == {"courier", "runners"}


# --- requests


def test_a_result_is_waited_for(tree: Tree) -> None:
    run = tree.submit("proj.sleepy", seconds=0.5)["id"]
    url = f"/api/v1/runs/{run}/result"
    early = tree.http.get(url, headers={"Prefer": "wait=0"})
    assert (early.status_code, early.headers["preference-applied"]) == (202, "wait=0")
    assert "result" not in early.json()
    preferences = [("Prefer", "respond-async"), ("Prefer", "wait=30")]
    late = tree.http.get(url, headers=httpx.Headers(preferences), timeout=40)
    assert (late.status_code, late.headers["preference-applied"]) == (200, "wait=30")
    assert (late.json()["status"], late.json()["result"]) == ("SUCCESSFUL", "slept")
    assert late.json()["status"] in TERMINAL


def test_a_client_that_keeps_its_connection_survives_a_refusal_in_front_of_its_body(tree: Tree) -> None:
    body = b'{"task": "proj.echo", "kwargs": {"value": "%s"}}' % (b"x" * 300_000)
    json = {"Content-Type": "application/json"}
    good = {"Authorization": f"Bearer {tree.token()}"}
    with httpx.Client(base_url=tree.url, timeout=10, trust_env=False) as client:
        for _ in range(3):
            assert client.post("/api/v1/runs", content=body, headers=json).status_code == 401
            assert client.post("/api/v1/nowhere", content=body, headers=json).status_code == 404
            assert client.get("/api/v1/runs", headers=good).status_code == 200


def test_a_list_is_read_page_by_page_while_it_grows(tree: Tree) -> None:
    tag = uuid.uuid4().hex
    items = [{"task": "proj.echo", "run_after": "2099-01-01T00:00:00Z", "tags": [tag]}] * 7
    wanted = [one["id"] for one in batch(tree, items)["runs"]]
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        query = {"tag": tag, "limit": "3"} | ({"cursor": cursor} if cursor else {})
        page = tree.http.get("/api/v1/runs", params=query).json()
        seen += [run["id"] for run in page["runs"]]
        cursor = page["next"]
        batch(tree, items[:1])  # newer ones come in front, and move nothing
    assert seen == wanted[::-1]
