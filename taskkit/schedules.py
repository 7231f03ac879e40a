"""Schedules in the project's database: made, switched, removed.

Whoever calls this, only the courier keeps them; it looks once a second. Makes no run, and calls no user code.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from django.db import IntegrityError, router, transaction
from django.utils import timezone

from taskkit import registry, scheduling
from taskkit.errors import InvalidArguments, TaskkitError
from taskkit.outbox import as_json, check, name_of
from taskkit.registry import TaskDefinition
from taskkit.schedule_models import NAME_LENGTH, Schedule, Slot
from taskkit.times import unix_time
from taskkit.timetable import CatchUp, Overlap, Timing, TimingError, checked
from taskkit.wire.messages import ScheduleDefinition, Submit

#: Seconds for which a schedule that has left the code is kept: a tree of the older code may still run, or run again.
RETIREMENT: Final = 7 * 86_400

#: What a submission may say beside its arguments.
OPTIONS: Final = ("pool", "priority", "timeout", "max_attempts", "metadata", "tags")


class NameTaken(TaskkitError):
    """Another schedule has the name."""


class InTheCode(TaskkitError):
    """The schedule is the code's: it cannot be removed here."""


def create(
    task: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    cron: str | None = None,
    every: float | timedelta | None = None,
    at: datetime | timedelta | None = None,
    tz: str | None = None,
    overlap: Overlap = "skip",
    catchup: CatchUp = "latest",
    enabled: bool = True,
    subject: str = "",
    using: str | None = None,
    **options: Any,
) -> Schedule:
    """Make a schedule, in the transaction that is open; the same again is the one that there is.

    `cron`, `every` (seconds) and `at` say when; `tz` belongs to `cron`, by default it is the project's TIME_ZONE. For
    `overlap` and `catchup` see `taskkit.schedule`. `options` are what `taskkit.submit` takes: pool, priority, timeout,
    max_attempts, metadata, tags.

    Raises:
      UnknownTask, InvalidArguments, TypeError, ValueError: as `taskkit.submit`.
      TimingError: the time makes no sense; the message says what is wrong.
      NameTaken: a schedule of this name is another one.
    """
    if unknown := options.keys() - set(OPTIONS):
        raise TypeError(
            f"a schedule has no option {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}"
        )
    found = registry.find(name_of(task, None))
    definition = ScheduleDefinition(
        task=found.info.name,
        name=name,
        cron=cron,
        every=every.total_seconds() if isinstance(every, timedelta) else every,
        at=None if at is None else unix_time(at, "at"),
        tz=tz,
        overlap=overlap,
        catchup=catchup,
        args=as_json(list(args), f"args of {found.info.name}"),
        kwargs=as_json(dict(kwargs or {}), f"kwargs of {found.info.name}"),
        options=as_json({key: value for key, value in options.items() if value is not None}, "options"),
    )
    found.bind(definition.args, definition.kwargs)
    check(
        Submit(
            id="", task=found.info.name, args=definition.args, kwargs=definition.kwargs, **definition.options
        )
    )
    return put(definition, subject=subject, enabled=enabled, using=using or home())[0]


def home() -> str:
    """Return the alias of the database that schedules are made in."""
    return router.db_for_write(Schedule)


