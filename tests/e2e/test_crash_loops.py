"""What kills its processes again and again is stopped, named, and released by hand; nobody else waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import ROOT, Tree, eventually

#: Five crashes trip a task for so long, seconds, that the other tests of the tree are over; one test waits for it.
PAUSE = 4.0

POOLS = {
    "default": {"runners": 2},
    "capped": {"runners": 1, "cpu_limit": 1},
    "shared": {"runners": 8, "concurrency": 8, "runs": 1000, "nice": 0},
}
BREAKER = {"crashes": 5, "period": 60.0, "pause": PAUSE, "longest_pause": 60.0}
ENVIRONMENT = {"TASKKIT_BREAKER": json.dumps(BREAKER), "TASKKIT_POOLS": json.dumps(POOLS)}


class BareTree(Tree):
    """A tree whose pools come from the environment alone."""

    def command(self) -> list[str]:
        """Return the command line without `--runners`, which would stand over POOLS."""
        words = super().command()
        at = words.index("--runners")
        return words[:at] + words[at + 2 :]


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with BareTree(env=ENVIRONMENT) as running:
        yield running


def submit(tree: Tree, task: str, **body: Any) -> str:
    """Submit a run with any options; return its id."""
    response = tree.http.post("/api/v1/runs", json={"task": task, **body})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def bulkhead(tree: Tree, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line about this tree."""
    return subprocess.run(
        [sys.executable, "-m", "supervisor", *words, "--state-dir", str(tree.state_dir)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=ROOT,
        env=tree.environment(),
    )


def notes(tree: Tree, word: str) -> list[str]:
    return [note for note in tree.status().notes if word in note]


def stats(tree: Tree) -> dict[str, Any]:
    answer: dict[str, Any] = tree.http.get("/api/v1/stats").json()
    return answer


def kill_gateway(tree: Tree) -> None:
    """Kill the gateway; return when the next one serves."""
    killed = tree.kill("gateway")

    def serves() -> bool:
        child = tree.child("gateway")
        return child.pid != killed and child.state == "RUNNING"

    eventually(serves, 15, "another gateway")
    tree.http.close()
    del tree.http  # its connections went with the gateway


def running_in(tree: Tree, run: str) -> int:
    """Return the pid of the process that performs a run."""
    attempts = tree.snapshot(run)["attempts"]
    return int(attempts[-1]["pid"]) if attempts and attempts[-1]["started_at"] else 0


def endings(snapshot: dict[str, Any]) -> list[str]:
    return [str(attempt["ending"]) for attempt in snapshot["attempts"]]


# -- quarantine


def test_a_run_that_kills_three_runners_is_quarantined_and_released_as_a_new_one(tree: Tree) -> None:
    run = submit(tree, "proj.die", kwargs={"number": 11}, max_attempts=10, metadata={"who": "ann"})
    snapshot = tree.wait(run, 20)
    assert (snapshot["status"], endings(snapshot)) == ("FAILED", ["crashed"] * 3)
    error = snapshot["error"]
    assert (error["code"], error["crashes"], error["cause"]["signal"]) == ("quarantined", 3, "SIGSEGV")
    assert f"bulkhead release {run}" in error["message"]
    assert tree.events(run)[-1].json["error"] == error
    (note,) = eventually(lambda: notes(tree, "quarantine"), 5)
    assert run in note
    assert run in [row["run"] for row in stats(tree)["quarantined"]]

    released = bulkhead(tree, "release", run)
    assert released.returncode == 0, released.stderr
    made = released.stdout.splitlines()[0]
    fresh = tree.snapshot(made)
    assert (fresh["replay_of"], fresh["task"], fresh["metadata"]) == (run, "proj.die", {"who": "ann"})
    assert bulkhead(tree, "release", run).stdout.splitlines()[0] == made, "the second time it is the same"
    assert run not in "".join(notes(tree, "quarantine"))
    tree.http.post(f"/api/v1/runs/{made}/cancel")
    tree.wait(made)


def test_only_quarantined_runs_are_released_but_any_ended_one_is_replayed(tree: Tree) -> None:
    run = tree.submit("proj.add", a=1, b=2)["id"]
    tree.wait(run)
    refused = bulkhead(tree, "release", run)
    assert (refused.returncode, "not in quarantine" in refused.stderr) == (1, True)
    response = tree.http.post(f"/api/v1/runs/{run}/replay")
    assert response.status_code == 202
    made = response.json()["id"]
    assert response.headers["location"] == f"/api/v1/runs/{made}"
    snapshot = tree.wait(made)
    assert (snapshot["result"], snapshot["replay_of"]) == (3, run)


# -- the breaker


def test_a_task_that_keeps_crashing_is_held_and_tried_again(tree: Tree, tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    crashed = [tree.submit("proj.die_while", path=str(flag))["id"] for _ in range(5)]
    assert {tree.wait(run)["status"] for run in crashed} == {"FAILED"}
    waiting = [tree.submit("proj.die_while", path=str(flag))["id"] for _ in range(3)]
    assert tree.wait(tree.submit("proj.add", a=1, b=1)["id"])["result"] == 2, "other tasks of the pool go on"
    assert [tree.snapshot(run)["status"] for run in waiting] == ["READY"] * 3
    (held,) = [row for row in stats(tree)["held"] if row["task"] == "proj.die_while"]
    assert held["crashes"] == 5
    assert 0 < held["remaining"] <= PAUSE
    assert "SIGSEGV" in held["cause"]
    (note,) = eventually(lambda: notes(tree, "held back"), 5)
    assert "proj.die_while" in note
    assert "proj.die_while is held back" in bulkhead(tree, "status").stdout

    kill_gateway(tree)
    assert eventually(lambda: notes(tree, "held back"), 5), "it has not forgotten"
    assert tree.http.post(f"/api/v1/runs/{waiting[2]}/cancel").status_code == 202
    assert tree.wait(waiting[2])["status"] == "CANCELLED", "a held run can be cancelled"

    first = tree.wait(waiting[0], PAUSE + 15)
    assert first["status"] == "FAILED", "the one on trial crashed, too"
    assert tree.snapshot(waiting[1])["status"] == "READY", "and no other was tried beside it"
    (held,) = [row for row in stats(tree)["held"] if row["task"] == "proj.die_while"]
    assert held["remaining"] > PAUSE, "the pause has doubled"

    flag.unlink()
    assert tree.wait(waiting[1], 2 * PAUSE + 15)["result"] == "survived"
    assert eventually(lambda: not notes(tree, "proj.die_while"), 5)
    assert tree.wait(tree.submit("proj.die_while", path=str(flag))["id"])["result"] == "survived"


def test_a_held_task_is_let_go_by_hand(tree: Tree, tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    flag.touch()
    for run in [tree.submit("proj.die_while", path=str(flag))["id"] for _ in range(5)]:
        tree.wait(run)
    flag.unlink()
    waiting = [tree.submit("proj.die_while", path=str(flag))["id"] for _ in range(3)]
    reset = bulkhead(tree, "reset", "proj.die_while")
    assert (reset.returncode, reset.stdout) == (0, "Task proj.die_while is held no longer.\n"), reset.stderr
    assert [tree.wait(run)["result"] for run in waiting] == ["survived"] * 3
    assert "was not held" in bulkhead(tree, "reset", "proj.die_while").stdout
    assert bulkhead(tree, "reset", "proj.nowhere").returncode == 1


# -- shared processes


def test_one_culprit_among_eight_is_found_and_the_seven_succeed(tree: Tree) -> None:
    neighbours = [submit(tree, "proj.asleepy", kwargs={"seconds": 2.0}, pool="shared") for _ in range(7)]
    eventually(lambda: len({running_in(tree, run) for run in neighbours} - {0}) == 1, 10, "one process")
    eventually(lambda: all(running_in(tree, run) for run in neighbours), 10, "all run")
    culprit = submit(tree, "proj.adie", pool="shared")
    snapshot = tree.wait(culprit, 30)
    assert snapshot["status"] == "FAILED"
    assert endings(snapshot) == ["lost", "crashed"], "first with others, then alone"
    assert snapshot["error"]["cause"]["signal"] == "SIGSEGV"
    found = [tree.wait(run, 40) for run in neighbours]
    assert {run["status"] for run in found} == {"SUCCESSFUL"}
    assert {tuple(endings(run)) for run in found} == {("lost", "returned")}
    alone = [run["attempts"][-1]["runner"] for run in [*found, snapshot]]
    assert len(set(alone)) == 8, "each was performed again in a process of its own"


def test_a_timeout_in_a_shared_process_is_no_concern_of_the_others(tree: Tree) -> None:
    neighbour = submit(tree, "proj.asleepy", kwargs={"seconds": 4.0}, pool="shared")
    pid = eventually(lambda: running_in(tree, neighbour), 10)
    polite = submit(tree, "proj.asleepy", kwargs={"seconds": 60}, pool="shared", timeout=0.5)
    stubborn = submit(tree, "proj.astubborn", pool="shared", timeout=0.5)
    for run in (polite, stubborn):
        snapshot = tree.wait(run, 20)
        assert (snapshot["status"], endings(snapshot)) == ("FAILED", ["timed_out"])
        assert snapshot["error"]["cause"]["kind"] == "timeout"
        assert snapshot["attempts"][0]["pid"] == pid
    assert "abandoned" in tree.snapshot(stubborn)["error"]["cause"]["detail"]
    assert tree.wait(neighbour, 20)["attempts"][0]["ending"] == "returned"
    eventually(
        lambda: not psutil.pid_exists(pid), 10, "the end of a process with nothing but an abandoned run"
    )


def test_a_cancelled_run_that_does_not_stop_leaves_its_neighbours_alone(tree: Tree) -> None:
    neighbour = submit(tree, "proj.asleepy", kwargs={"seconds": 5.0}, pool="shared")
    stubborn = submit(tree, "proj.astubborn", pool="shared")
    eventually(lambda: running_in(tree, stubborn) and running_in(tree, neighbour), 10)
    pid = running_in(tree, stubborn)
    assert running_in(tree, neighbour) == pid
    tree.http.post(f"/api/v1/runs/{stubborn}/cancel", json={"grace": 0.5})
    assert tree.wait(stubborn, 10)["status"] == "CANCELLED"
    later = submit(tree, "proj.asleepy", kwargs={"seconds": 0.1}, pool="shared")
    assert tree.wait(later, 20)["attempts"][0]["pid"] != pid, "the process gets no further run"
    kill_gateway(tree)  # the next one knows of the abandoned attempt only that the runner has to leave
    snapshot = tree.wait(neighbour, 20)
    assert (snapshot["status"], endings(snapshot)) == ("SUCCESSFUL", ["returned"])
    eventually(lambda: not psutil.pid_exists(pid), 10, "the end of its process")


# -- limits


def test_a_task_that_ignores_the_signal_of_its_cpu_limit_is_known_by_it_all_the_same(tree: Tree) -> None:
    run = submit(tree, "proj.spin_on", kwargs={"seconds": 60}, pool="capped")
    snapshot = tree.wait(run, 60)
    assert (snapshot["status"], endings(snapshot)) == ("FAILED", ["crashed"])
    cause = snapshot["error"]["cause"]
    assert (cause["kind"], cause["signal"]) == ("cpu_limit", "SIGKILL")


# -- the operator


def test_an_operator_ends_a_runner_and_its_run_begins_again(tree: Tree) -> None:
    run = tree.submit("proj.sleepy", seconds=8.0)["id"]  # longer than a command takes on a busy machine
    eventually(lambda: running_in(tree, run), 10)
    runner = tree.snapshot(run)["attempts"][0]["runner"]
    done = bulkhead(tree, "runners", "--kill", runner)
    assert done.returncode == 0, done.stderr
    snapshot = tree.wait(run, 40)
    assert endings(snapshot) == ["lost", "returned"]
    assert snapshot["attempts"][0]["cause"]["kind"] == "operator"


def test_a_drained_runner_finishes_what_it_has(tree: Tree) -> None:
    run = submit(tree, "proj.asleepy", kwargs={"seconds": 1.5}, pool="shared")
    pid = eventually(lambda: running_in(tree, run), 10)
    runner = tree.snapshot(run)["attempts"][0]["runner"]
    response = tree.http.post(f"/api/v1/runners/{runner}/drain")
    assert (response.status_code, response.json()) == (202, {"id": runner, "ordered": "drain"})
    other = submit(tree, "proj.asleepy", kwargs={"seconds": 0.1}, pool="shared")
    assert tree.wait(other, 10)["attempts"][0]["pid"] != pid
    assert endings(tree.wait(run, 10)) == ["returned"]
    eventually(lambda: not psutil.pid_exists(pid), 10)
    gone = tree.http.post(f"/api/v1/runners/{runner}/drain")
    assert (gone.status_code, gone.json()["type"]) == (404, "urn:bulkhead:problem:unknown-runner")


# -- a project in which no runner comes up


def test_runners_that_cannot_boot_are_made_later_and_later(tmp_path: Path) -> None:
    """A CPU limit above the hard one that the tree itself has: refused to each runner, found by nothing before."""

    class LimitedTree(BareTree):
        def command(self) -> list[str]:
            return ["sh", "-c", 'ulimit -t 1000 && exec "$@"', "sh", *super().command()]

    pools = json.dumps({"default": {"runners": 2, "cpu_limit": 5000}})
    with LimitedTree(env={"TASKKIT_POOLS": pools, "TASKKIT_INTAKE_RUNNERS": "0"}) as tree:
        (note,) = eventually(lambda: notes(tree, "no runner comes up"), 10)
        assert "the runner could not start: ValueError" in note
        run = tree.submit("proj.add", a=1, b=1)["id"]
        eventually(lambda: tree.log.read_text().count("died before it had work") >= 8, 15, "tries")
        assert tree.log.read_text().count("died before it had work") < 40, "no busy loop"
        assert "not allowed to raise maximum limit" in tree.log.read_text(), "the log has the traceback"
        assert tree.snapshot(run)["status"] == "READY", "nothing of it counts against a run"
        assert tree.snapshot(run)["attempts"] == []
