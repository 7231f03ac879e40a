"""Schedules with real trees: over HTTP, through restarts, changes of the clock, two trees on one database."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from taskkit import failpoints
from tests.e2e.test_faults_clock import Clock
from tests.faults import Postgres
from tests.helpers import Tree, eventually

HOUR = 3600.0
API = "/api/v1/schedules"


def make(tree: Tree, task: str = "proj.echo", **given: Any) -> dict[str, Any]:
    answer = tree.http.post(API, json={"task": task, **given})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def runs_of(tree: Tree, schedule: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of a schedule, oldest first."""
    answer = tree.http.get(schedule["urls"]["runs"])
    assert answer.status_code == 200, answer.text
    return list(reversed(answer.json()["runs"]))


def unix(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def steps(slots: Sequence[float]) -> list[float]:
    """Return the seconds from each slot to the next."""
    return [later - earlier for earlier, later in itertools.pairwise(slots)]


def query(tree: Tree, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{tree.database}?mode=ro", uri=True, timeout=5)) as connection:
        return connection.execute(statement, values).fetchall()


def slots_of(tree: Tree, schedule: dict[str, Any]) -> list[int]:
    """Return the slots of a schedule that have rows, as SQLite has them."""
    statement = "SELECT at FROM taskkit_slot WHERE schedule_id = ? ORDER BY at"
    return [at for (at,) in query(tree, statement, schedule["id"].replace("-", ""))]


# --- over HTTP


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    with Tree(runners=2) as tree:
        yield tree


def test_an_interval_is_kept_within_a_second(tree: Tree) -> None:
    made = make(tree, every=1, kwargs={"value": 7}, priority=5)
    runs = eventually(lambda: (found := runs_of(tree, made)) and len(found) >= 3 and found, 10, "three runs")
    tree.http.post(made["urls"]["disable"])
    assert [run["priority"] for run in runs] == [5] * len(runs)
    slots = [unix(run["metadata"]["slot"]) for run in runs]
    assert steps(slots) == [1.0] * (len(runs) - 1)
    for run, slot in zip(runs, slots, strict=True):
        assert 0 <= unix(run["created_at"]) - slot < 1.0, "SEEDS row 78"
    assert tree.wait(runs[0]["id"])["result"] == 7


def test_a_single_moment_is_kept_once(tree: Tree) -> None:
    at = (dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    made = make(tree, at=at)
    eventually(lambda: runs_of(tree, made), 6, "its run")
    time.sleep(1.5)
    assert len(runs_of(tree, made)) == 1
    shown = tree.http.get(made["urls"]["self"]).json()
    assert (shown["next_at"], shown["last_at"]) == (None, at.replace("Z", ".000Z"))
    again = tree.http.post(API, json={"task": "proj.echo", "at": at})
    assert (again.status_code, again.json()["id"]) == (200, made["id"])


def test_an_impossible_date_is_refused_at_once(tree: Tree) -> None:
    tree.http.get("/health")
    began = time.monotonic()
    answer = tree.http.post(API, json={"task": "proj.echo", "cron": "0 0 31 2 *"})
    elapsed = time.monotonic() - began
    assert answer.status_code == 422
    assert "is never due" in answer.json()["errors"]["cron"]
    assert elapsed < 5, "SEEDS row 77 asks for 50 ms, which the unit test holds of the CPU"


def test_everything_is_reachable(tree: Tree) -> None:
    """SEEDS row 80: in the seed, two of these were 404."""
    made = make(
        tree, cron="30 3 * * MON-FRI", tz="Europe/Berlin", name="weekdays", overlap="allow", catchup="none"
    )
    assert made["tz"] == "Europe/Berlin"
    assert dt.datetime.fromisoformat(made["next_at"]).astimezone(dt.UTC).weekday() < 5
    listed = tree.http.get(API).json()["schedules"]
    assert made in listed
    assert tree.http.get(made["urls"]["self"]).json() == made
    off = tree.http.post(made["urls"]["disable"]).json()
    assert (off["enabled"], off["next_at"]) == (False, None)
    assert tree.http.post(made["urls"]["enable"]).json() == made
    taken = tree.http.post(API, json={"task": "proj.echo", "every": 5, "name": "weekdays"})
    assert (taken.status_code, taken.json()["type"]) == (409, "urn:bulkhead:problem:schedule-conflict")
    assert tree.http.delete(made["urls"]["self"]).status_code == 204
    assert tree.http.get(made["urls"]["self"]).status_code == 404
    assert tree.http.request("PUT", made["urls"]["self"]).headers["allow"] == "GET, HEAD, DELETE, OPTIONS"


def test_a_slow_task_is_performed_one_at_a_time(tree: Tree) -> None:
    """SEEDS row 81, in both ways: what comes too early is left out, or waits."""
    for overlap in ("skip", "queue"):
        made = make(tree, "proj.sleepy", every=1, kwargs={"seconds": 1.5}, overlap=overlap)
        eventually(lambda made=made: len(runs_of(tree, made)) >= 3, 15, f"three runs with {overlap}")
        tree.http.post(made["urls"]["disable"])
        ended = [tree.wait(run["id"]) for run in runs_of(tree, made)[:3]]
        for earlier, later in itertools.pairwise(ended):
            assert unix(earlier["finished_at"]) <= unix(later["started_at"])
        slots = [unix(run["metadata"]["slot"]) for run in ended]
        if overlap == "queue":
            assert slots == [slots[0], slots[0] + 1, slots[0] + 2], "in their order, none left out"
        else:
            assert slots[1] - slots[0] >= 2


def test_what_the_code_declares_is_there_and_stays(tree: Tree) -> None:
    [found] = [one for one in tree.http.get(API).json()["schedules"] if one["origin"] == "code"]
    assert (found["name"], found["cron"], found["tz"]) == ("proj.yearly", "0 0 29 2 *", "Europe/Berlin")
    assert (found["kwargs"], found["overlap"], found["catchup"]) == ({"what": "leap"}, "queue", "none")
    assert found["next_at"].endswith("-02-28T23:00:00.000Z")
    refused = tree.http.delete(found["urls"]["self"])
    assert (refused.status_code, "disable it" in refused.json()["detail"]) == (409, True)


def test_a_token_reaches_what_its_runs_are(tree: Tree) -> None:
    mine = make(tree, every=3600, kwargs={"value": "mine"})
    narrow = tree.client(actions=["submit", "read"], tasks=["proj.add"], runs=[])
    assert narrow.get(API).json()["schedules"] == []
    for method, url in (("GET", "self"), ("POST", "enable"), ("POST", "disable"), ("DELETE", "self")):
        assert narrow.request(method, mine["urls"][url]).status_code == 404
    assert narrow.post(API, json={"task": "proj.echo", "every": 5}).status_code == 403
    own = tree.client(actions=["read"], tasks=[], runs="own", subject="somebody else")
    assert own.get(mine["urls"]["self"]).status_code == 404
    tree.http.delete(mine["urls"]["self"])


def test_the_command_line_lists_and_switches(tree: Tree) -> None:
    made = make(tree, every=3600, name="cli")

    def bulkhead(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "supervisor", "schedules", *arguments, "--json"]
        where = ["--settings", "tests.project.settings", "--state-dir", str(tree.state_dir)]
        done = subprocess.run(
            [*command, *where], env=tree.environment(), capture_output=True, text=True, timeout=30, check=True
        )
        return dict(json.loads(done.stdout))

    assert made in bulkhead()["schedules"]
    assert bulkhead("--disable", made["id"])["enabled"] is False
    assert bulkhead("--enable", made["id"])["enabled"] is True
    assert bulkhead("--delete", made["id"]) == {"id": made["id"], "deleted": True}


# --- what was missed, restarts


def test_schedules_survive_a_restart_and_make_up_for_it(tmp_state_dir: Path) -> None:
    with Tree(tmp_state_dir) as tree:
        latest = make(tree, every=1, catchup="latest", kwargs={"value": "latest"})
        everything = make(tree, every=1, catchup="all", overlap="allow", kwargs={"value": "all"})
        eventually(lambda: runs_of(tree, everything) and runs_of(tree, latest), 10, "the first runs")
    time.sleep(3)
    with Tree(tmp_state_dir) as tree:
        again = time.time()
        eventually(lambda: slots_of(tree, everything)[-1] > again + 1, 10, "a slot of now")
        slots = slots_of(tree, everything)
        assert slots == list(range(slots[0], slots[-1] + 1)), "each of them"
        assert max(steps(slots_of(tree, latest))) >= 3, "what was missed was made up for by one"


# --- the wall clock


def test_each_slot_once_through_both_changes_of_the_clock(tmp_path: Path, tmp_state_dir: Path) -> None:
    """Berlin, 2027: on 28 March no 02:30, on 31 October two of them. What a clock shows makes them due, once."""
    clock = Clock(tmp_path)
    spring, autumn = unix("2027-03-28T01:00:00Z"), unix("2027-10-31T00:30:00Z")

    def show(moment: float) -> None:
        clock.jump(moment - time.time())

    show(spring - HOUR)
    with Tree(tmp_state_dir, env=clock.environment) as tree:
        tree.__dict__["http"] = tree.client(now=spring - 2 * HOUR, ttl=350 * 86_400.0)
        made = make(tree, cron="30 2 * * *", tz="Europe/Berlin", catchup="none", overlap="allow")
        assert unix(made["next_at"]) == spring, "behind the gap: 03:00 summer time"
        show(spring - 1.5)
        eventually(lambda: slots_of(tree, made) == [spring], 8, "the slot behind the gap")
        show(autumn - HOUR)  # seven months later: nothing is made up for
        time.sleep(1.5)
        show(autumn - 1.5)
        eventually(lambda: slots_of(tree, made) == [spring, autumn], 8, "the first 02:30")
        show(autumn + HOUR - 1.5)
        time.sleep(3.5)
        show(autumn - 0.5)  # the clock is set back over the very slot
        time.sleep(2.5)
        assert slots_of(tree, made) == [spring, autumn], "not at the second 02:30, nor once more"
        rows = query(tree, "SELECT metadata FROM taskkit_run")
        assert Counter(json.loads(row)["slot"] for (row,) in rows).most_common(1)[0][1] == 1


# --- two trees, one database

#: Schedules of every second, seconds for which two trees keep them.
SECONDLY, KEPT_FOR = 8, 9.0


def test_two_trees_on_one_postgresql_keep_each_slot_once(tmp_path: Path) -> None:
    """One tree's courier is killed with a slot written and not committed, another time with it committed; then the
    whole tree."""
    points = tmp_path / "points"
    points.mkdir()
    with Postgres() as server:
        server.migrate()
        armed = {failpoints.VARIABLE: str(points)}
        with Tree(env=server.environment()) as stays, Tree(env=server.environment() | armed) as dies:
            made = [
                make(stays, every=1, kwargs={"value": number}, catchup="all", overlap="allow")
                for number in range(SECONDLY)
            ]
            began = time.monotonic()
            for point in ("schedule.fired", "schedule.committed", "schedule.due"):
                (points / point).write_text("kill")
                eventually((points / f"{point}{failpoints.ACTED}").exists, 10, f"a courier killed at {point}")
                time.sleep(1.0)
            dies.process.send_signal(signal.SIGKILL)
            dies.process.wait()
            time.sleep(max(0.0, KEPT_FOR - (time.monotonic() - began)))
            for schedule in made:
                assert stays.http.post(schedule["urls"]["disable"]).status_code == 200
            check_slots(server, made)


def check_slots(server: Postgres, made: list[dict[str, Any]]) -> None:
    """Every second has one row with one run of its own, from the first slot to the last."""
    with psycopg.connect(f"host={server.folder} user=bulkhead dbname=bulkhead") as connection:
        slots = connection.execute("SELECT schedule_id, at, state, run FROM taskkit_slot").fetchall()
        runs = connection.execute("SELECT id, tags, metadata FROM taskkit_run").fetchall()
    by_run = {run: (tags[-1], metadata["slot"]) for run, tags, metadata in runs}
    assert len(set(by_run.values())) == len(runs) == len(slots), "no slot has two runs, none is without"
    for schedule in made:
        own = sorted((at, run) for id, at, _, run in slots if str(id) == schedule["id"])
        seconds = [at for at, _ in own]
        assert seconds == list(range(seconds[0], seconds[-1] + 1))
        assert seconds[0] == unix(schedule["next_at"])
        assert len(seconds) >= KEPT_FOR - 2
        for at, run in own:
            tag, slot = by_run[run]
            assert (tag, unix(slot)) == (f"schedule:{schedule['id']}", at)
