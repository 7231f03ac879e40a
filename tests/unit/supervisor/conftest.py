"""Fixtures of the supervisor's tests: real children, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from supervisor.child import Child, spawn
from supervisor.config import Config
from supervisor.runners import Runner, Runners
from taskkit import linux
from taskkit.settings import PoolSettings, Settings
from taskkit.wire.messages import RunnerSpec
from tests import helpers

#: Takes the source of a program, starts it, waits until it has said `ready()`.
Start = Callable[..., Awaitable[Child]]

_PREAMBLE = """
import os, signal, subprocess, sys, time
def ready(words=b"ready"):
    os.write(int(sys.argv[1]), words)
    os.close(int(sys.argv[1]))
"""


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the listing's own descriptor
            continue
    return found


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fail the test that leaves a descriptor or a child process."""
    descriptors, children = _descriptors(), linux.children()
    yield
    helpers.reap_children()
    assert _descriptors() - descriptors == set()
    assert linux.children() - children == set()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Give `await start(source, **options of spawn)`; what still lives at the end is killed and reaped."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made: list[Child] = []

    async def start(source: str, *, session: bool = False) -> Child:
        module = f"program_{len(made)}"
        (tmp_path / f"{module}.py").write_text(_PREAMBLE + textwrap.dedent(source))
        reader, writer = os.pipe()
        try:
            child = spawn(module, module, [str(writer)], [writer], session=session)
            made.append(child)
            os.close(writer)
            with trio.fail_after(20):
                await trio.lowlevel.wait_readable(reader)
            assert os.read(reader, 100) == b"ready"
        finally:
            os.close(reader)
        return child

    yield start
    for child in made:
        if child.exit is None:
            child.send_signal(signal.SIGKILL)
            trio.run(child.wait)


#: Shell programs that stand for runners.
WAITS = "echo ready; exec sleep 60"
STUBBORN = "trap '' TERM; echo ready; exec sleep 60"
LEAVES = "echo ready; exit 5"


def program(script: str) -> tuple[int, int]:
    """Start a shell script in a group of its own; return its pid and a pidfd once it has said `ready`."""
    process = subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        assert stdout.readline() == b"ready\n"
    process.returncode = 0  # whoever gets the pidfd reaps it
    return process.pid, os.pidfd_open(process.pid)


class Family:
    """Real `Runners` whose processes are shell scripts instead of forks of a zygote.

    Attributes:
      up, died: what the tree has been told, in order.
    """

    def __init__(self, nursery: trio.Nursery, state_dir: Path) -> None:
        (state_dir / "blobs").mkdir()
        self.up: list[Runner] = []
        self.died: list[Runner] = []
        self._changed = trio.Event()
        self.runners = Runners(
            Config(settings_module="tests.project.settings", path=(str(helpers.ROOT),)),
            Settings(),
            state_dir,
            nursery,
            self.up.append,
            self._note_death,
        )

    def _note_death(self, runner: Runner) -> None:
        self.died.append(runner)
        self._changed.set()

    def specs(self, count: int) -> list[RunnerSpec]:
        return [self.runners.spec("default", PoolSettings(), intake=False) for _ in range(count)]

    async def bear(self, script: str) -> Runner:
        """Return a new runner that is this script."""

        async def fork(specs: Sequence[RunnerSpec], fds: Sequence[int]) -> list[tuple[int, int]]:
            return [program(script) for _ in specs]

        await self.runners.fork(fork, self.specs(1))
        return self.up[-1]

    async def wait_dead(self, runner: Runner) -> Runner:
        """Wait until the tree has been told of this death; at most 10 s."""
        with trio.fail_after(10):
            while runner not in self.died:
                self._changed = trio.Event()
                await self._changed.wait()
        return runner


@pytest.fixture
async def family(leaves_nothing: None, tmp_path: Path) -> AsyncIterator[Family]:
    """Give a family of runners; they are killed and reaped, and their descriptors closed, at the end."""
    async with trio.open_nursery() as nursery:
        family = Family(nursery, tmp_path)
        yield family
        for runner in list(family.runners.all.values()):
            await runner.child.end(0)
        family.runners.close()
        nursery.cancel_scope.cancel()
