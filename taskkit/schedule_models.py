"""Schedules with their slots, in the project's own database.

Moments are Unix seconds in integers, not datetimes: without USE_TZ a database stores local time, in which one hour of
the year comes twice, and a slot of it could not be told from its double.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, Final

from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.utils import timezone

from taskkit.identifiers import new_run_id
from taskkit.timetable import CATCH_UPS, OVERLAPS, Timing

#: Longest name of a schedule, characters: a task's, a colon, one of its own.
NAME_LENGTH: Final = 255


def _new_id() -> uuid.UUID:
    return uuid.UUID(new_run_id())


def shown(seconds: int | None) -> datetime | None:
    """Return Unix seconds as an aware datetime."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


class Schedule(models.Model):
    """When a task is to be run; made with `taskkit.schedules`, by `@schedule` in the code, or over HTTP.

    Attributes:
      name: unique; of a schedule in the code `<task>` or `<task>:<name>`.
      cron, every, at: one of them, as `taskkit.timetable.Timing` has them; every other attribute of time as well.
      anchor: what the slots of `every` are counted from.
      options: what a submission may say beside its arguments: pool, priority, timeout, max_attempts, metadata, tags.
      subject: on whose behalf its runs are.
      digest: of the definition; tells whether it has changed.
      next_slot: the slot that is waited for; None: there is none.
      last_slot: the newest slot that was due.
      retired_at: since when the code has it no more; it is not due then, and removed after a week.
      error: why it is not kept just now.
    """

    class Origin(models.TextChoices):
        """Who made it."""

        #: a decorator; the code decides what it says
        CODE = "code", "code"
        #: a client, or the project's own code while it ran
        API = "api", "api"

    id = models.UUIDField(primary_key=True, default=_new_id, editable=False)
    name = models.CharField(max_length=NAME_LENGTH, unique=True)
    task = models.CharField(max_length=255)
    cron = models.CharField(max_length=200, null=True, blank=True)
    every = models.PositiveIntegerField(null=True, blank=True)
    at = models.BigIntegerField(null=True, blank=True)
    tz = models.CharField(max_length=100, default="UTC")
    anchor = models.BigIntegerField()
    overlap = models.CharField(max_length=10, choices=[(one, one) for one in OVERLAPS], default="skip")
    catchup = models.CharField(max_length=10, choices=[(one, one) for one in CATCH_UPS], default="latest")
    args = models.JSONField(encoder=DjangoJSONEncoder, default=list, blank=True)
    kwargs = models.JSONField(encoder=DjangoJSONEncoder, default=dict, blank=True)
    options = models.JSONField(encoder=DjangoJSONEncoder, default=dict, blank=True)
    subject = models.CharField(max_length=255, blank=True, default="")
    origin = models.CharField(max_length=10, choices=Origin.choices, default=Origin.API)
    digest = models.CharField(max_length=64)
    enabled = models.BooleanField(default=True)
    next_slot = models.BigIntegerField(null=True, blank=True)
    last_slot = models.BigIntegerField(null=True, blank=True)
    retired_at = models.BigIntegerField(null=True, blank=True)
    error = models.TextField(blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now)
    updated_at = models.DateTimeField(default=timezone.now)

    class Meta:
        app_label = "taskkit"
        verbose_name = "schedule"
        verbose_name_plural = "schedules"
        ordering = ("name",)
        indexes = [models.Index(fields=("next_slot",), name="taskkit_schedule_next")]

    def __str__(self) -> str:
        return f"{self.name} ({self.when})"

    @property
    def timing(self) -> Timing:
        """When it is due."""
        return Timing(cron=self.cron, every=self.every, at=self.at, tz=self.tz, anchor=self.anchor)

    @property
    def when(self) -> str:
        """When it is due, for people."""
        if self.cron is not None:
            return f"{self.cron} {self.tz}"
        return (
            f"every {self.every} s"
            if self.every is not None
            else f"at {shown(self.at):%Y-%m-%d %H:%M:%S} UTC"
        )

    @property
    def is_live(self) -> bool:
        """Whether it is kept at all."""
        return self.enabled and self.retired_at is None

    @property
    def next_at(self) -> datetime | None:
        """The slot that is waited for; None when it is not enabled, or has none left."""
        return shown(self.next_slot) if self.is_live else None

    @property
    def last_at(self) -> datetime | None:
        """The newest slot that was due."""
        return shown(self.last_slot)

    def definition(self) -> dict[str, Any]:
        """Return what it was made of, without its name."""
        names = ("task", "cron", "every", "at", "tz", "overlap", "catchup", "args", "kwargs", "options")
        return {name: getattr(self, name) for name in names}


class Slot(models.Model):
    """One moment at which a schedule was due: whatever the number of trees, one row.

    Attributes:
      at: Unix seconds.
      run: the id of its run; None when it has none (yet).
    """

    class State(models.TextChoices):
        """What has become of it."""

        #: it has a run
        SUBMITTED = "submitted", "submitted"
        #: it will have one when the run of an earlier slot has ended
        WAITING = "waiting", "waiting"
        #: the run of an earlier slot had not ended
        SKIPPED = "skipped", "skipped"

    schedule = models.ForeignKey(Schedule, on_delete=models.CASCADE, related_name="slots", db_index=False)
    at = models.BigIntegerField()
    state = models.CharField(max_length=10, choices=State.choices)
    run = models.UUIDField(null=True, blank=True)

    class Meta:
        app_label = "taskkit"
        verbose_name = "slot"
        verbose_name_plural = "slots"
        ordering = ("-at",)
        indexes = [models.Index(fields=("state", "schedule"), name="taskkit_slot_state")]
        constraints = [models.UniqueConstraint(fields=("schedule", "at"), name="taskkit_one_row_per_slot")]

    def __str__(self) -> str:
        return f"{shown(self.at):%Y-%m-%d %H:%M:%S} UTC ({self.state})"

    @property
    def moment(self) -> datetime | None:
        """When it was due."""
        return shown(self.at)
