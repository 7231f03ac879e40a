"""When a schedule is due: cron texts, intervals, single moments.

Pure but for the time zone data, which it reads. Moments are Unix seconds: whatever the clocks of a time zone do, and
however a database stores times, two slots of one schedule are two numbers.

Rule 1: the slots of a schedule are a function of its definition alone. Whoever asks, from whatever moment, gets the
same ones; so any number of trees agree on them.

Rule 2: cron texts mean what they mean to Debian's cron. At a fixed time (neither minute nor hour begins with `*`), a
slot that the clocks jump over comes right behind the gap, and one whose time comes twice comes the first time. With
`*`, it goes by the time that really passes.
"""

from __future__ import annotations

import datetime
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

Overlap = Literal["skip", "queue", "allow"]
CatchUp = Literal["latest", "all", "none"]

#: What becomes of a slot while the run of an earlier one is open.
OVERLAPS: Final[tuple[str, ...]] = get_args(Overlap)

#: What becomes of slots that nobody was there for.
CATCH_UPS: Final[tuple[str, ...]] = get_args(CatchUp)

#: Slots made up for at once with catchup="all", the newest. A tree that was down for a week over a schedule of every
#: minute would owe 10,000.
MOST_CAUGHT_UP: Final = 100

#: Slots kept at once, in one transaction; the others follow at once. A slot takes two statements, which over a line of
#: 50 ms is a second for ten.
AT_ONCE: Final = 10

#: Slots of one schedule that wait for an earlier run with overlap="queue"; what comes on top is skipped.
MOST_WAITING: Final = 100

#: Seconds within which a slot counts as kept, for catchup="none": a restart of the tree takes a few.
PUNCTUAL: Final = 60.0

MAX_CRON: Final = 200  # characters
MAX_ZONE: Final = 100  # characters
MAX_EVERY: Final = 10 * 366 * 86_400  # seconds
MAX_AT: Final = 253_402_300_799  # the last second of the year 9999, the last that datetime knows

_FIELDS: Final = {
    "minute": "0-59",
    "hour": "0-23",
    "day-of-month": "1-31 or L, the last",
    "month": "1-12 or JAN-DEC",
    "day-of-week": "0-7 or SUN-SAT, both 0 and 7 are Sunday",
}

_NICKNAMES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

_LEAP_YEAR: Final = datetime.datetime(2000, 1, 1)


class TimingError(ValueError):
    """A schedule's time makes no sense; `errors` has a sentence with the remedy by the name of what is wrong."""

    def __init__(self, errors: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name} {text}" for name, text in errors.items()))
        self.errors = errors


class ZoneMissing(TimingError):
    """This machine has no data of a time zone."""

    def __init__(self, name: str) -> None:
        super().__init__(
            {
                "tz": f"= {name[:MAX_ZONE]!r}: there is no such time zone here; names are like 'Europe/Berlin' (case "
                "matters). If it is right, this machine lacks time zone data: install the package tzdata, Debian's or "
                "PyPI's"
            }
        )


def zone_of(name: str) -> datetime.tzinfo:
    """Return the time zone of that name.

    Raises:
      ZoneMissing: there is none.
    """
    if name == "UTC":
        return datetime.UTC
    try:
        return ZoneInfo(name)
    except (
        ZoneInfoNotFoundError,
        ValueError,
        OSError,
    ):  # a name that is a folder's, or leaves the data's own
        raise ZoneMissing(name) from None


@dataclass(frozen=True, slots=True)
class Timing:
    """When a schedule is due: one of `cron`, `every`, `at`. Make it with `checked`, or of what that has seen.

    Attributes:
      cron: five fields.
      every: seconds from one slot to the next; the first is `every` behind `anchor`.
      at: the only slot.
      tz: time zone of `cron`.
    """

    cron: str | None = None
    every: int | None = None
    at: int | None = None
    tz: str = "UTC"
    anchor: int = 0

    def after(self, moment: float) -> int | None:
        """Return the first slot behind `moment`; None: there is none.

        Raises:
          ZoneMissing: the time zone's data has gone.
        """
        return next(self._following(moment), None)

    def due(self, since: int, until: float, most: int) -> list[int]:
        """Return the slots from `since` to `until`, both included; of more than `most` the newest, oldest first.

        Raises:
          ZoneMissing: the time zone's data has gone.
        """
        if self.every is not None:
            last = since + math.floor((until - since) / self.every) * self.every
            first = max(since, last - (most - 1) * self.every)
            return list(range(first, last + 1, self.every))
        # A year of minutes takes seconds to walk through: begin near the end, and farther off if that was too near.
        width = 60 * most
        while True:
            begin = max(since - 1, math.floor(until) - width)
            found = deque(takewhile(lambda slot: slot <= until, self._following(begin)), maxlen=most)
            if begin < since or len(found) == most:
                return list(found)
            width *= 4

    def _following(self, moment: float) -> Iterator[int]:
        """Yield the slots behind `moment`."""
        if self.at is not None:
            if self.at > moment:
                yield self.at
        elif self.every is not None:
            slot = self.anchor + max(1, math.floor((moment - self.anchor) / self.every) + 1) * self.every
            while True:
                yield slot
                slot += self.every
        elif self.cron is not None:
            newest = moment
            for found in CronSim(
                self.cron, datetime.datetime.fromtimestamp(math.floor(moment), zone_of(self.tz))
            ):
                # Begun within an hour that comes twice, cronsim may name a slot of its first time.
                if (slot := int(found.timestamp())) > newest:
                    yield slot
                    newest = slot


