"""Processes that user code left behind: adopted by the supervisor, killed, reaped."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Final

import trio

from taskkit import linux

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds between looks when nothing has died; orphans that end by themselves wait this long as zombies.
_PERIOD: Final = 5.0

#: Seconds to wait while a birth is under way, whose child is not known by pid yet.
_RETRY: Final = 0.02


class Strays:
    """Finds children of this process that it did not make, and ends them.

    Args:
      known: returns the pids of all children that are meant to live.
      births: returns how many forks are under way. While there are some, an unknown child may be a new runner, so
        nobody is judged.
    """

    def __init__(self, known: Callable[[], set[int]], births: Callable[[], int]) -> None:
        self._known = known
        self._births = births
        self._wake = trio.Event()
        self.killed = 0

    def look(self) -> None:
        """A runner has died: look now for what it left behind."""
        self._wake.set()

    async def run(self) -> None:
        """Look whenever a runner dies, and now and then."""
        while True:
            with trio.move_on_after(_PERIOD):
                await self._wake.wait()
            self._wake = trio.Event()
            if self._births():
                await trio.sleep(_RETRY)
                self._wake.set()
            elif self._try_sweep():
                await trio.sleep(
                    _RETRY
                )  # they are zombies in a moment, and their own children come to us now
                self._wake.set()

    def _try_sweep(self) -> set[int]:
        try:
            return self.sweep()
        except OSError as error:  # no descriptor is left to look into /proc with
            logger.warning("cannot look for processes that tasks left behind: %s", error)
            return set()

    def sweep(self) -> set[int]:
        """Kill every unknown child and reap the dead; return the pids that were alive."""
        alive: set[int] = set()
        for pid in linux.children() - self._known():
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) != (0, 0):
                    continue  # it had ended by itself
                alive.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if alive:
            self.killed += len(alive)
            logger.info("killed %d process(es) that a task left behind: %s", len(alive), sorted(alive))
        return alive
