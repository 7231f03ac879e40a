"""Replaces the supervisor's own program under a tree that serves.

The image of this process becomes that of the installed version, with every child, pipe and socket kept. What is
left of the old version is exchanged from there: zygote, courier and runners by a reload, the gateway by a planned
restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from supervisor import handover
from supervisor.child import Child, spawn
from supervisor.handover import HandOver

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds for the new version to be imported, by a process of its own.
_PROBE_SECONDS: Final = 60.0

#: Seconds to wait for a moment in which no birth is under way and no message waits.
_CALM_SECONDS: Final = 20.0

#: Seconds between looks for such a moment; a fork takes five milliseconds.
_LOOK: Final = 0.005


class Upgrade:
    """One tree's change of its supervisor.

    Args:
      pause: makes no runner from now on, or again.
      hold: returns what is to be handed over, or None while something is on its way.
    """

    def __init__(self, *, pause: Callable[[bool], None], hold: Callable[[], HandOver | None]) -> None:
        self._pause = pause
        self._hold = hold
        self._probe: Child | None = None
        self.is_running = False

    @property
    def pids(self) -> set[int]:
        """Of the process that tries the new version: it is no stray."""
        return set() if self._probe is None else {self._probe.pid}

    async def run(self) -> str:
        """Become the installed version. Returns only when that failed: what went wrong; nothing has changed then."""
        if self.is_running:
            return "an upgrade is under way already"
        self.is_running = True
        try:
            return await self._try_import() or await self._leave()
        finally:
            self.is_running = False
            self._pause(False)

    async def _try_import(self) -> str:
        self._probe = probe = spawn("probe", "supervisor.probe", [], [], session=False)
        try:
            with trio.move_on_after(_PROBE_SECONDS):
                left = await probe.wait()
                return (
                    ""
                    if left.status == 0
                    else f"the installed version cannot be imported ({left}), see the log"
                )
            await probe.end(0.0)
            return f"importing the installed version took longer than {_PROBE_SECONDS:.0f} s"
        finally:
            self._probe = None

    async def _leave(self) -> str:
        self._pause(True)
        with trio.move_on_after(_CALM_SECONDS):
            while True:
                held = self._hold()
                if held is not None:
                    logger.info("upgrade: becoming the installed version")
                    return f"cannot become the installed version: {handover.leave(held)}"
                await trio.sleep(_LOOK)
        return f"the tree did not come to rest within {_CALM_SECONDS:.0f} s; try again"