def checked(
    *, cron: str | None, every: float | None, at: float | None, tz: str | None, zone: str, anchor: float
) -> Timing:
    """Return the timing of a schedule.

    Args:
      tz: as it was given; only with `cron`.
      zone: the time zone when none was given.
      anchor: now.

    Raises:
      TimingError: something is wrong; `errors` says what, by name.
    """
    given = {
        name: value for name, value in (("cron", cron), ("every", every), ("at", at)) if value is not None
    }
    if len(given) != 1:
        raise TimingError({next(iter(given), "cron"): "is one of cron, every, at: give exactly one of them"})
    errors: dict[str, str] = {}
    if tz is not None and cron is None:
        errors["tz"] = "has an effect with cron only; leave it out"
    if every is not None and not (1 <= every <= MAX_EVERY and every == int(every)):
        errors["every"] = f"= {every!r}: must be a whole number of seconds from 1 to {MAX_EVERY}"
    if at is not None and not 0 <= at <= MAX_AT:
        errors["at"] = f"= {at!r}: must be a moment up to the year 9999"
    if not errors and cron is not None:
        errors |= _cron_errors(cron, tz or zone, anchor)
    if errors:
        raise TimingError(errors)
    return Timing(
        cron=None if cron is None else " ".join(cron.split()),
        every=None if every is None else int(every),
        at=None if at is None else math.floor(at),
        tz=(tz or zone) if cron is not None else "UTC",
        anchor=math.floor(anchor),
    )


def _cron_errors(cron: str, tz: str, now: float) -> dict[str, str]:
    parts = cron[: 2 * MAX_CRON].split()
    if len(cron) > MAX_CRON:
        return {"cron": f"has {len(cron)} characters; {MAX_CRON} are allowed"}
    if (meant := _NICKNAMES.get(cron.strip().lower())) is not None:
        return {"cron": f"= {cron!r}: write {meant!r}"}
    if len(parts) != len(_FIELDS):
        fields = " ".join(_FIELDS)
        return {
            "cron": f"= {cron!r}: has {len(parts)} fields, not five: {fields}, for example '30 3 * * MON-FRI'; what "
            "is due more often than once a minute says every"
        }
    try:
        timing = Timing(cron=cron, tz=tz)
        CronSim(cron, _LEAP_YEAR)
        return {} if timing.after(now) is not None else {"cron": f"= {cron!r}: is never due: no date fits"}
    except TimingError as error:
        return error.errors
    except CronSimError:
        return {"cron": f"= {cron!r}: {_complaint(parts)}"}


def _complaint(parts: list[str]) -> str:
    """Return which field is wrong, and what it may be."""
    for position, (name, allowed) in enumerate(_FIELDS.items()):
        alone = ["*"] * len(parts)
        alone[position] = parts[position]
        try:
            CronSim(" ".join(alone), _LEAP_YEAR)
        except CronSimError:
            return (
                f"{name} {parts[position]!r} is not understood; write {allowed}, `*` for any, lists as 1,2, ranges "
                "as 1-5, steps as */2"
            )
    return f"is never due: no month {parts[3]} has a day {parts[2]}"


class Decision(NamedTuple):
    """What is to be done: the slots that are kept now, oldest first; the next one, if there is one: due, or to come."""

    slots: list[int]
    next: int | None


def decide(timing: Timing, next_slot: int, now: float, catchup: str) -> Decision | None:
    """Return what a schedule that waits for `next_slot` has to do at `now`; None: to wait.

    Raises:
      ZoneMissing: the time zone's data has gone.
    """
    if next_slot > now:
        return None
    slots = timing.due(next_slot, now, MOST_CAUGHT_UP if catchup == "all" else 1)
    if catchup == "none":
        slots = [slot for slot in slots if now - slot <= PUNCTUAL]
    if len(slots) > AT_ONCE:
        return Decision(slots[:AT_ONCE], slots[AT_ONCE])
    return Decision(slots, timing.after(now))


class Fate(NamedTuple):
    """What becomes of slots, each in its order."""

    submitted: list[int]
    waiting: list[int]
    skipped: list[int]


def fate(slots: list[int], overlap: str, *, is_open: bool, waiting: int) -> Fate:
    """Return what becomes of `slots`.

    Args:
      is_open: whether a run of an earlier slot has not ended.
      waiting: how many earlier slots wait.
    """
    if overlap == "allow":
        return Fate(slots, [], [])
    free = 0 if is_open or waiting else 1
    room = free + max(0, MOST_WAITING - waiting) if overlap == "queue" else free
    return Fate(slots[:free], slots[free:room], slots[max(free, room) :])
