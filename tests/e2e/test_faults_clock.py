"""A wall clock that jumps by hours under a tree: streams, deadlines, waiting runs do not notice.

Only the machine's own clock could jump for real, so every process of the tree gets a `time.time` that adds what the
test says: Python imports a `sitecustomize` at each start.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, SseEvent, Tree, eventually

#: Seconds of a jump.
HOUR = 3600.0

#: Largest gap of a stream of 100 events a second, seconds: the bound of the other fault tests.
LARGEST_GAP = 1.0

#: A file's time says how far the clock is off: a stat needs no descriptor, and the zygote closes those it finds.
ZERO = 1_000_000_000

SITECUSTOMIZE = f"""
import os, time
_time, _file = time.time, os.environ["BULKHEAD_TEST_CLOCK"]

def _jumped():
    return _time() + os.stat(_file).st_mtime - {ZERO}

time.time = _jumped
time.time_ns = lambda: int(_jumped() * 1e9)
"""


class Clock:
    """The wall clock of a tree's processes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self._file.touch()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.environment = {
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "BULKHEAD_TEST_CLOCK": str(self._file),
        }
        self.jump(0.0)

    def jump(self, off: float) -> None:
        """Set it, from now on, that many seconds off."""
        self.off = off
        os.utime(self._file, (0, ZERO + off))

    def text(self, later: float) -> str:
        """Return a moment in RFC 3339, as these processes count."""
        moment = datetime.datetime.fromtimestamp(time.time() + self.off + later, datetime.UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def tree(clock: Clock) -> Iterator[Tree]:
    with Tree(runners=2, env=clock.environment) as tree:
        # Tokens are the exception, so these are valid on both sides of every jump.
        claims = {"now": time.time() - 3 * HOUR, "ttl": 9 * HOUR}
        tree.__dict__["http"] = tree.client(**claims)
        yield tree


def follow(tree: Tree, run: str) -> list[SseEvent]:
    with tree.stream(run, token=tree.token(now=time.time() - 3 * HOUR, ttl=9 * HOUR), timeout=20) as response:
        return list(response.events())


def submit(tree: Tree, task: str, **body: Any) -> str:
    answer = tree.http.post("/api/v1/runs", json={"task": task, **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def status(tree: Tree, run: str) -> str:
    return str(tree.snapshot(run)["status"])


def created(tree: Tree, run: str) -> float:
    return datetime.datetime.fromisoformat(tree.snapshot(run)["created_at"]).timestamp()


@pytest.mark.alone
def test_jumps_change_nothing(tree: Tree, clock: Clock) -> None:
    """Forth and back by an hour while one run speaks, one has a deadline, one waits for a runner."""
    processes = [tree.child(name).pid for name in ("gateway", "courier", "zygote")]
    with ThreadPoolExecutor(1) as threads:
        speaks = submit(tree, "proj.count", kwargs={"n": 600, "delay": 0.01}, timeout=30)
        following = threads.submit(follow, tree, speaks)
        limited = submit(tree, "proj.patient", timeout=60)
        eventually(lambda: status(tree, limited) == "RUNNING", 10, "both at work")
        waits = submit(tree, "proj.echo", kwargs={"value": 1})
        for off in (HOUR, -HOUR, 0.0, HOUR):
            clock.jump(off)
            time.sleep(0.7)
            assert (status(tree, limited), status(tree, waits)) == ("RUNNING", "READY")
        clock.jump(-HOUR)
        events = following.result(timeout=30)
        assert tree.wait(waits, 5)["status"] == "SUCCESSFUL", "a run that waited for a runner only has one"
        later = submit(tree, "proj.echo", kwargs={"value": 2})
        assert tree.wait(later, 5)["status"] == "SUCCESSFUL"
        assert created(tree, later) < time.time() - HOUR / 2, "the clock did jump"
    assert [int(event.id) for event in events] == list(range(1, 603))
    assert events[-1].json["status"] == "SUCCESSFUL"
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(events)]
    assert max(gaps) < LARGEST_GAP
    tree.http.post(f"/api/v1/runs/{limited}/cancel", json={"grace": 0.2})
    assert tree.wait(limited, 5)["status"] == "CANCELLED", "graces are counted by another clock"
    assert [tree.child(name).pid for name in ("gateway", "courier", "zygote")] == processes


def test_a_deadline_is_kept_whatever_the_clock_says(tree: Tree, clock: Clock) -> None:
    run = submit(tree, "proj.sleepy", kwargs={"seconds": 60}, timeout=2)
    eventually(lambda: status(tree, run) == "RUNNING", 10, "at work")
    clock.jump(-HOUR)
    ended = tree.wait(run, 10)
    assert (ended["status"], ended["attempts"][0]["ending"]) == ("FAILED", "timed_out")


def test_a_wish_for_a_time_goes_by_the_wall_clock(tree: Tree, clock: Clock) -> None:
    """It is people's: who sets the clock forth has the run at that time."""
    run = submit(tree, "proj.echo", kwargs={"value": 1}, run_after=clock.text(HOUR))
    time.sleep(0.5)
    assert status(tree, run) == "READY"
    clock.jump(HOUR + 10)
    assert tree.wait(run, 5)["status"] == "SUCCESSFUL", "within the second in which the gateway looks"
