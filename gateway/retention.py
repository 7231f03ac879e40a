"""Keeps the store from growing for ever, a slice at a time.

Rule: a slice holds up commits for as long as it takes (about 0.4 ms); between two the writer is left alone for longer
than that. So streams do not notice, however much there is to remove.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import trio

from gateway.ages import AgeClock
from gateway.documents import Kept, Vacuumed
from gateway.store.protocol import Store, StoreError
from gateway.store.removal import (
    OldestEvents,
    OldEvents,
    OldGrants,
    OldKeys,
    OldResults,
    OldRuns,
    Removal,
    Removed,
    RunLength,
    SurplusEvents,
    Usage,
)
from taskkit import linux
from taskkit.settings import Settings

logger = logging.getLogger("bulkhead.gateway")

#: What the writer is left alone for after a slice: so many times as long as the slice took, and at least so many
#: seconds. With 4, removal takes a fifth of the writer at most.
_REST: Final = 4.0
_SHORTEST_REST: Final = 0.002

#: Share of `event_bytes` beyond which there is no rest: a flood writes 50,000 events a second, of which 30,000 are
#: removed with rests on two busy cores (measured), and the disk is finite.
_HURRY_SHARE: Final = 0.1

#: Runs whose lengths are read at once.
_LENGTHS: Final = 1_000

#: Seconds for which a large value's file outlives its last reference: whoever has just read that still finds it.
_UNLINK_AFTER: Final = 10.0

#: Seconds between two looks for files that nothing refers to, and how old one has to be: between writing it and
#: referring to it a runner takes milliseconds, unless the store is full.
_SWEEP_EVERY: Final = 600.0
_ORPHAN_AGE: Final = 3600.0

#: Pages given back in one slice: 7 µs each (measured), so 64, a quarter of a megabyte, take 0.5 ms.
_VACUUM_PAGES: Final = 64

#: Free pages are left for what comes next unless they are so many bytes and this share of the file.
_VACUUM_BYTES: Final = 64 * 1024 * 1024
_VACUUM_SHARE: Final = 0.25

#: Seconds for which a ticket or a revocation is kept although it has expired: a clock may be set back.
_GRANT_MARGIN: Final = 3600.0

_CLOCK: Final = "retention.clock"


@dataclass(slots=True)
class Pass:
    """What one look at everything came to; `at` in Unix seconds."""

    at: float = 0.0
    seconds: float = 0.0
    removed: Removed = field(default_factory=Removed)
    blobs: int = 0
    blob_bytes: int = 0
    freed_bytes: int = 0

    def document(self) -> dict[str, Any]:
        """Return it as `/api/v1/stats` shows it."""
        removed = self.removed
        return {
            "at": self.at,
            "seconds": round(self.seconds, 3),
            "events": removed.events,
            "lines": removed.lines,
            "runs": removed.runs,
            "results": removed.results,
            "keys": removed.keys,
            "grants": removed.grants,
            "bytes": removed.size + self.blob_bytes,
            "blobs": self.blobs,
            "freed_bytes": self.freed_bytes,
        }


class Retention:
    """Looks after the store. One task runs `run`; any task may call the rest.

    Args:
      boot_id: the kernel's name for the time since the last boot.
      wall, counted: the clocks, see gateway.ages.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        boot_id: str,
        wall: Callable[[], float] = time.time,
        counted: Callable[[], float] = linux.boottime,
    ) -> None:
        self._store = store
        self._settings = settings.retention
        self._result_ttl = settings.result_ttl
        self._boot_id = boot_id
        self._wall = wall
        self._counted = counted
        self._clock: AgeClock | None = None
        self._weighed = False
        self._runs_seen = 0
        self._open: list[int] = []
        self._unlinks: list[tuple[float, list[str]]] = []
        self._swept_at = float("-inf")
        self._inherited: list[str] = []
        self._vacuuming = trio.Lock()
        self._pass = Pass()
        self._last: Pass | None = None
        self._total = Removed()
        self._passes = 0

    async def inherit(self) -> None:
        """Note the large values that are there while no runner lives: what nothing refers to now, nothing ever will.

        The first pass removes those. A runner that was killed between writing the file and naming it leaves one.
        """
        try:
            self._inherited = await self._store.upkeep.large_values()
        except OSError as error:  # no descriptor is left: the hourly sweep finds them
            logger.warning("blobs/ cannot be looked into: %s", error)

    async def run(self) -> None:
        """Make passes until cancelled. A store that does not answer delays them."""
        while True:
            try:
                await self.look()
            except (StoreError, OSError) as error:  # OSError: no descriptor is left to look into blobs/ with
                logger.warning("retention waits for the store: %s", error)
            await trio.sleep(self._settings.every_seconds)

    async def look(self) -> Pass:
        """Make one pass: take out everything that is due now.

        Raises:
          StoreError: the disk does not answer; what was not taken out is still due.
        """
        started, self._pass = trio.current_time(), Pass(at=self._wall())
        if not self._weighed:
            await self._store.upkeep.weigh()
            self._weighed = True
        if await self._may_age():
            await self._remove_the_old()
        await self._remove_the_surplus()
        await self._remove_the_heavy()
        await self._finish()
        self._pass.seconds = trio.current_time() - started
        self._last = self._pass
        self._passes += 1
        if self._pass.removed.rows:
            logger.info("retention removed %s", self._pass.document())
        return self._pass

    # --- what is due -----------------------------------------------------------------------------------------

    async def _may_age(self) -> bool:
        if self._clock is None:
            self._clock = AgeClock(self._boot_id, await self._store.upkeep.noted(_CLOCK))
        was_held = self._clock.held
        may = self._clock.look(self._wall(), self._counted())
        if self._clock.held and not was_held:
            logger.warning(
                "the wall clock has jumped ahead: nothing is removed for its age until it goes back, or for a day"
            )
        return may

    async def _remove_the_old(self) -> None:
        now, keep = self._wall(), self._settings
        if self._result_ttl is not None:
            await self._take_out(OldResults(now - self._result_ttl))
        if keep.run_age_seconds is not None:
            await self._take_out(OldRuns(now - keep.run_age_seconds))
        if keep.key_age_seconds is not None:
            await self._take_out(OldKeys(now - keep.key_age_seconds))
        await self._take_out(OldGrants(now - _GRANT_MARGIN))
        if keep.event_age_seconds is not None:
            await self._take_out(OldEvents(now - keep.event_age_seconds))

    async def _remove_the_surplus(self) -> None:
        """Shorten streams that are too long: only of runs that were open, or did not exist, at the last pass."""
        keep = self._settings.run_events
        if keep is None:
            return
        known, self._open = self._open, []
        while True:
            lengths = await self._store.upkeep.lengths(known, self._runs_seen, _LENGTHS)
            new = len(lengths) - len(known)
            known = []
            for one in lengths:
                await self._shorten(one, keep)
            if new < _LENGTHS:
                return

    async def _shorten(self, run: RunLength, keep: int) -> None:
        self._runs_seen = max(self._runs_seen, run.run)
        if run.open:
            self._open.append(run.run)
        if max(run.tail, run.lines) > keep:
            await self._take_out(SurplusEvents(run.run, keep))

    async def _remove_the_heavy(self) -> None:
        limit = self._settings.event_bytes
        if limit is None:
            return
        # Under a flood there is always more: the rest of the pass has its turn, too.
        ends_at = trio.current_time() + self._settings.every_seconds
        while trio.current_time() < ends_at:
            usage = await self._store.upkeep.usage()
            surplus = (usage.events or 0) - limit
            hurry = surplus > limit * _HURRY_SHARE
            if surplus <= 0 or not (await self._take_out(OldestEvents(surplus), hurry=hurry)).rows:
                return

    async def _take_out(self, removal: Removal, *, hurry: bool = False) -> Removed:
        """Take out all of it, slice by slice, resting in between; in a hurry without a rest.

        Even then one slice at a time is in the writer's queue, so a commit waits for one at most.
        """
        removed = Removed(more=True)
        while removed.more:
            started = trio.current_time()
            wanted = removal
            if isinstance(removal, OldestEvents):
                wanted = OldestEvents(removal.size - removed.size)
            one = await self._store.upkeep.remove(wanted)
            removed.add(one)
            self._note_removed(one)
            if one.rows and not hurry:
                await trio.sleep(max(_SHORTEST_REST, _REST * (trio.current_time() - started)))
        return removed

    def _note_removed(self, removed: Removed) -> None:
        if removed.blobs:
            self._unlinks.append((trio.current_time() + _UNLINK_AFTER, removed.blobs))
        counts = replace(removed, blobs=[])
        self._pass.removed.add(counts)
        self._total.add(counts)

    # --- the end of a pass -----------------------------------------------------------------------------------

    async def _finish(self) -> None:
        assert self._clock is not None
        now = trio.current_time()
        due = [names for at, names in self._unlinks if at <= now]
        # Before files go, what referred to them has to be gone for good, also after a power cut.
        await self._store.upkeep.note(_CLOCK, self._clock.note())
        self._unlinks = [(at, names) for at, names in self._unlinks if at > now]
        for names in due:
            self._pass.blobs += len(names)
            self._pass.blob_bytes += await self._store.upkeep.unlink(names)
        await self._sweep(self._clock.held)
        usage = await self._store.upkeep.usage()
        if usage.incremental and usage.free > max(_VACUUM_BYTES, _VACUUM_SHARE * usage.file):
            self._pass.freed_bytes = (await self.vacuum(self._settings.every_seconds))["freed_bytes"]

    async def _sweep(self, held: bool) -> None:
        if self._inherited:
            self._count(await self._store.upkeep.drop(self._inherited))
            self._inherited = []
        if held or trio.current_time() < self._swept_at + _SWEEP_EVERY:
            return
        self._swept_at = trio.current_time()
        self._count(await self._store.upkeep.sweep(self._wall() - _ORPHAN_AGE))

    def _count(self, dropped: tuple[int, int]) -> None:
        number, size = dropped
        self._pass.blobs += number
        self._pass.blob_bytes += size

    async def vacuum(self, seconds: float) -> Vacuumed:
        """Give free pages back to the disk for at most `seconds`; return what that came to.

        Cancelled, it has given back what it has. A second call waits for the first, within its own time.

        Raises:
          StoreError: the disk does not answer.
        """
        started = trio.current_time()
        before = after = await self._store.upkeep.usage()
        with trio.move_on_after(seconds):
            async with self._vacuuming:
                left = before.free if before.incremental else 0
                while left:
                    began = trio.current_time()
                    left = await self._store.upkeep.vacuum(_VACUUM_PAGES)
                    await trio.sleep(max(_SHORTEST_REST, _REST * (trio.current_time() - began)))
        await self._store.upkeep.checkpoint()  # the file itself gets shorter now
        after = await self._store.upkeep.usage()
        return {
            "freed_bytes": max(0, before.file - after.file),
            "free_bytes": after.free,
            "file_bytes": after.file,
            "incremental": after.incremental,
            "seconds": round(trio.current_time() - started, 3),
        }

    async def statistics(self) -> Kept:
        """Return what the store takes of the disk, and what was removed.

        Raises:
          StoreError: the disk does not answer.
        """
        last = None if self._last is None else self._last.document()
        total = Pass(removed=self._total).document()
        return {
            "store": _usage(await self._store.upkeep.usage()),
            "retention": {
                "passes": self._passes,
                "clock_held": self._clock is not None and self._clock.held,
                "last": last,
                "total": {key: total[key] for key in ("events", "lines", "runs", "results", "keys", "bytes")},
            },
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "file_bytes": usage.file,
        "wal_bytes": usage.wal,
        "free_bytes": usage.free,
        "event_bytes": usage.events,
        "blobs": usage.blobs,
        "blob_bytes": usage.blob_bytes,
        "incremental": usage.incremental,
    }
