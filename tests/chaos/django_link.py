"""The harness's end of the Django process that submits, which may be killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import trio

from tests.helpers import ROOT


class DjangoLink:
    """A Django process of the project's own; started again when it dies.

    Args:
      environment: of the tree, so that it finds the same database.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment) | {"DJANGO_SETTINGS_MODULE": "tests.project.settings"}
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, tuple[trio.Event, dict[str, Any]]] = {}
        self._no = 0
        self._idle = trio.Event()

    @property
    def pids(self) -> set[int]:
        """Of the process, for those who collect children."""
        return {self._process.pid} if self._process is not None else set()

    async def run(self) -> None:
        """Keep a process and read its answers, until cancelled."""
        try:
            while True:
                self._process = subprocess.Popen(  # noqa: ASYNC220  (a fork and an exec take 2 ms)
                    [sys.executable, "-m", "tests.chaos.django_side"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    cwd=ROOT,
                    env=self._environment,
                )
                await self._read(self._process)
                self._end()
                await trio.sleep(0.2)
        finally:
            self._end()

    def _end(self) -> None:
        """The process is over; what it had not answered has an unknown outcome."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._process = None
        for done, answer in self._waiting.values():
            answer["outcome"] = "asked"
            done.set()
        self._waiting.clear()

    async def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        rest = b""
        fd = process.stdout.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            data = os.read(fd, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._answered(json.loads(line))

    def _answered(self, answer: dict[str, Any]) -> None:
        found = self._waiting.pop(answer["no"], None)
        if found is not None:
            found[1].update(answer)
            found[0].set()

    def kill(self) -> int | None:
        """Send SIGKILL; return the pid that it went to."""
        if self._process is None:
            return None
        self._process.kill()
        return self._process.pid

    async def submit(self, task: str, arguments: dict[str, Any], tag: str, *, commit: bool) -> dict[str, Any]:
        """Have a submission made; return `{run, outcome}`. A process that dies leaves the outcome "asked"."""
        self._no += 1
        order = {"no": self._no, "task": task, "arguments": arguments, "tag": tag, "commit": commit}
        answer: dict[str, Any] = {"outcome": "asked"}
        if self._process is None or self._process.stdin is None:
            return answer
        done = trio.Event()
        self._waiting[self._no] = done, answer
        try:
            # A line is far below PIPE_BUF, and the process reads while it waits for nothing but the database.
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._waiting.pop(self._no, None)
            return answer
        await done.wait()
        return answer
