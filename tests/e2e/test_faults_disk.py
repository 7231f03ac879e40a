"""A disk that takes nothing for seconds: streams stay open, tasks wait, submissions are put off, nothing is lost."""

from __future__ import annotations

import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import Ballast, small_disk
from tests.helpers import ROOT, SseEvent, Tree, eventually, migrated_database

#: Bytes of the disk: room for the WAL (4 MiB until it is copied) and the store.
DISK = 16 * 1024 * 1024

#: Seconds that it is full: the acceptance line asks for 10. For a limit of the gateway's fewer show the same.
FULL, LIMITED = 10.0, 3.0

#: Seconds from there being room again to the next event at a client.
RESUMES = 3.0

#: Seconds between two events of the steady task, and how long beyond the fault's seconds it works.
PAUSE, BEYOND = 0.01, 5.0


@dataclass
class Place:
    """A tree on a disk that can be full.

    Attributes:
      full: keeps it from taking anything for the length of a block.
      how: what stands for a full disk.
    """

    tree: Tree
    full: Callable[[], AbstractContextManager[Any]]
    how: str


@contextmanager
def _tree(state_dir: Path, folder: Path) -> Iterator[Tree]:
    """Give a tree whose log and whose Django database are not in its state directory."""
    database = folder / "project.sqlite3"
    shutil.copyfile(migrated_database(), database)
    tree = Tree(state_dir, env={"BULKHEAD_TEST_DB": str(database)}, runners=3)
    tree.database, tree.log = database, folder / "tree.log"
    with tree:
        yield tree


@contextmanager
def limited(folder: Path) -> Iterator[Place]:
    """A gateway that may not write to files any more (RLIMIT_FSIZE): needs no rights, and is another error."""
    with _tree(folder, folder) as tree:

        @contextmanager
        def full() -> Iterator[None]:
            pid = tree.child("gateway").pid
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            try:
                yield
            finally:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

        yield Place(tree, full, "RLIMIT_FSIZE of the gateway")


@contextmanager
def filled(folder: Path) -> Iterator[Place]:
    """A small tmpfs that is filled; where mounting is not allowed, as `limited`."""
    with small_disk(DISK) as disk:
        if disk is None:
            with limited(folder) as place:
                yield place
            return
        with _tree(disk, folder) as tree:
            yield Place(tree, lambda: Ballast(disk), f"a tmpfs of {DISK >> 20} MiB")


def follow(tree: Tree, run: str, seen: list[SseEvent]) -> None:
    """Read a run's events over one connection as they come."""
    with tree.stream(run, timeout=30) as response:
        seen.extend(response.events())  # one by one, as they come


def submit_until(
    client: httpx.Client, stop: threading.Event, accepted: list[str], refused: list[str]
) -> None:
    """Submit all the time; note what was accepted, and the ids to try again with."""
    while not stop.wait(0.05):
        answer = client.post("/api/v1/runs", json={"task": "proj.echo", "kwargs": {"value": 1}}, timeout=20)
        if answer.status_code == 202:
            accepted.append(answer.json()["id"])
            continue
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
        assert int(answer.headers["retry-after"]) >= 1
        refused.append(answer.json()["run"])


