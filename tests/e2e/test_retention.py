"""A store that keeps little stays small under a flood, and nobody who streams notices."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, SseEvent, Tree, eventually

#: Bytes of events that the small tree keeps, and what its file may have: the events, their index, what came in between
#: two passes, and pages that are free to be used again.
KEPT = 1_000_000
BOUND = 7_000_000

#: Events of the flood: with their overhead 12 times what is kept.
FLOOD = 60_000

#: Seconds between two events of the calm stream.
CALM = 0.02


def small(state_dir: Path | None = None, **keep: Any) -> Tree:
    """Return a tree that keeps little, and looks often."""
    retention = {"every_seconds": 0.2, **keep}
    env = {"TASKKIT_RETENTION": json.dumps(retention), "TASKKIT_RESULT_TTL": "1"}
    return Tree(state_dir, env=env, runners=3)


class Calm(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, tree: Tree, run: str) -> None:
        super().__init__()
        self._stream = tree.stream(run, timeout=60)
        self.events: list[SseEvent] = []
        self.start()

    def run(self) -> None:
        with self._stream as stream:
            self.events += stream.events()

    def largest_gap(self) -> float:
        """Return the longest time between two events of the task, in seconds."""
        self.join(60)
        times = [event.at for event in self.events if event.type == "progress"]
        return max(after - before for before, after in itertools.pairwise(times))


def stats(tree: Tree) -> dict[str, Any]:
    response = tree.http.get("/api/v1/stats")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def event_bytes(tree: Tree) -> float:
    """Return the bytes of events that the store has; infinity before they were weighed."""
    found = stats(tree)["store"]["event_bytes"]
    return float("inf") if found is None else float(found)


def flood_beside_a_calm_stream(tree: Tree) -> tuple[float, int, str]:
    """Return (largest gap of the calm stream in seconds, largest file in bytes, the flood's run)."""
    calm = Calm(tree, tree.submit("proj.count", n=200, delay=CALM)["id"])
    flood = tree.submit("proj.count", n=FLOOD)["id"]
    largest = 0
    deadline = time.monotonic() + 60
    while tree.snapshot(flood)["status"] != "SUCCESSFUL":
        assert time.monotonic() < deadline
        largest = max(largest, (tree.state_dir / "store.sqlite3").stat().st_size)
        time.sleep(0.05)
    gap = calm.largest_gap()
    assert [event.id for event in calm.events] == [str(n) for n in range(1, 203)], "nothing is missing"
    return gap, largest, flood


def test_the_file_stays_small_and_streams_do_not_notice() -> None:
    with Tree(runners=3) as tree:
        gap_without, large, _ = flood_beside_a_calm_stream(tree)
    with small(event_bytes=KEPT) as tree:
        gap_with, largest, flood = flood_beside_a_calm_stream(tree)
        eventually(lambda: event_bytes(tree) <= KEPT, 10, "a pass behind the flood")
        store = stats(tree)
        assert store["retention"]["total"]["events"] > FLOOD / 2
        assert (tree.state_dir / "store.sqlite3").stat().st_size < BOUND

        # Whoever comes late hears what is missing, and misses nothing behind it.
        events = tree.events(flood)
        reset = events[0]
        assert (reset.type, reset.json["reason"]) == ("stream.reset", "trimmed")
        assert [int(event.id) for event in events] == list(range(reset.json["from"] - 1, FLOOD + 3))
        assert events[-1].json == {**events[-1].json, "status": "SUCCESSFUL", "result": FLOOD}
    print(
        f"RECORD retention: largest gap of a stream at {1 / CALM:.0f}/s beside a flood {gap_without * 1e3:.0f} ms, "
        f"with its events removed meanwhile {gap_with * 1e3:.0f} ms; "
        f"file {large / 1e6:.1f} MB, then {largest / 1e6:.1f} MB"
    )
    assert largest < BOUND < large
    assert gap_with < max(1.0, 10 * gap_without)


def test_a_live_follower_that_cannot_keep_up_is_told() -> None:
    with small(event_bytes=200_000) as tree:
        run = tree.submit("proj.count", n=60_000)["id"]
        with tree.stream(run, timeout=60) as stream:
            eventually(
                lambda: stats(tree)["retention"]["total"]["events"] > 20_000, 30, "events to be removed"
            )
            events = list(stream.events())  # nothing was read until here; the kernel holds some hundred KB
        ids = [int(event.id) for event in events]
        resets = [event for event in events if event.type == "stream.reset"]
        assert resets, "it was behind what is kept"
        assert {event.json["reason"] for event in resets} == {"trimmed"}
        for before, event in itertools.pairwise(events):
            expected = event.json["from"] - 1 if event.type == "stream.reset" else int(before.id) + 1
            assert int(event.id) == expected
        assert ids[-1] == 60_002
        assert events[-1].type == "stream.end"


def test_results_go_then_runs_and_what_is_open_stays() -> None:
    with small(run_age_seconds=4, event_age_seconds=2, key_age_seconds=2) as tree:
        is_open = tree.submit("proj.patient", seconds=60)["id"]
        done = tree.http.post(
            "/api/v1/runs",
            json={"task": "proj.echo", "kwargs": {"value": "x" * 200_000}},
            headers={"Idempotency-Key": "k"},
        ).json()["id"]
        tree.wait(done)
        blobs = tree.state_dir / "blobs"

        def result() -> int:
            return tree.http.get(f"/api/v1/runs/{done}/result").status_code

        eventually(lambda: result() == 410, 10, "the result to be removed")
        problem = tree.http.get(f"/api/v1/runs/{done}/result").json()
        assert problem["type"] == "urn:bulkhead:problem:result-expired"
        assert "RESULT_TTL" in problem["detail"]
        snapshot = tree.snapshot(done)
        assert (snapshot["status"], snapshot["result"], snapshot["result_expired"]) == (
            "SUCCESSFUL",
            None,
            True,
        )
        eventually(lambda: result() == 404, 10, "the run to be removed")
        assert done not in {run["id"] for run in tree.http.get("/api/v1/runs").json()["runs"]}
        eventually(lambda: not list(blobs.iterdir()), 20, "the large value's file to be removed")

        snapshot = tree.snapshot(is_open)
        assert snapshot["status"] == "RUNNING"
        assert snapshot["offsets"]["first"] == snapshot["offsets"]["last"] == 2, "the newest stays"
        tree.http.post(f"/api/v1/runs/{is_open}/cancel")
        assert tree.wait(is_open)["status"] == "CANCELLED"
        again = tree.http.post(
            "/api/v1/runs",
            json={"task": "proj.echo", "kwargs": {"value": 2}},
            headers={"Idempotency-Key": "k"},
        )
        assert again.status_code == 202, "the key went with its run"


def command(tree: Tree, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supervisor", *words, "--state-dir", str(tree.state_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=tree.environment(),
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_makes_the_file_smaller(tmp_path: Path, as_json: bool) -> None:
    with Tree(tmp_path) as tree:
        run = tree.submit("proj.count", n=20_000)["id"]
        tree.wait(run, 60)
    with small(tmp_path, event_bytes=1_000) as tree:
        eventually(lambda: event_bytes(tree) <= 1_000, 20, "all but the newest to be removed")
        before = stats(tree)["store"]
        assert before["free_bytes"] > 500_000
        file: Path = tree.state_dir / "store.sqlite3"
        refused = tree.client(actions=["read"]).post("/api/v1/vacuum")
        assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
        done = command(tree, "vacuum", *(("--json",) if as_json else ()))
        assert done.returncode == 0, done.stderr
        if as_json:
            answer = json.loads(done.stdout)
            assert answer["freed_bytes"] > 500_000
            assert answer["free_bytes"] == 0
        else:
            assert "Freed" in done.stdout
        eventually(lambda: file.stat().st_size < before["file_bytes"] - 500_000, 10, "the file to be cut")
        assert tree.events(run)[-1].type == "stream.end"
