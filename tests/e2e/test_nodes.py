"""Several trees share one PostgreSQL: its outbox, runs that are taken over, requests for a run of another node."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from taskkit import get_client
from taskkit.errors import RunLost
from tests.e2e.nodes import LEASE, Nodes, folders, kill_whole, nodes, whole
from tests.helpers import Tree, collect, eventually
from tests.processes import standing

#: Runs that are shared.
RUNS = 500

Pair = tuple[Nodes, Tree, Tree]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with nodes() as made, standing(made.server.pid), folders(2) as (one, other):
        with made.tree(one) as first, made.tree(other) as second:
            wait_for_company(made, first, second)
            yield made, first, second


def wait_for_company(made: Nodes, *trees: Tree) -> None:
    """Return when each has kept its lease for a while and knows of the others."""
    statement = "SELECT count(*) FROM taskkit_node WHERE expires_at > now()"
    eventually(lambda: made.query(statement)[0][0] == len(trees), 10, "all nodes")
    time.sleep(LEASE + LEASE / 4)


@pytest.mark.alone
def test_500_runs_are_shared_and_one_tree_is_killed_in_the_middle() -> None:
    """Every run ends once; what the dead tree had is another's within three leases."""
    with nodes() as made, folders(2) as (one, other):
        with made.tree(one) as stays:
            dies = made.tree(other)
            with contextlib.suppress(AssertionError), dies:
                wait_for_company(made, stays, dies)
                ids = made.submit(*[("proj.count", {"n": 2, "delay": 0.02}, RUNS // 10)] * 10)
                ended = "SELECT count(*) FROM happened WHERE what = 'ended'"
                eventually(lambda: made.query(ended)[0][0] >= RUNS // 4, 120, "a quarter")
                shares = made.shares()
                lost = made.open_of(dies)
                killed_at = time.time()
                kill_whole(dies)
            print(f"RECORD shares {dict(shares)}; {lost} open runs lost their node")
            assert lost, "it was killed in the middle"
            assert min(shares[made.name(tree)] for tree in (stays, dies)) >= RUNS // 10, (
                "both have their share"
            )
            eventually(lambda: made.open_of(dies) == 0, 3 * LEASE + 60, "takeover")
            eventually(lambda: made.unfinished() == 0, 120, "all ends")
            made.check_ends()
            taken = made.query("SELECT extract(epoch FROM at) FROM happened WHERE what = 'taken'")
            put_back = made.query("SELECT run FROM happened WHERE what = 'put back'")
            assert len(put_back) == len(set(put_back)), "once each"
            last = max(float(at) for (at,) in taken) - killed_at
            print(
                f"RECORD taken over: {len(put_back)} runs, the last {last:.2f} s after the kill; lease {LEASE} s"
            )
            assert last <= 3 * LEASE
            status = "SELECT status, count(*) FROM taskkit_run GROUP BY status"
            assert dict(made.query(status)) == {"SUCCESSFUL": RUNS}
            assert len(ids) == RUNS


@pytest.mark.alone
def test_a_tree_that_stood_still_beyond_its_lease_ends_nothing_twice(pair: Pair) -> None:
    made, stays, stops = pair
    run = str(stops.submit("proj.count", n=40, delay=0.1)["id"])
    others = [str(stops.submit("proj.sleepy", seconds=0.5)["id"]) for _ in range(8)]
    eventually(lambda: made.column("status", run) == "RUNNING", 10, "a run under way")
    eventually(lambda: all(made.column("node", id) for id in others), 10, "all of them told")
    with stood_still(stops):
        eventually(lambda: made.column("node", run) == made.name(stays), 4 * LEASE, "takeover")
    statement = "SELECT count(*) FROM taskkit_takeover WHERE node = %s"
    eventually(lambda: made.query(statement, made.name(stops))[0][0] == 0, 15, "its notes read")
    assert stops.client().get(f"/api/v1/runs/{run}").status_code == 307
    listed = stops.http.get("/api/v1/runs", params={"limit": 100}).json()["runs"]
    assert run not in {shown["id"] for shown in listed}
    assert not [shown for shown in listed if "~" in shown["id"]]
    eventually(lambda: made.unfinished() == 0, 60, "all ends")
    made.check_ends()
    snapshot = stays.wait(run)
    assert (snapshot["status"], snapshot["attempt"]) == ("SUCCESSFUL", 2)
    again = [str(id) for id in made.submit(("proj.echo", {"value": 1}, 20))]
    eventually(lambda: made.unfinished() == 0, 60, "both go on")
    assert {made.column("status", id) for id in again} == {"SUCCESSFUL"}


@contextlib.contextmanager
def stood_still(tree: Tree) -> Iterator[None]:
    """Stop every process of a tree meanwhile."""
    stopped = whole(tree)
    for process in stopped:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)


def test_a_request_for_another_nodes_run_is_sent_there(pair: Pair) -> None:
    made, here, there = pair
    run = str(there.submit("proj.count", n=3)["id"])
    there.wait(run)
    eventually(lambda: made.column("node", run) == made.name(there), 10, "told")
    for path in ("", "/events?after=1&types=tick", "/result"):
        answer = here.http.get(f"/api/v1/runs/{run}{path}")
        assert (answer.status_code, answer.headers["location"]) == (
            307,
            f"{there.url}/api/v1/runs/{run}{path}",
        )
        assert answer.headers["cache-control"] == "no-store"
    assert here.http.get("/api/v1/runs/018f0000-0000-7000-8000-000000000000").status_code == 404
    narrow = here.client(actions=["read"], tasks=["proj.add"], runs=[])
    assert narrow.get(f"/api/v1/runs/{run}").status_code == 404, (
        "who may not see it does not learn where it is"
    )
    token = here.token()
    events = collect(f"{there.url}/api/v1/runs/{run}/events", token)
    with httpx.Client(follow_redirects=True, trust_env=False) as plain:
        ticket = here.http.post("/api/v1/tickets", json={"actions": ["read"]}).json()["ticket"]
        followed = plain.get(f"{here.url}/api/v1/runs/{run}/events", params={"ticket": ticket})
    assert followed.status_code == 200
    assert followed.text.count("event: ") == len(events)


def test_the_client_goes_where_the_run_is(pair: Pair) -> None:
    made, here, there = pair
    client = get_client(here.url, token=here.token())
    run = str(there.submit("proj.count", n=5, delay=0.3)["id"])
    eventually(lambda: made.column("node", run) == made.name(there), 10, "told")
    assert [event.type for event in client.follow(run)][-1] == "stream.end"
    assert client.result(run) == 5
    waiting = str(there.submit("proj.patient")["id"])
    eventually(lambda: made.column("status", waiting) == "RUNNING", 10, "told")
    client.cancel(waiting, grace=0.5)
    assert there.wait(waiting)["status"] == "CANCELLED"
    client.close()


def test_a_row_made_by_http_is_performed_where_it_was_made(pair: Pair) -> None:
    made, here, there = pair
    body = {"task": "proj.Row", "fields": {"message": "by http"}}
    runs = []
    for _ in range(8):
        answer = here.http.post("/api/v1/runs", json=body)
        assert answer.status_code == 202, answer.text
        runs.append(str(answer.json()["id"]))
    for run in runs:
        snapshot = here.wait(run)
        assert (snapshot["status"], len(snapshot["attempts"])) == ("SUCCESSFUL", 1)
        assert there.http.get(f"/api/v1/runs/{run}").status_code in (307, 404)
    eventually(lambda: made.unfinished() == 0, 20, "all told")
    assert {made.column("node", run) for run in runs} == {made.name(here)}
    assert made.query("SELECT count(*) FROM proj_row WHERE message = 'by http'") == [(8,)]
    made.check_ends()


def test_a_chain_is_one_nodes_whoever_looks_first(pair: Pair) -> None:
    made, *_ = pair
    chains = [made.submit_chain() for _ in range(6)]
    eventually(lambda: made.unfinished() == 0, 60, "all ends")
    for chain in chains:
        assert {made.column("status", run) for run in chain} == {"SUCCESSFUL"}
        assert len({made.column("node", run) for run in chain}) == 1


@pytest.mark.alone
def test_what_a_killed_node_had_goes_on_with_its_stream_begun_anew(pair: Pair) -> None:
    made, *living = pair
    with folders(1) as (folder,):
        dies = made.tree(folder)
        with contextlib.suppress(AssertionError), dies:
            run = str(dies.submit("proj.count", n=30, delay=0.2)["id"])
            once = str(dies.submit("proj.once", seconds=30)["id"])
            eventually(lambda: made.column("status", once) == "RUNNING", 10, "told")
            assert eventually(lambda: dies.snapshot(run)["offsets"]["last"] >= 3, 10, "some events")
            kill_whole(dies)
        places = {made.name(tree): tree for tree in living}
        here = eventually(lambda: places.get(made.column("node", run)), 4 * LEASE, "takeover")
        eventually(lambda: here.http.get(f"/api/v1/runs/{run}").status_code == 200, 10, "its new place")
        events = collect(f"{here.url}/api/v1/runs/{run}/events", here.token(), after="3", timeout=30)
        assert [event.type for event in events][:3] == ["stream.reset", "run.retrying", "run.started"]
        assert '"reason":"epoch"' in events[0].data
        assert all(event.id.startswith("e1000-") for event in events if event.id)
        assert [event.type for event in events].count("stream.end") == 1
        snapshot = here.wait(run)
        assert (snapshot["status"], snapshot["attempt"]) == ("SUCCESSFUL", 2)
        failed = eventually(lambda: made.column("error", once), 10, "its end")
        assert failed["code"] == "lost"
        assert "died or was cut off" in failed["message"]
        client = get_client(here.url, token=here.token())
        with pytest.raises(RunLost):
            client.result(once, timeout=5)
        client.close()
    made.check_ends()
