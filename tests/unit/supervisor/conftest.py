"""Fixtures of the supervisor's tests: real children, nothing left behind."""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from supervisor.child import Child, spawn
from taskkit import linux
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

    async def start(source: str, *, session: bool = False, group: bool = False) -> Child:
        module = f"program_{len(made)}"
        (tmp_path / f"{module}.py").write_text(_PREAMBLE + textwrap.dedent(source))
        reader, writer = os.pipe()
        try:
            child = spawn(module, module, [str(writer)], [writer], session=session, group=group)
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
