"""The tree as an operator sees it with ps and /proc."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers import Tree, eventually

#: Added to a runner's nice by default.
NICE = 5

SPAWN = {"TASKKIT_POOLS": json.dumps({"default": {"start": "spawn"}})}


@pytest.fixture(scope="module", params=["fork", "spawn"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """Give a tree with two runners, made either way."""
    environment = SPAWN if request.param == "spawn" else {}
    with Tree(settings=None, runners=2, env=environment, timeout=60) as tree:
        yield tree


def listed(tree: Tree) -> dict[int, tuple[str, str]]:
    """Return (short name, full name) by pid, as `ps --ppid` prints them."""
    command = ["ps", "--ppid", str(tree.pid), "-o", "pid=,comm:20=,args="]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    found = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"\s*(\d+) (.{20}) (.*)", line)
        assert match is not None, line
        found[int(match[1])] = (match[2].strip(), match[3].strip())
    return found


def runners(tree: Tree) -> list[int]:
    """Return the pids of the default pool's runners, from the API."""
    shown = tree.http.get("/api/v1/runners").json()["runners"]
    return [r["pid"] for r in shown if r["pool"] == "default" and r["state"] == "IDLE"]


def two_idle(tree: Tree) -> list[int]:
    """Return the pids of the two runners at rest, once every child of the tree has come up."""

    def found() -> list[int] | None:
        pids = runners(tree)
        # A spawned child imports the project for a second before it is what it was made for.
        booted = all(is_up(child) for child in tree.children())
        return pids if len(pids) == 2 and booted else None

    return eventually(found, 20, "two idle runners")


def is_up(child: psutil.Process) -> bool:
    """Whether a child carries its name, and what comes right behind that: no new privileges is the last step."""
    try:
        name = " ".join(child.cmdline())
        ready = ("intake" not in name and "runner" not in name) or facts(child.pid)["NoNewPrivs"] == "1"
        return name.startswith("bulkhead: ") and ready
    except (OSError, psutil.Error):
        return False


def facts(pid: int) -> dict[str, str]:
    """Return /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limit(pid: int, name: str) -> tuple[str, str]:
    """Return (soft, hard) of /proc/PID/limits."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith(name):
            soft, hard = line[len(name) :].split()[:2]
            return soft, hard
    raise AssertionError(f"no limit {name}")


def test_ps_lists_every_child_by_name(tree: Tree) -> None:
    pids = two_idle(tree)
    found = listed(tree)
    names = sorted(full for _, full in found.values())
    assert names.count("bulkhead: gateway") == 1
    assert names.count("bulkhead: zygote") == 1
    assert names.count("bulkhead: courier") == 1
    shown = {r["pid"]: r for r in tree.http.get("/api/v1/runners").json()["runners"]}
    assert set(pids) <= set(shown) <= set(found)
    for pid, runner in shown.items():
        assert found[pid][1] == f"bulkhead: {runner['role']} {runner['id']} ({runner['pool']})"
    assert len(names) == 3 + len(shown), f"nobody else is there: {names}"


def test_the_short_names_tell_them_apart_too(tree: Tree) -> None:
    two_idle(tree)
    for short, full in listed(tree).values():
        role = full.removeprefix("bulkhead: ").split()[0]
        assert short.startswith(f"bh:{role}")


def test_the_operators_status_lists_the_same_children(tree: Tree) -> None:
    two_idle(tree)
    status = tree.status()
    assert status.pid == tree.pid
    assert {child.pid for child in status.children} == set(listed(tree))
    # By exec, a runner beside the two that are idle may still import the project.
    eventually(lambda: all(child.state == "RUNNING" for child in tree.status().children), 10, "all run")


def test_a_run_gets_a_fresh_process_and_its_place_is_filled_again(tree: Tree) -> None:
    before = two_idle(tree)
    used = [tree.events(tree.submit("demo.count", n=1, delay=0)["id"])[0].json["pid"] for _ in range(4)]
    assert len(set(used)) == 4, "no process performs a second run"
    after = two_idle(tree)
    assert not set(after) & set(used)
    assert set(used) & set(before), "the run found a runner that was waiting for it"


