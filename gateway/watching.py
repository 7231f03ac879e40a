"""Collects which of many runs have spoken, with one wake-up for all of them.

Rule: touching is synchronous and waits for nobody. A run is kept once however often it speaks, so what waits here is
bounded by the number of runs that are followed.
"""

from __future__ import annotations

import trio


class Watcher:
    """The runs that have spoken since one subscriber looked; see gateway.fanout.Hub.watcher."""

    __slots__ = ("_awake", "_lot", "_touched")

    def __init__(self) -> None:
        self._touched: set[int] = set()
        self._awake = False
        self._lot = trio.lowlevel.ParkingLot()

    def touch(self, run: int) -> None:
        """The run with this number has spoken."""
        self._touched.add(run)
        self._lot.unpark_all()

    def wake(self) -> None:
        """There is another reason to look: at once, or as soon as somebody waits."""
        self._awake = True
        self._lot.unpark_all()

    def take(self) -> set[int]:
        """Return the runs that have spoken since the last call."""
        touched, self._touched = self._touched, set()
        self._awake = False
        return touched

    async def wait(self) -> None:
        """Return when there is something to take, or to look at. May return early; the caller has a deadline."""
        if self._touched or self._awake:
            await trio.lowlevel.checkpoint()
            return
        await self._lot.park()