def put(
    definition: ScheduleDefinition,
    *,
    using: str,
    subject: str = "",
    enabled: bool = True,
    now: float | None = None,
) -> tuple[Schedule, bool]:
    """Make the schedule, or find the same one; return it, and whether it is new.

    Raises:
      TimingError, NameTaken: see `create`.
      DatabaseError: the database does not take it.
    """
    now = time.time() if now is None else now
    timing = timing_of(definition, now)
    digest = digest_of(definition, timing, subject)
    name = definition.name or f"{definition.task[: NAME_LENGTH - 17]}:{digest[:16]}"
    rows = Schedule.objects.using(using)
    made = Schedule(
        name=name,
        task=definition.task,
        subject=subject,
        origin=Schedule.Origin.API,
        digest=digest,
        enabled=enabled,
        **columns(definition, timing),
    )
    for _ in range(2):
        there = rows.filter(name=name).first()
        if there is not None:
            if there.digest != digest:
                raise NameTaken(
                    f"another schedule is {name!r} ({there.when}); choose another name, or remove it"
                )
            return there, False
        made.next_slot = timing.after(now)
        if made.next_slot is None:
            raise TimingError({"at": "lies in the past"})
        try:
            with transaction.atomic(using=using):
                rows.bulk_create([made])  # unlike create(): no signal, no user code
        except IntegrityError:  # somebody was faster; the next round finds it
            continue
        return made, True
    raise NameTaken(f"the schedule {name!r} is being made and removed; try again")


def timing_of(definition: ScheduleDefinition, now: float) -> Timing:
    """Return when it is due, in the project's time zone unless it names one.

    Raises:
      TimingError: it makes no sense.
    """
    return checked(
        cron=definition.cron,
        every=definition.every,
        at=definition.at,
        tz=definition.tz,
        zone=timezone.get_default_timezone_name(),
        anchor=now,
    )


def digest_of(definition: ScheduleDefinition, timing: Timing, subject: str) -> str:
    """Return what tells two definitions apart; neither the name counts nor when it was made."""
    told = [
        timing.cron,
        timing.every,
        timing.at,
        timing.tz,
        definition.task,
        definition.overlap,
        definition.catchup,
    ]
    arguments = [definition.args, definition.kwargs, definition.options, subject]
    return hashlib.sha256(msgspec.json.encode([told, arguments], order="sorted")).hexdigest()


def columns(definition: ScheduleDefinition, timing: Timing) -> dict[str, Any]:
    """Return the columns that follow from a definition."""
    return {
        **{name: getattr(timing, name) for name in ("cron", "every", "at", "tz", "anchor")},
        **{name: getattr(definition, name) for name in ("overlap", "catchup", "args", "kwargs", "options")},
    }


def switch(id: Any, *, enabled: bool, using: str) -> Schedule | None:
    """Enable or disable a schedule; return it as it is now, None when there is none.

    What was due while it was disabled is not made up for.

    Raises:
      ZoneMissing: it cannot be enabled, as this machine lacks data of its time zone.
    """
    rows = Schedule.objects.using(using).filter(id=id)
    there = rows.first()
    if there is not None and there.enabled is not enabled:
        change: dict[str, Any] = {"enabled": enabled, "updated_at": timezone.now()}
        if enabled:
            change |= {"next_slot": there.timing.after(time.time()), "error": ""}
        rows.filter(enabled=not enabled).update(**change)
        there = rows.first()
    return there


def remove(id: Any, *, using: str) -> bool:
    """Remove a schedule with its slots; its runs stay. Return whether there was one.

    Raises:
      InTheCode: it would be back at the next start.
    """
    rows = Schedule.objects.using(using).filter(id=id)
    with transaction.atomic(using=using):
        # A write first: it waits for a courier that keeps a slot of it just now, and lets none begin.
        if not rows.filter(origin=Schedule.Origin.API).update(enabled=False):
            if rows.exists():
                raise InTheCode("this schedule is an @schedule in the code: remove it there, or disable it")
            return False
        Slot.objects.using(using).filter(schedule=id)._raw_delete(using)
        rows._raw_delete(using)
    return True


# --- those in the code -----------------------------------------------------------------------------------------


