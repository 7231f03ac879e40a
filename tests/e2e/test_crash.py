"""Every way a task can go wrong: its own run ends, once, with the true cause; nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import SseEvent, Tree, eventually, is_alive

pytestmark = pytest.mark.alone

MIB = 1024 * 1024

#: What each `demo.crash(how)` has to be called, in `stream.end` and in the snapshot alike. From Python 3.12 on
#: the interpreter notices an endless recursion in C before the stack is full.
NOTICED = {"ending": "raised", "exception": "builtins.RecursionError"}
CAUSES: dict[str, dict[str, Any]] = {
    "segv": {"ending": "crashed", "kind": "signal", "signal": "SIGSEGV"},
    "abort": {"ending": "crashed", "kind": "signal", "signal": "SIGABRT"},
    "exit": {"ending": "crashed", "kind": "exit", "exit_code": 3},
    "kill": {"ending": "crashed", "kind": "signal", "signal": "SIGKILL"},
    "oom": {"ending": "raised", "exception": "builtins.MemoryError"},
    "raise": {"ending": "raised", "exception": "builtins.ValueError"},
    "recursion": NOTICED
    if sys.version_info >= (3, 12)
    else {"ending": "crashed", "kind": "signal", "signal": "SIGSEGV"},
    "close_fds": {"ending": "crashed", "kind": "descriptors"},
    "garbage": {"ending": "crashed", "kind": "corrupt"},
    "fork_orphan": {"ending": "returned"},
}

#: Seconds (acceptance line): the median from a death to its terminal event; until the pool is full again.
TOLD_WITHIN = 0.1
FULL_WITHIN = 1.0

#: Seconds for an orphan to be found and killed.
ORPHAN_WITHIN = 2.0


@dataclass(frozen=True)
class Crash:
    """What one crash looked like from outside.

    Attributes:
      told: seconds from the process's death, as its pidfd showed it, to the arrival of the terminal event; the
        event may come first when the task ended without taking its process along.
      whole: seconds from the submission to the terminal event, an upper bound of everything.
      full: seconds from the death until as many runners were idle as before.
    """

    run: str
    events: list[SseEvent]
    snapshot: dict[str, Any]
    told: float
    whole: float
    full: float

    @property
    def end(self) -> dict[str, Any]:
        """The data of `stream.end`."""
        data: dict[str, Any] = self.events[-1].json
        return data


@dataclass(frozen=True)
class Crashes:
    """All crashes, one after the other, with the events of a count that ran beside them."""

    by_how: dict[str, Crash]
    bystander: list[SseEvent]


def idle(tree: Tree) -> dict[int, str]:
    """Return the idle runners of the default pool: ids by pid."""
    runners = tree.http.get("/api/v1/runners").json()["runners"]
    return {r["pid"]: r["id"] for r in runners if r["pool"] == "default" and r["state"] == "IDLE"}


@contextlib.contextmanager
def watched(pids: Iterator[int] | dict[int, str]) -> Iterator[select.poll]:
    """Give a poll that tells which of these processes has died; by descriptor, so no pid is mistaken."""
    poll = select.poll()
    with contextlib.ExitStack() as stack:
        for pid in pids:
            fd = os.pidfd_open(pid)
            stack.callback(os.close, fd)
            poll.register(fd, select.POLLIN)
        yield poll


def crash(tree: Tree, how: str, full: int) -> Crash:
    """Run one crash when `full` runners are idle; return what was seen."""
    before = eventually(
        lambda: found if len(found := idle(tree)) == full else None, 5, f"{full} idle runners"
    )
    with watched(before) as poll, ThreadPoolExecutor(1) as thread:
        submitted = time.monotonic()
        run = tree.submit("demo.crash", how=how)["id"]
        following = thread.submit(tree.events, run)
        assert poll.poll(10_000), f"no runner died of {how}"
        died = time.monotonic()
        eventually(lambda: len(idle(tree)) >= full, 5, f"{full} idle runners after {how}")
        refilled = time.monotonic()
        events = following.result(timeout=30)
    assert events[0].json["pid"] in before
    return Crash(
        run=run,
        events=events,
        snapshot=tree.snapshot(run),
        told=events[-1].at - died,
        whole=events[-1].at - submitted,
        full=refilled - died,
    )


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give the demo project's tree."""
    # The kills from outside here are none of the tasks' doing: nothing is held back for them.
    with Tree(settings=None, runners=4, env={"TASKKIT_BREAKER": '{"crashes": 0}'}) as tree:
        yield tree


