"""What the gateway has done with schedules."""

from __future__ import annotations

from typing import Final

from django.db import DataError

from taskkit import schedules
from taskkit.identifiers import parse_run_id
from taskkit.schedule_models import Schedule
from taskkit.schedules import InTheCode, NameTaken
from taskkit.timetable import TimingError
from taskkit.wire import codec
from taskkit.wire.messages import ScheduleAnswer, ScheduleDefinition, ScheduleOrder, ScheduleState

#: Bytes of schedules in one answer, about: a page ends earlier then.
_PAGE_BYTES: Final = 1024 * 1024


def obey(order: ScheduleOrder, using: str) -> ScheduleAnswer:
    """Do what is asked for in the database `using`.

    Raises:
      DatabaseError: the database does not answer.
    """
    try:
        return _obey(order, using)
    except (NameTaken, InTheCode) as error:
        return ScheduleAnswer(ask=order.ask, status="taken", detail=str(error))
    except TimingError as error:
        return ScheduleAnswer(ask=order.ask, status="invalid", detail=str(error), errors=error.errors)
    except (DataError, ValueError) as error:  # NUL, which PostgreSQL does not store
        return ScheduleAnswer(
            ask=order.ask,
            status="invalid",
            detail=f"the database does not take it: {error}".replace("\0", "\ufffd"),
        )


def _obey(order: ScheduleOrder, using: str) -> ScheduleAnswer:
    if order.order == "list":
        return _list(order, using)
    if order.order == "create":
        assert order.definition is not None
        made, new = schedules.put(order.definition, using=using, subject=order.subject, enabled=order.enabled)
        return ScheduleAnswer(ask=order.ask, status="made" if new else "done", schedules=[state_of(made)])
    id = parse_run_id(order.id)
    found = None if id is None else Schedule.objects.using(using).filter(id=id).first()
    if found is not None and order.order in ("enable", "disable"):
        found = schedules.switch(id, enabled=order.order == "enable", using=using)
    elif found is not None and order.order == "delete" and not schedules.remove(id, using=using):
        found = None
    if found is None:
        return ScheduleAnswer(ask=order.ask, status="unknown")
    return ScheduleAnswer(ask=order.ask, status="done", schedules=[state_of(found)])


def _list(order: ScheduleOrder, using: str) -> ScheduleAnswer:
    rows = Schedule.objects.using(using).filter(name__gt=order.after).order_by("name")[: order.limit + 1]
    states: list[ScheduleState] = []
    size = 0
    for row in rows:
        state = state_of(row)
        size += len(codec.pack(ScheduleAnswer(ask="", status="", schedules=[state])))
        if states and (len(states) == order.limit or size > _PAGE_BYTES):
            return ScheduleAnswer(ask=order.ask, status="done", schedules=states, more=True)
        states.append(state)
    return ScheduleAnswer(ask=order.ask, status="done", schedules=states)


def state_of(row: Schedule) -> ScheduleState:
    """Return a schedule as the gateway is told of it."""
    return ScheduleState(
        id=str(row.id),
        definition=ScheduleDefinition(name=row.name, **row.definition()),
        enabled=row.enabled,
        origin=row.origin,
        subject=row.subject,
        next_slot=row.next_slot if row.is_live else None,
        last_slot=row.last_slot,
        created_at=row.created_at.timestamp(),
        error=row.error if row.retired_at is None else "the code has it no more",
    )
