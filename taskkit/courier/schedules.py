"""The schedules of one database, looked at when something is due, at least once a second.

The wall clock says what is due. Set forward, it makes slots late: they are caught up on as the schedule says. Set back,
it makes schedules wait until it is there again; by more than STRAY, they begin anew from where it is now.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any, Final

from django.db import Error, router

from taskkit import registry
from taskkit.courier import firing, outbox_reader
from taskkit.schedule_models import Schedule, Slot
from taskkit.schedules import declare, declared, home, revive
from taskkit.timetable import ZoneMissing
from taskkit.wire.messages import ScheduleDefinition

_log = logging.getLogger("bulkhead.courier")

#: Seconds between two looks without a poke.
LOOK: Final = 1.0

#: Seconds between two reviews of all schedules: of those that are retired or stray, or were put aside.
REVIEW: Final = 30.0

#: Seconds that a schedule may wait longer than it should: its clock was ahead by that much, presumably.
STRAY: Final = 3600.0

#: Seconds after which a look ends, over a slow line: a piece of work may take taskkit.courier.reach.HANG_SECONDS.
LONGEST: Final = 2.0

#: Schedules done in one look; the others have theirs at once, behind whatever else the courier has to do.
ROUND: Final = 50


class Schedules:
    """What the courier has to do for the schedules of the database `using`.

    Args:
      clock: monotonic seconds.
      wall: Unix seconds.

    Attributes:
      next: when to look again, by `clock`.
    """

    def __init__(
        self,
        using: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._using = using
        self._clock = clock
        self._wall = wall
        self.is_ours = all(router.allow_migrate_model(using, model) for model in (Schedule, Slot))
        self.next = 0.0 if self.is_ours else math.inf
        self._code: dict[str, ScheduleDefinition] | None = None
        self._aside: dict[Any, str] = {}  # those that cannot be kept just now, and why
        self._review_at = 0.0
        self._version: int | None = None
        self._due = -math.inf  # the earliest slot, by the wall clock
        self._waiting = False

    def look_soon(self) -> None:
        """Look at the next turn: somebody changed a schedule, or may have."""
        if self.is_ours:
            self.next = 0.0
            self._version = None

    def turn(self) -> bool:
        """Do what is due; return whether something was submitted.

        Raises:
          DatabaseError: the database is away. It is done when it is back.
        """
        now = self._clock()
        if now < self.next:
            return False
        if self._code is None:
            self._declare()
        if now >= self._review_at:
            self._review()
            self._review_at = now + REVIEW
        submitted = self._look() if self._is_worth_a_look() else False
        self.next = min(self._clock() + LOOK, self._moment_of(self._due))
        return submitted

    def _moment_of(self, slot: float) -> float:
        """Return a slot by the monotonic clock."""
        return self._clock() + max(0.0, slot - self._wall())

    def _is_worth_a_look(self) -> bool:
        """Whether a slot is due or waits, or somebody wrote to the database, as far as it tells."""
        version = outbox_reader.data_version(self._using)
        news = version is None or version != self._version or self._waiting or self._due <= self._wall()
        self._version = version
        return news

    def _look(self) -> bool:
        live = Schedule.objects.using(self._using).filter(
            enabled=True, retired_at=None, next_slot__isnull=False
        )
        found = list(live.exclude(id__in=list(self._aside)).order_by("next_slot")[:ROUND])
        now = self._wall()
        due = [schedule for schedule in found if _slot_of(schedule) <= now]
        submitted = self._do_all(due, lambda one: firing.fire(self._using, one, now))
        submitted |= self._do_all(self._with_waiting(), lambda one: firing.advance(self._using, one))
        if due:  # there are next slots, which this look has not seen
            self._version, self._due = None, -math.inf
        else:
            self._due = min(map(_slot_of, found), default=math.inf)
        return submitted

    def _do_all(self, schedules: list[Schedule], act: Callable[[Schedule], bool]) -> bool:
        """Do these schedules, as far as there is time; return whether something was submitted."""
        end = self._clock() + LONGEST
        submitted = False
        for schedule in schedules:
            submitted |= self._try(schedule, act)
            if self._clock() > end:
                break
        return submitted

    def _with_waiting(self) -> list[Schedule]:
        waiting = Slot.objects.using(self._using).filter(state=Slot.State.WAITING).values("schedule")
        live = Schedule.objects.using(self._using).filter(id__in=waiting, enabled=True, retired_at=None)
        found = list(live.exclude(id__in=list(self._aside))[:ROUND])
        self._waiting = bool(found)
        return found

    def _try(self, schedule: Schedule, act: Callable[[Schedule], bool]) -> bool:
        """Do one schedule; what is wrong with it alone must not keep the others."""
        try:
            if schedule.task not in registry.known():
                raise LookupError(f"there is no task {schedule.task!r} in the code of this tree")
            return act(schedule)
        except (Error, OSError):  # the database's business: all of it waits
            raise
        except Exception as error:
            known = isinstance(error, ZoneMissing | LookupError)
            self._put_aside(schedule, str(error) if known else repr(error))
            return False

    def _put_aside(self, schedule: Schedule, reason: str) -> None:
        """Leave a schedule alone until the next review, and say why where people look."""
        if schedule.error != reason:
            _log.warning("the schedule %r is not kept: %s", schedule.name, reason)
            Schedule.objects.using(self._using).filter(id=schedule.id).update(error=reason)
        self._aside[schedule.id] = reason

    # --- from time to time ------------------------------------------------------------------------------------

    def _declare(self) -> None:
        """Have the database say what the code says, where schedules belong."""
        code, complaints = declared(registry.known())
        for complaint in complaints:
            _log.error("%s; `manage.py check` says the same", complaint)
        if self._using == home():
            for name in declare(code, using=self._using, now=self._wall()):
                _log.error(
                    "the schedule %r of the code is not kept: another one has its name; remove that", name
                )
        else:
            code = {}
        self._code = code

    def _review(self) -> None:
        self._aside.clear()
        self._version = None
        revive(self._code or {}, using=self._using)
        now = self._wall()
        rows = Schedule.objects.using(self._using)
        live = rows.filter(enabled=True, retired_at=None, at=None)
        for schedule in list(live.exclude(next_slot__lte=int(now))):
            try:
                expected = schedule.timing.after(now)
            except ZoneMissing:
                continue  # it is put aside when it is due
            if expected is None or _slot_of(schedule) <= expected + STRAY:
                continue
            _log.warning(
                "the schedule %r waited for %s; it begins anew from now", schedule.name, schedule.next_at
            )
            rows.filter(id=schedule.id, next_slot=schedule.next_slot).update(next_slot=expected)


def _slot_of(schedule: Schedule) -> float:
    """Return the slot that is waited for; infinity when there is none."""
    return math.inf if schedule.next_slot is None else schedule.next_slot