def test_a_runner_that_dies_idle_is_replaced(tree: Tree) -> None:
    victim, other = two_idle(tree)
    psutil.Process(victim).kill()
    eventually(lambda: victim not in runners(tree), 5, "the death is noticed")
    assert other in two_idle(tree)


def test_a_runner_is_nicer_than_the_tree(tree: Tree) -> None:
    own = psutil.Process(tree.pid).nice()
    for pid in two_idle(tree):
        assert psutil.Process(pid).nice() == min(19, own + NICE)
    for name in ("gateway", "courier"):
        assert psutil.Process(tree.child(name).pid).nice() == own


def test_a_runner_gains_no_privileges(tree: Tree) -> None:
    for pid in two_idle(tree):
        assert facts(pid)["NoNewPrivs"] == "1"


def test_a_runner_leaves_no_core(tree: Tree) -> None:
    for pid in two_idle(tree):
        assert limit(pid, "Max core file size") == ("0", "0")


def test_a_runner_is_what_the_oom_killer_takes_first(tree: Tree) -> None:
    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    for pid in two_idle(tree):
        assert score(pid) > max(score(tree.child(name).pid) for name in ("gateway", "courier"))


def test_each_runner_leads_a_group_of_its_own(tree: Tree) -> None:
    pids = two_idle(tree)
    assert [os.getpgid(pid) for pid in pids] == pids


def test_runners_of_a_zygote_share_its_session(tree: Tree) -> None:
    # One session is one autogroup: however many runners burn, they weigh as much as one other program.
    zygote = tree.child("zygote").pid
    assert os.getsid(zygote) == zygote
    if "TASKKIT_POOLS" in tree.env:  # a process cannot join a session that it was not born in
        return
    assert {os.getsid(pid) for pid in two_idle(tree)} == {zygote}
    for name in ("gateway", "courier"):
        assert os.getsid(tree.child(name).pid) != zygote


def test_the_zygote_is_single_threaded(tree: Tree) -> None:
    assert facts(tree.child("zygote").pid)["Threads"] == "1"


def test_a_runner_dies_with_the_supervisor_alone_and_not_of_a_terminals_interrupt(tree: Tree) -> None:
    # PDEATHSIG itself cannot be read from outside; test_stop.py kills the supervisor to see it.
    for pid in two_idle(tree):
        assert psutil.Process(pid).ppid() == tree.pid
        assert psutil.Process(pid).terminal() is None


def test_a_runner_has_no_descriptors_but_its_own(tree: Tree) -> None:
    for pid in two_idle(tree):
        links = {int(link.name): os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        standard = {fd: links.pop(fd) for fd in (0, 1, 2)}
        assert standard[0] == "/dev/null"
        assert standard[1].startswith("pipe:")
        assert min(links) >= 500, f"out of the way of user code: {links}"
        sockets = [target for target in links.values() if target.startswith("socket:")]
        assert len(sockets) == 1, f"its orders, no listener, no control socket: {links}"
        pipes = {target for target in links.values() if target.startswith("pipe:")} - {standard[1]}
        assert len(pipes) == 1, f"its events: {links}"
        files = [t for t in links.values() if not t.startswith(("socket:", "pipe:"))]
        allowed = ("/memfd:bulkhead-faults", str(tree.state_dir / "blobs"), "anon_inode:", "/dev/null")
        assert all(target.startswith(allowed) for target in files), files


def test_no_two_runners_share_a_pipe_or_a_socket(tree: Tree) -> None:
    first, second = (
        {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()} for pid in two_idle(tree)
    )
    assert not {target for target in first & second if target.startswith(("pipe:", "socket:"))}


def test_strangers_cannot_look_into_the_infrastructure(tree: Tree) -> None:
    # What is not dumpable belongs to root in /proc, whoever runs it (proc(5)); as root that looks the same.
    if os.geteuid() == 0:
        owners = {
            Path(f"/proc/{tree.child(name).pid}/environ").stat().st_uid for name in ("gateway", "courier")
        }
        assert owners == {0}
        return
    for pid in (tree.pid, tree.child("gateway").pid, tree.child("courier").pid):
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/{pid}/fd")