@pytest.mark.parametrize(
    ("place", "seconds"), [(filled, FULL), (limited, LIMITED)], ids=["filled", "limited"]
)
def test_a_full_disk(
    place: Callable[[Path], AbstractContextManager[Place]],
    seconds: float,
    tmp_state_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with place(tmp_state_dir) as here:
        tree, client = here.tree, here.tree.client()
        seen: list[SseEvent] = []
        accepted: list[str] = []
        refused: list[str] = []
        stop = threading.Event()
        # Its deadline falls into the time without a disk: a task must not be ended because it has to wait.
        works = seconds + BEYOND
        number = int(works / PAUSE)
        body = {"task": "proj.count", "kwargs": {"n": number, "delay": PAUSE}, "timeout": works + 6}
        run = client.post("/api/v1/runs", json=body).json()["id"]
        with ThreadPoolExecutor(2) as threads:
            following = threads.submit(follow, tree, run, seen)
            submitting = threads.submit(submit_until, tree.client(), stop, accepted, refused)
            try:
                eventually(lambda: len(seen) > 50 and len(accepted) > 10, 10, "everything at work")
                with here.full():
                    eventually(lambda: refused, 10, "a submission that is put off")
                    gone = time.monotonic()
                    check_what_is_said(tree, client, run)
                    time.sleep(max(0.0, gone + seconds - time.monotonic()))
                    before, taken = len(seen), len(accepted)
                back = time.monotonic()
                eventually(lambda: len(seen) > before and len(accepted) > taken, 10, "it goes on")
                resumed = seen[before].at - back
                again = [resubmit(client, id) for id in dict.fromkeys(refused)]
            finally:
                stop.set()
            submitting.result(timeout=30)
            following.result(timeout=60)
        figures = f"{here.how}, {back - gone:.1f} s full, next event {resumed:.2f} s after there was room"
        with capsys.disabled():
            print(f"\nRECORD disk full: {figures}; {len(accepted)} accepted, {len(refused)} put off")
        assert [int(event.id) for event in seen] == list(range(1, number + 3)), "no hole, nothing twice"
        assert seen[-1].json["status"] == "SUCCESSFUL", seen[-1]
        assert resumed < RESUMES, figures
        for id in [*accepted, *again]:
            assert tree.wait(id)["status"] == "SUCCESSFUL"


def resubmit(client: httpx.Client, id: str) -> str:
    """Send a submission again that was put off, twice; it is one run."""
    body = {"task": "proj.echo", "kwargs": {"value": 1}, "id": id}
    for _ in range(2):
        answer = client.post("/api/v1/runs", json=body)
        assert answer.status_code in (200, 202), answer.text
        assert answer.json()["id"] == id
    return id


def check_what_is_said(tree: Tree, client: httpx.Client, run: str) -> None:
    """Reading works, and everybody who asks is told what is wrong."""
    assert tree.snapshot(run)["status"] == "RUNNING"
    assert client.get("/health").text == "OK"
    ready = client.get("/ready")
    assert (ready.status_code, ready.json()["parts"]["store"]) == (503, False)
    stats = client.get("/api/v1/stats")
    assert stats.status_code == 200
    assert "the store" in stats.text
    page = client.get(f"/api/v1/runs/{run}/events", headers={"Accept": "application/json"})
    assert page.status_code == 200
    eventually(lambda: any("store" in note for note in tree.status().notes), 5, "a note in the status")


def test_what_a_full_disk_means_to_a_task_with_large_values(tmp_state_dir: Path) -> None:
    """A large event is an error at `emit` that says where; a large result waits until there is room."""
    with filled(tmp_state_dir) as here:
        tree = here.tree
        events = tree.submit("proj.bulky", events=[200_000], pause=1.0)["id"]
        result = tree.submit("proj.bulky", result=200_000, pause=1.0)["id"]
        for run in (events, result):
            eventually(lambda run=run: tree.snapshot(run)["status"] == "RUNNING", 10, "at work")
        with here.full():
            eventually(lambda: client_refused(tree), 10, "a full disk")
            time.sleep(2.0)
        failed, done = tree.wait(events, 20), tree.wait(result, 20)
        if "tmpfs" in here.how:  # a limit of the gateway's does not concern a runner
            assert failed["status"] == "FAILED"
            assert "state directory" in failed["error"]["message"]
            assert "OSError" in failed["error"]["exception"]
            assert str(tree.state_dir) in failed["error"]["message"]
        assert done["status"] == "SUCCESSFUL"
        answer = tree.http.get(f"/api/v1/runs/{result}/result")
        assert answer.json()["result"] == "x" * 200_000
        referred = {event.id for event in tree.events(events)}
        assert len(referred) == len(tree.events(events))
        assert len(list((tree.state_dir / "blobs").iterdir())) == (1 if failed["status"] == "FAILED" else 2)


def test_a_tree_stops_in_time_although_its_disk_is_full(
    tmp_state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with filled(tmp_state_dir) as here:
        tree = here.tree
        run = tree.submit("proj.count", n=100_000, delay=0.01)["id"]
        eventually(lambda: tree.snapshot(run)["offsets"]["last"] > 3, 10, "events")
        with here.full():
            eventually(lambda: client_refused(tree), 10, "a full disk")
            started = time.monotonic()
            code = tree.stop(timeout=60)
            took = time.monotonic() - started
        with capsys.disabled():
            print(f"\nRECORD stop with a full disk: {took:.1f} s, exit code {code}")
        assert code == 0
        assert took < 12, tree.tail()
        # What the tree could not write down is accounted for at the next start.
        tree.start()
        client = tree.client()  # another port
        assert client.get(f"/api/v1/runs/{run}").json()["status"] in ("READY", "RUNNING")
        client.post(f"/api/v1/runs/{run}/cancel", json={"grace": 0.1})

        def status() -> Any:
            return client.get(f"/api/v1/runs/{run}").json()["status"]

        eventually(lambda: status() == "CANCELLED", 10, "the end of the run")
        assert tree.stop() == 0


def test_a_read_only_state_directory_is_refused_at_the_start(tmp_state_dir: Path) -> None:
    with small_disk(DISK) as disk, _tree(disk or tmp_state_dir, tmp_state_dir) as tree:
        assert tree.stop() == 0
        with read_only(tree.state_dir, mounted=disk is not None):
            refused = subprocess.run(
                tree.command(), cwd=ROOT, env=tree.environment(), capture_output=True, text=True, timeout=60
            )
        assert refused.returncode == 2
        assert f"STATE_DIR = '{tree.state_dir}'" in refused.stderr
        tree.start()
        assert tree.stop() == 0


@contextmanager
def read_only(folder: Path, *, mounted: bool) -> Iterator[None]:
    """Let nobody write there: root by a mount, an ordinary user by the mode."""

    def allow(writing: bool) -> None:
        if mounted:
            mode = "remount,rw" if writing else "remount,ro"
            subprocess.run(["mount", "-o", mode, str(folder)], check=True)
        else:
            folder.chmod(0o700 if writing else 0o500)

    allow(False)
    try:
        yield
    finally:
        allow(True)


def client_refused(tree: Tree) -> bool:
    answer = tree.http.post("/api/v1/runs", json={"task": "proj.echo", "kwargs": {"value": 1}}, timeout=20)
    return answer.status_code == 503