@pytest.fixture(scope="module")
def crashes(tree: Tree) -> Crashes:
    """Give all ten crashes, done while a count ran."""
    with ThreadPoolExecutor(1) as thread:
        beside = tree.submit("demo.count", n=100_000, delay=0.002)["id"]
        following = thread.submit(tree.events, beside, timeout=60)
        eventually(lambda: tree.snapshot(beside)["status"] == "RUNNING", 5, "the bystander")
        # The bystander has one of the four places; that many are left to stand idle.
        found = {how: crash(tree, how, full=3) for how in CAUSES}
        assert tree.snapshot(beside)["status"] == "RUNNING", "it ran all the while"
        assert tree.http.post(f"/api/v1/runs/{beside}/cancel", json={"grace": 1}).status_code == 202
        return Crashes(found, following.result(timeout=30))


def test_other_streams_miss_nothing(crashes: Crashes) -> None:
    events = crashes.bystander
    assert [int(event.id) for event in events] == list(range(1, len(events) + 1))
    steps = [event.json["step"] for event in events if event.type == "progress"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 50
    assert events[-1].json["status"] == "CANCELLED"


@pytest.mark.parametrize("how", CAUSES)
def test_a_crash_has_exactly_one_terminal_event(tree: Tree, crashes: Crashes, how: str) -> None:
    found = crashes.by_how[how]
    assert [event.type for event in found.events] == ["run.started", "stream.end"]
    assert [event.id for event in found.events] == ["1", "2"]
    with tree.stream(found.run, headers={"Last-Event-ID": "2"}) as response:
        assert response.status == 204, "nothing came behind the end"
    assert found.end["status"] == ("SUCCESSFUL" if how == "fork_orphan" else "FAILED")


@pytest.mark.parametrize("how", CAUSES)
def test_a_crash_tells_its_true_cause(crashes: Crashes, how: str) -> None:
    wanted = dict(CAUSES[how])
    error = crashes.by_how[how].end.get("error", {})
    if how == "fork_orphan":
        assert error == {}
        return
    assert error["code"] == wanted.pop("ending")
    if "exception" in wanted:
        assert error["exception"] == wanted["exception"]
        assert "crashes.py" in error["traceback"], "the traceback leads to the culprit"
        assert "cause" not in error
        return
    assert wanted == {key: error["cause"].get(key) for key in wanted}
    assert error["message"], "a sentence for people"
    assert error["cause"]["max_rss"] > MIB


@pytest.mark.parametrize("how", CAUSES)
def test_the_snapshot_agrees_with_the_stream(crashes: Crashes, how: str) -> None:
    found = crashes.by_how[how]
    (attempt,) = found.snapshot["attempts"]
    assert found.snapshot["status"] == found.end["status"]
    assert attempt["ending"] == CAUSES[how]["ending"]
    assert attempt["pid"] == found.events[0].json["pid"]
    assert attempt["started_at"] <= attempt["ended_at"]
    error = found.end.get("error", {})
    assert found.snapshot["error"] == (error or None)
    assert attempt["cause"] == error.get("cause")
    assert (attempt["failure"] or {}).get("exception") == error.get("exception")


@pytest.mark.parametrize(
    ("how", "words"), [("segv", "Segmentation fault"), ("abort", "Aborted"), ("segv", "in segv")]
)
def test_a_fatal_signal_brings_pythons_stack_along(crashes: Crashes, how: str, words: str) -> None:
    assert words in crashes.by_how[how].end["error"]["cause"]["traceback"]


def test_a_sigkill_that_was_no_oom_kill_is_not_called_one(crashes: Crashes) -> None:
    assert "oom" not in crashes.by_how["kill"].end["error"]["cause"]["kind"]


def test_the_pool_is_full_again_within_a_second(crashes: Crashes, capsys: pytest.CaptureFixture[str]) -> None:
    took = {how: found.full for how, found in crashes.by_how.items()}
    with capsys.disabled():
        shown = ", ".join(f"{how} {seconds * 1000:.0f}" for how, seconds in took.items())
        print(f"\nRECORD ms until the pool was full after a death: {shown}")
    assert max(took.values()) < FULL_WITHIN, took


def test_the_end_is_told_soon_after_the_death(crashes: Crashes, capsys: pytest.CaptureFixture[str]) -> None:
    told = {how: found.told for how, found in crashes.by_how.items()}
    whole = {how: found.whole for how, found in crashes.by_how.items()}
    with capsys.disabled():
        shown = ", ".join(f"{how} {told[how] * 1000:.0f}/{whole[how] * 1000:.0f}" for how in told)
        print(f"\nRECORD ms from death / from submission to stream.end: {shown}")
    assert statistics.median(told.values()) < TOLD_WITHIN, told


def test_a_signal_from_outside_is_told_soon_after_the_death(
    tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    took = []
    for number in [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT] * 5:
        run = tree.submit("demo.quiet", seconds=60)["id"]
        with tree.stream(run) as response:
            events = response.events()
            pid = next(events).json["pid"]
            killed = time.monotonic()
            os.kill(pid, number)
            end = next(events)
        assert end.json["error"]["cause"]["signal"] == number.name
        took.append(end.at - killed)
    with capsys.disabled():
        median, slowest = statistics.median(took) * 1000, max(took) * 1000
        print(
            f"\nRECORD ms from kill() to stream.end: median {median:.1f}, slowest {slowest:.1f} of {len(took)}"
        )
    assert statistics.median(took) < TOLD_WITHIN


def test_what_a_task_said_before_it_died_is_delivered(tree: Tree) -> None:
    run = tree.submit("demo.count", n=1_000_000, delay=0.0)["id"]
    with tree.stream(run) as response:
        events = response.events()
        pid = next(events).json["pid"]
        seen = [event.json["step"] for event in itertools.islice(events, 500)]
        os.kill(pid, signal.SIGKILL)
        rest = list(events)
    steps = seen + [event.json["step"] for event in rest[:-1]]
    assert steps == list(range(1, len(steps) + 1)), "no hole, no half event"
    assert rest[-1].type == "stream.end"
    assert rest[-1].json["error"]["cause"]["signal"] == "SIGKILL"


def test_an_orphan_does_not_outlive_its_run(crashes: Crashes, tree: Tree) -> None:
    run = tree.submit("demo.crash", how="fork_orphan")["id"]
    end = tree.events(run)[-1]
    assert end.json["status"] == "SUCCESSFUL"
    eventually(lambda: gone(end.json["result"]), ORPHAN_WITHIN, f"the end of orphan {end.json['result']}")
    assert gone(crashes.by_how["fork_orphan"].end["result"])


def gone(pid: int) -> bool:
    try:
        return not is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


# -- the kernel's OOM killer


class LimitedTree(Tree):
    """A tree in a memory cgroup."""

    cgroup: Path

    def command(self) -> list[str]:
        """Return the command line of a shell that moves into the cgroup and becomes the supervisor."""
        move = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return ["sh", "-c", move, str(self.cgroup), *super().command()]


@contextlib.contextmanager
def memory_cgroup(size: int) -> Iterator[Path | str]:
    """Give a memory cgroup of `size` bytes within the limits of our own, or why there can be none."""
    made = make_memory_cgroup(size)
    if isinstance(made, str):
        yield made
        return
    try:
        yield made
    finally:
        eventually(lambda: not (made / "cgroup.procs").read_text().split(), 5, "an empty cgroup")
        made.rmdir()


def make_memory_cgroup(size: int) -> Path | str:
    """Make it: below our own cgroup (version 1), or beside it, where version 2 allows processes."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            parent, limit = Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        elif controllers == "" and path != "/":
            parent, limit = (Path("/sys/fs/cgroup") / path.lstrip("/")).parent, "memory.max"
        else:
            continue
        made = parent / f"bulkhead-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / limit).write_text(str(size))
            return made
        except OSError:  # the memory controller is not delegated to here
            made.rmdir()
    return "no memory cgroup can be made here: it takes root, or a delegated memory controller"


def test_a_kernel_oom_kill_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    # Below the 512 MiB of address space that the task may take, above the 150 MiB that the tree takes.
    with memory_cgroup(400 * MIB) as cgroup:
        if isinstance(cgroup, str):
            with capsys.disabled():
                print(f"\nNOT RUN: kernel OOM kill: {cgroup}")
            return
        tree = LimitedTree(settings=None, runners=2)
        tree.cgroup = cgroup
        with tree:
            bystander = tree.submit("demo.count", n=20, delay=0.1)["id"]
            run = tree.submit("demo.crash", how="oom")["id"]
            end = tree.events(run)[-1].json
            assert end["status"] == "FAILED"
            assert end["error"]["cause"]["kind"] == "oom", end
            assert end["error"]["cause"]["signal"] == "SIGKILL"
            (attempt,) = tree.snapshot(run)["attempts"]
            assert (attempt["ending"], attempt["cause"]["kind"]) == ("crashed", "oom")
            assert [int(e.id) for e in tree.events(bystander)] == list(range(1, 23)), (
                "the tree itself was spared"
            )


@pytest.fixture(scope="module")
def project() -> Iterator[Tree]:
    with Tree(runners=2) as running:
        yield running


@pytest.mark.parametrize("code", [70, 71, 75])
def test_an_exit_code_that_runners_use_themselves_is_still_the_tasks_crash(project: Tree, code: int) -> None:
    """Taken for a runner that could not start, the run would be performed again for ever."""
    run = project.submit("proj.leave", code=code)["id"]
    snapshot = project.wait(run)
    assert snapshot["status"] == "FAILED"
    assert [attempt["ending"] for attempt in snapshot["attempts"]] == ["crashed"]
    assert snapshot["error"]["cause"]["exit_code"] == code


def test_a_result_that_cannot_be_shown_fails_the_run_once(project: Tree) -> None:
    snapshot = project.wait(project.submit("proj.unprintable")["id"])
    assert snapshot["status"] == "FAILED"
    assert [attempt["ending"] for attempt in snapshot["attempts"]] == ["raised"]
    assert "Unprintable" in snapshot["error"]["message"]


def test_a_senseless_backoff_fails_the_run_and_breaks_no_list(project: Tree) -> None:
    snapshot = project.wait(project.submit("proj.hopeless")["id"])
    assert snapshot["status"] == "FAILED"
    assert "backoff" in snapshot["error"]["message"]
    assert project.http.get("/api/v1/runs").status_code == 200


def test_a_timeout_of_nothing_ends_the_first_attempt(project: Tree) -> None:
    response = project.http.post(
        "/api/v1/runs", json={"task": "proj.sleepy", "kwargs": {"seconds": 30}, "timeout": 0.01}
    )
    snapshot = project.wait(response.json()["id"])
    assert snapshot["status"] == "FAILED"
    assert [attempt["ending"] for attempt in snapshot["attempts"]] == ["timed_out"]
