"""Any process of the tree may be killed: what clients see is whole, and work goes on."""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.helpers import SseEvent, Tree, eventually


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with Tree(settings=None, runners=4) as running:
        yield running


class Follower(threading.Thread):
    """A client as a browser is one: it reads, and after a broken connection asks again from the last id."""

    def __init__(self, tree: Tree, run: str) -> None:
        super().__init__(daemon=True)
        self._tree, self._run = tree, run
        self.events: list[SseEvent] = []
        self.connections = 0
        self.status_at_end = 0
        self.start()

    def run(self) -> None:
        last = ""
        while not self.events or self.events[-1].type != "stream.end":
            try:
                with self._tree.stream(
                    self._run, headers={"Last-Event-ID": last} if last else {}
                ) as response:
                    self.status_at_end = response.status
                    if response.status != 200:
                        return
                    self.connections += 1
                    for event in response.events():
                        self.events.append(event)
                        last = event.id
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)  # a reconnecting client's pause, not a wait for a state

    def finish(self, seconds: float) -> list[SseEvent]:
        self.join(seconds)
        assert not self.is_alive(), f"still reading; {len(self.events)} events, last {self.events[-1:]}"
        return self.events

    def wait_for(self, count: int, seconds: float = 20.0) -> None:
        eventually(lambda: len(self.events) >= count, seconds, f"{count} events")


def assert_whole(events: list[SseEvent], steps: int) -> None:
    """Every id once and in order, every step once, the right end."""
    assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
    assert [event.json["step"] for event in events if event.type == "progress"] == list(range(1, steps + 1))
    assert events[-1].type == "stream.end"
    assert events[-1].json["status"] == "SUCCESSFUL"
    assert {event.json["_attempt"] for event in events} == {1}


def test_a_client_resumes_over_the_death_of_the_gateway(tree: Tree) -> None:
    run = tree.submit("demo.count", n=2000, delay=0.005)["id"]
    follower = Follower(tree, run)
    for seen in (200, 700, 1200):
        follower.wait_for(seen)
        tree.kill("gateway")
    events = follower.finish(40)
    assert_whole(events, 2000)
    assert follower.connections >= 4
    assert tree.wait(run)["status"] == "SUCCESSFUL"


def test_a_stopped_gateway_is_replaced(tree: Tree) -> None:
    """It does not beat: it is killed, and its pipes go to the next."""
    run = tree.submit("demo.count", n=300, delay=0.05)["id"]
    follower = Follower(tree, run)
    follower.wait_for(20)
    stopped = tree.kill("gateway", signal.SIGSTOP)
    eventually(lambda: tree.child("gateway").pid != stopped, 15, "another gateway")
    assert_whole(follower.finish(40), 300)


@pytest.mark.alone
@pytest.mark.parametrize("victim", ["zygote", "courier"])
def test_streams_do_not_notice_the_death_of(tree: Tree, victim: str) -> None:
    run = tree.submit("demo.count", n=60, delay=0.05)["id"]
    follower = Follower(tree, run)
    follower.wait_for(10)
    killed_at = time.monotonic()
    tree.kill(victim)
    answer = tree.submit("demo.count", n=1, delay=0)
    assert tree.wait(answer["id"], 2.0)["status"] == "SUCCESSFUL"
    assert time.monotonic() - killed_at < 2.0
    events = follower.finish(20)
    assert_whole(events, 60)
    assert follower.connections == 1
    gaps = [after.at - before.at for before, after in itertools.pairwise(events)]
    assert max(gaps) < 0.3, f"largest gap {max(gaps):.3f} s"
    eventually(lambda: tree.child(victim).state == "RUNNING", 10, f"another {victim}")


@pytest.mark.alone
def test_submissions_work_within_two_seconds_of_all_three_deaths(tree: Tree) -> None:
    for victim in ("zygote", "courier", "gateway"):
        tree.kill(victim)
    started = time.monotonic()

    def submitted() -> str | None:
        try:
            return str(tree.submit("demo.count", n=1, delay=0)["id"])
        except (httpx.TransportError, AssertionError):
            return None

    run = eventually(submitted, 5, "a submission that is accepted")
    assert tree.wait(run, 5)["status"] == "SUCCESSFUL"
    assert time.monotonic() - started < 3.0


def test_a_runner_and_the_gateway_die_together_and_nothing_written_is_lost(tree: Tree) -> None:
    run = tree.submit("demo.count", n=5000, delay=0.002)["id"]
    follower = Follower(tree, run)
    follower.wait_for(100)
    runner = next(event for event in follower.events if event.type == "run.started").json["pid"]
    gateway = tree.child("gateway").pid
    os.kill(gateway, signal.SIGSTOP)  # from here on, what the runner writes is only in its pipe
    time.sleep(0.3)
    os.kill(runner, signal.SIGKILL)
    os.kill(gateway, signal.SIGKILL)
    events = follower.finish(20)
    steps = [event.json["step"] for event in events if event.type == "progress"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 150, "what the runner wrote while the gateway stood still is missing"
    assert events[-1].json["error"]["cause"]["signal"] == "SIGKILL"


def test_every_kill_leaves_the_pool_full(tree: Tree) -> None:
    def idle() -> bool:
        runners = tree.http.get("/api/v1/runners").json()["runners"]
        return sum(r["state"] == "IDLE" and r["role"] == "runner" for r in runners) >= 4

    eventually(idle, 5, "four idle runners")
    for child in [child for child in tree.status().children if child.kind.startswith("runner")]:
        os.kill(child.pid, signal.SIGKILL)
    eventually(idle, 5, "four idle runners again")


def test_nothing_is_accepted_into_a_store_that_was_removed(tree: Tree) -> None:
    """Its descriptors still work: it would answer 202, and all of it would be gone with the gateway."""
    wal = tree.state_dir / "store.sqlite3-wal"
    kept = wal.rename(wal.with_name("kept"))
    answer = tree.http.post("/api/v1/runs", json={"task": "demo.count", "kwargs": {"n": 1, "delay": 0}})
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    eventually(lambda: "removed or replaced" in "".join(tree.status().notes), 5, "a note that says so")
    kept.rename(wal)
    eventually(lambda: not tree.status().notes, 5, "a store that is there again")
    assert tree.wait(tree.submit("demo.count", n=1, delay=0)["id"])["status"] == "SUCCESSFUL"


def test_a_supervisor_that_is_late_takes_no_death_for_a_failed_start(tree: Tree) -> None:
    """It hears of a runner's death before it reads that this runner had work: the pool must not wait for that."""
    said = "died before it had work"
    before, ended = tree.tail(1_000_000).count(said), 0
    for _ in range(6):
        os.kill(tree.pid, signal.SIGSTOP)
        run = tree.submit("demo.count", n=1, delay=0)["id"]
        time.sleep(0.08)  # the run begins and ends meanwhile
        os.kill(tree.pid, signal.SIGCONT)
        ended += tree.wait(run, 10)["status"] == "SUCCESSFUL"
    assert ended == 6
    assert tree.tail(1_000_000).count(said) == before