def declared(
    definitions: Mapping[str, TaskDefinition], now: float | None = None
) -> tuple[dict[str, ScheduleDefinition], list[str]]:
    """Return the schedules in the code by name, with what is wrong with others of them."""
    found: dict[str, ScheduleDefinition] = {}
    complaints: list[str] = []
    owned: set[int] = set()
    for task in definitions.values():
        noted = scheduling.noted_on(task.func)
        owned |= {id(one) for one in noted}
        for one in noted:
            name = f"{task.info.name}:{one.name}" if one.name else task.info.name
            try:
                if name in found:
                    raise ValueError("several schedules need names: @schedule(…, name=…)")
                found[name] = _declaration(name, task, one, time.time() if now is None else now)
            except (ValueError, TypeError, InvalidArguments) as error:
                complaints.append(f"@schedule on {task.place}: {error}")
    for function in scheduling.functions():
        if not any(id(one) in owned for one in scheduling.noted_on(function)):
            place = f"{function.__module__}.{function.__qualname__}"
            complaints.append(
                f"@schedule on {place}, which is no task: put @task on it, in an app's tasks module"
            )
    return found, complaints


def _declaration(name: str, task: TaskDefinition, noted: scheduling.Noted, now: float) -> ScheduleDefinition:
    definition = ScheduleDefinition(
        task=task.info.name,
        name=name,
        cron=noted.cron,
        every=noted.every,
        tz=noted.tz,
        overlap=noted.overlap,
        catchup=noted.catchup,
        args=as_json(noted.args, "args"),
        kwargs=as_json(noted.kwargs, "kwargs"),
    )
    timing_of(definition, now)
    try:
        task.bind(definition.args, definition.kwargs)
    except InvalidArguments as error:
        text = "; ".join(f"{name}: {text}" for name, text in error.errors.items())
        raise ValueError(f"args and kwargs do not fit {task.info.name}: {text or error}") from None
    if len(name) > NAME_LENGTH:
        raise ValueError(f"its name {name[:60]!r}… has more than {NAME_LENGTH} characters")
    return definition


def declare(definitions: Mapping[str, ScheduleDefinition], *, using: str, now: float) -> list[str]:
    """Have the database say what the code says; return the names that belong to schedules of somebody else.

    What stays the same goes on where it was, be it disabled. What has changed begins anew. What is gone retires.
    Trees of one database do this in turn, each at its start; the code of the newest start counts.

    Raises:
      DatabaseError: the database is away.
    """
    rows = Schedule.objects.using(using)
    there = {row.name: row for row in rows.filter(name__in=list(definitions))}
    taken = []
    for name, definition in definitions.items():
        row = there.get(name)
        if row is not None and row.origin != Schedule.Origin.CODE:
            taken.append(name)
            continue
        timing = timing_of(definition, now)
        digest = digest_of(definition, timing, "")
        if row is None:
            made = Schedule(
                name=name,
                task=definition.task,
                origin=Schedule.Origin.CODE,
                digest=digest,
                next_slot=timing.after(now),
            )
            for column, value in columns(definition, timing).items():
                setattr(made, column, value)
            rows.bulk_create([made], ignore_conflicts=True)  # another tree may start just now
        elif row.digest != digest:
            rows.filter(id=row.id).update(
                **columns(definition, timing),
                task=definition.task,
                digest=digest,
                next_slot=timing.after(now),
                retired_at=None,
                error="",
                updated_at=timezone.now(),
            )
    revive(definitions, using=using)
    rows.filter(origin=Schedule.Origin.CODE, retired_at=None).exclude(name__in=list(definitions)).update(
        retired_at=int(now)
    )
    _bury(using, now)
    return taken


def revive(definitions: Mapping[str, ScheduleDefinition], *, using: str) -> None:
    """Have what the code says be kept, though a tree of other code has retired it since."""
    retired = Schedule.objects.using(using).filter(origin=Schedule.Origin.CODE, retired_at__isnull=False)
    retired.filter(name__in=list(definitions)).update(retired_at=None)


def _bury(using: str, now: float) -> None:
    """Remove what has been retired for long."""
    gone = Schedule.objects.using(using).filter(retired_at__lt=int(now) - RETIREMENT)
    ids = list(gone.values_list("id", flat=True))
    if ids:
        with transaction.atomic(using=using):
            Slot.objects.using(using).filter(schedule__in=ids)._raw_delete(using)
            Schedule.objects.using(using).filter(id__in=ids)._raw_delete(using)
