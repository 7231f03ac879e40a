"""A slot that is due becomes a run: row, run, outbox entry, next slot in one transaction.

Rule 1: the transaction begins by moving the schedule on from the very slot that was read. Of several couriers the
database lets one do that; the others find it moved. Killed in the middle, nothing has happened, and another does it.

Rule 2: what decides on a slot reads behind that write. It holds the schedule's row, so whether an earlier run is open,
and which slots have rows, cannot change under it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from django.db import transaction
from django.utils import timezone

from taskkit import failpoints, registry
from taskkit.identifiers import new_run_id
from taskkit.models import OPEN, Run
from taskkit.outbox import insert_rows
from taskkit.schedule_models import Schedule, Slot
from taskkit.timetable import Decision, decide, fate
from taskkit.wire.messages import Submit

#: Slots that are kept of a schedule, the newest. They are what keeps a slot from being taken twice when a clock that
#: was wrong by far is set back, and what the admin shows.
KEPT: Final = 1000

#: Slots looked at, from the newest, for a run that is open: but for overlap="allow" there is one at most.
_LOOKED_AT: Final = 20


def fire(using: str, schedule: Schedule, now: float) -> bool:
    """Do what `schedule`, as it was read, has to do at `now`; return whether something was submitted.

    Raises:
      ZoneMissing: this machine lacks data of its time zone.
      DatabaseError: the database is away; whether it was done shows when it is back.
    """
    if schedule.next_slot is None:
        return False
    decision = decide(schedule.timing, schedule.next_slot, now, schedule.catchup)
    if decision is None:
        return False
    failpoints.hit("schedule.due")
    with transaction.atomic(using=using):
        if not _move_on(using, schedule, decision):
            return False
        known = set(_slots(using, schedule).filter(at__in=decision.slots).values_list("at", flat=True))
        new = [slot for slot in decision.slots if slot not in known]
        submitted = _keep(using, schedule, new)
        _prune(using, schedule)
        failpoints.hit("schedule.fired")
    failpoints.hit("schedule.committed")
    return submitted


def _move_on(using: str, schedule: Schedule, decision: Decision) -> bool:
    """Have the schedule wait for its next slot; return False if it is not as it was read."""
    rows = Schedule.objects.using(using).filter(
        id=schedule.id, enabled=True, retired_at=None, next_slot=schedule.next_slot, digest=schedule.digest
    )
    last = decision.slots[-1] if decision.slots else schedule.last_slot
    return bool(rows.update(next_slot=decision.next, last_slot=last, error=""))


def _keep(using: str, schedule: Schedule, slots: list[int]) -> bool:
    if not slots:
        return False
    allows = schedule.overlap == "allow"
    waiting = _slots(using, schedule).filter(state=Slot.State.WAITING)
    what = fate(
        slots,
        schedule.overlap,
        is_open=not allows and has_open_run(using, schedule.id),
        waiting=0 if allows else waiting.count(),
    )
    rows = [Slot(schedule=schedule, at=at, state=Slot.State.SKIPPED) for at in what.skipped]
    rows += [Slot(schedule=schedule, at=at, state=Slot.State.WAITING) for at in what.waiting]
    rows += [
        Slot(schedule=schedule, at=at, state=Slot.State.SUBMITTED, run=_submit(using, schedule, at))
        for at in what.submitted
    ]
    Slot.objects.using(using).bulk_create(rows)
    return bool(what.submitted)


def advance(using: str, schedule: Schedule) -> bool:
    """Submit the slot that waits longest, if no earlier run is open; return whether one was submitted.

    Raises:
      DatabaseError: the database is away.
    """
    if has_open_run(using, schedule.id):
        return False
    with transaction.atomic(using=using):
        rows = Schedule.objects.using(using).filter(id=schedule.id, enabled=True, retired_at=None)
        if not rows.update(updated_at=timezone.now()):  # a write first: it holds the row, as in `fire`
            return False
        slot = _slots(using, schedule).filter(state=Slot.State.WAITING).order_by("at").first()
        if slot is None or has_open_run(using, schedule.id):
            return False
        run = _submit(using, schedule, slot.at)
        Slot.objects.using(using).filter(id=slot.id).update(state=Slot.State.SUBMITTED, run=run)
    return True


def has_open_run(using: str, schedule: Any) -> bool:
    """Whether the run of a slot has not ended, as far as the database knows."""
    newest = Slot.objects.using(using).filter(schedule=schedule, state=Slot.State.SUBMITTED).order_by("-at")
    runs = [run for run in newest.values_list("run", flat=True)[:_LOOKED_AT] if run is not None]
    return Run.objects.using(using).filter(id__in=runs, status__in=OPEN).exists()


def _slots(using: str, schedule: Schedule) -> Any:
    return Slot.objects.using(using).filter(schedule=schedule.id)


def _submit(using: str, schedule: Schedule, slot: int) -> str:
    """Insert the outbox entry and the projection of a slot's run; return its id."""
    task = registry.known()[schedule.task]
    options = dict(schedule.options)
    moment = datetime.fromtimestamp(slot, UTC).isoformat().replace("+00:00", "Z")
    submission = Submit(
        id=new_run_id(),
        task=schedule.task,
        args=schedule.args,
        kwargs=schedule.kwargs,
        metadata={**options.pop("metadata", {}), "schedule": schedule.name, "slot": moment},
        tags=[*options.pop("tags", []), tag_of(schedule)],
        subject=schedule.subject,
        using=using,
        **options,
    )
    interface = task.interface
    shown = {} if interface is None else {"backend": interface.backend, "queue": interface.queue_name}
    insert_rows(submission, priority=task.info.priority, **shown)
    return submission.id


def tag_of(schedule: Schedule) -> str:
    """Return the tag that the runs of a schedule have."""
    return f"schedule:{schedule.id}"


def _prune(using: str, schedule: Schedule) -> None:
    """Remove the oldest slots beyond those that are kept; what waits stays."""
    decided = _slots(using, schedule).exclude(state=Slot.State.WAITING)
    for edge in decided.order_by("-at").values_list("at", flat=True)[KEPT : KEPT + 1]:
        decided.filter(at__lte=edge)._raw_delete(using)
