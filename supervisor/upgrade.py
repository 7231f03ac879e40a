"""Replaces the supervisor's own program under a tree that serves.

The image of this process becomes that of the installed version, with every child, pipe and socket kept. What is
left of the old version is exchanged from there: zygote, courier and runners by a reload, the gateway by a planned
restart.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Final

import trio

from supervisor import handover
from supervisor.child import Child, spawn
from supervisor.handover import HandOver
from taskkit.errors import SettingsError

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds for the new version to be imported, by a process of its own.
_PROBE_SECONDS: Final = 60.0

#: Seconds to wait for a moment in which no birth is under way and no message waits.
_CALM_SECONDS: Final = 20.0

_RESTLESS: Final = f"the tree did not come to rest within {_CALM_SECONDS:.0f} s; try again"

#: Seconds between looks for such a moment; a fork takes five milliseconds.
_LOOK: Final = 0.005


class Upgrade:
    """One tree's change of its supervisor.

    Args:
      pause: makes no runner from now on, or again.
      hold: returns what is to be handed over, or None while something is on its way.
      check: raises SettingsError when the next image could not begin.
    """

    def __init__(
        self,
        *,
        pause: Callable[[bool], None],
        hold: Callable[[], HandOver | None],
        check: Callable[[], object],
    ) -> None:
        self._check = check
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
            self._check()
            return await self._rehearse() or await self._leave()
        except (
            OSError,
            SettingsError,
        ) as error:  # no descriptor is left, or no process; the key is not there
            return f"cannot become the installed version: {error}"
        finally:
            self.is_running = False
            self._pause(False)

    async def _rehearse(self) -> str:
        """Have the installed version imported, and take what it would be handed over, by a process of its own."""
        held = await self._held()
        if held is None:
            return _RESTLESS
        memory = handover.written(held)
        try:
            self._probe = probe = spawn("probe", "supervisor.probe", [str(memory)], [memory], session=False)
        finally:
            os.close(memory)
        try:
            with trio.move_on_after(_PROBE_SECONDS):
                left = await probe.wait()
                return (
                    "" if left.status == 0 else f"the installed version does not start ({left}), see the log"
                )
            await probe.end(0.0)
            return f"importing the installed version took longer than {_PROBE_SECONDS:.0f} s"
        finally:
            self._probe = None

    async def _leave(self) -> str:
        self._pause(True)
        held = await self._held()
        if held is None:
            return _RESTLESS
        logger.info("upgrade: becoming the installed version")
        return f"cannot become the installed version: {handover.leave(held)}"

    async def _held(self) -> HandOver | None:
        """Return what is to be handed over as soon as nothing is on its way; None when that takes too long."""
        with trio.move_on_after(_CALM_SECONDS):
            while True:
                held = self._hold()
                if held is not None:
                    return held
                await trio.sleep(_LOOK)
        return None
