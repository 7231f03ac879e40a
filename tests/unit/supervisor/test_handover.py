"""What one image of the supervisor leaves to the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor import handover
from supervisor.deadlines import DeadlineLedger, Due
from supervisor.handover import HandOver, HeldChild, HeldPeer, HeldRunner
from taskkit.lifecycle import ProcessState
from taskkit.wire.messages import Cause, Deadline, Exited, RunnerSpec, TaskInfo, ZygoteReady


def made(fds: list[int]) -> HandOver:
    """Return a hand-over in which every kind of descriptor is one of `fds`."""
    numbers = iter(fds)

    def child(name: str) -> HeldChild:
        return HeldChild(name, 123, next(numbers), True, ProcessState.RUNNING)

    runner = HeldRunner(
        spec=RunnerSpec(id="r-1", concurrency=3),
        child=child("r-1"),
        near=(next(numbers), next(numbers), next(numbers)),
        faults=next(numbers),
        pipe_size=4096,
        started_at=1.5,
        retired=True,
        used=True,
        outdated=False,
        judged=True,
        ordered="timeout",
        detail="late",
        exited=Exited(runner="r-1", cause=Cause(kind="signal", signal="SIGSEGV", max_rss=7)),
    )
    return HandOver(
        mark="1-abc",
        lock=next(numbers),
        listener=next(numbers),
        url="http://127.0.0.1:1",
        poke=next(numbers),
        operator=next(numbers),
        ready=ZygoteReady(
            settings={"POOLS": {}},
            settings_module="m",
            catalogue=[TaskInfo(name="a.b", path="a.b", kind="f")],
        ),
        zygote=HeldPeer(child("zygote"), next(numbers)),
        gateway=HeldPeer(child("gateway"), next(numbers)),
        courier=HeldPeer(child("courier"), next(numbers), next(numbers)),
        runners=[runner],
        deadlines=[(1000.5, Due("r-1", "t", "timeout", 2.0))],
        stalled=True,
    )


#: Descriptors of a runner, of the tree, of zygote, gateway, courier.
COUNT = 5 + 4 + 2 + 2 + 3


@pytest.mark.parametrize(
    ("argv", "then"),
    [
        (["python3", "-m", "supervisor", "run"], ["-m", "supervisor", "run"]),
        (["python3", "-P", "x", "run", "--ready-fd", "7", "--json"], ["-P", "x", "run", "--json"]),
        (["python3", "bulkhead", "run", "--ready-fd", "7"], ["bulkhead", "run"]),
    ],
)
def test_the_next_image_is_called_as_this_one_was(argv: list[str], then: list[str]) -> None:
    assert handover.command_line(argv) == [sys.executable, *then]


def test_every_descriptor_is_named() -> None:
    assert sorted(made(list(range(100, 100 + COUNT))).descriptors()) == list(range(100, 100 + COUNT))


def test_an_image_that_cannot_be_started_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [os.dup(0) for _ in range(COUNT)]
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    try:
        error = handover.leave(made(fds))
        assert isinstance(error, FileNotFoundError)
        assert not any(os.get_inheritable(fd) for fd in fds)
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert set(os.listdir("/proc/self/fd")) == before
    finally:
        for fd in fds:
            os.close(fd)


def test_the_next_image_finds_everything(tmp_path: Path) -> None:
    """Through a real execve, with a signal that comes while nobody hears."""
    program = tmp_path / "image.py"
    program.write_text(
        "import os, signal, sys\n"
        "from supervisor import handover\n"
        "from tests.unit.supervisor.test_handover import COUNT, made\n"
        "kept = handover.take()\n"
        "if kept is None:\n"
        "    handover.leave(made([os.dup(0) for _ in range(COUNT)]))\n"
        "else:\n"
        "    fds = sorted(kept.descriptors())\n"
        "    assert len(set(fds)) == COUNT\n"
        "    assert not any(os.get_inheritable(fd) for fd in fds)\n"
        "    assert 'BULKHEAD_HANDOVER' not in os.environ\n"
        "    assert kept.runners[0].exited.cause.signal == 'SIGSEGV'\n"
        "    assert kept.runners[0].child.state == 'RUNNING'\n"
        "    assert kept.deadlines[0][1].kind == 'timeout' and kept.ready.catalogue[0].name == 'a.b'\n"
        "    heard = []\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.signal(signal.SIGTERM, lambda *_: heard.append('TERM'))\n"
        "    handover.hear_signals()\n"
        "    print(os.getpid(), *heard)\n"
    )
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, f"{process.pid} TERM\n")


def test_a_variable_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(handover.VARIABLE, f"7 {os.getpid() + 1}")
    assert handover.take() is None
    assert handover.VARIABLE not in os.environ


def test_deadlines_go_on_in_another_ledger() -> None:
    ledger, other = DeadlineLedger(), DeadlineLedger()
    ledger.arm(Deadline(runner="r", token="t", kind="timeout", after=5, grace=1), 100.0)
    ledger.arm(Deadline(runner="r", token="t", kind="cancelled", after=9, grace=2), 100.0)
    other.keep(ledger.held())
    assert other.next() == 105.0
    assert other.due(110.0) == ledger.due(110.0)
    assert len(other) == len(ledger) == 0
