"""Filters of the admin's list of runs that no table is scanned for."""

from __future__ import annotations

import time
import uuid
from typing import Any, Final

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from taskkit import registry
from taskkit.models import OPEN, Run

#: Seconds back, by their name in the URL.
_AGES: Final = {"hour": 3_600.0, "day": 86_400.0, "week": 604_800.0, "month": 2_592_000.0}


class OpenFilter(admin.SimpleListFilter):
    """Whether the run has ended."""

    title = _("open")
    parameter_name = "open"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return what can be chosen."""
        return [("yes", _("Waits or runs")), ("no", _("Has ended"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Run]) -> QuerySet[Run]:
        """Return the runs that fit."""
        found = {"yes": queryset.filter(status__in=OPEN), "no": queryset.exclude(status__in=OPEN)}
        return found.get(self.value() or "", queryset)


class TaskFilter(admin.SimpleListFilter):
    """One of the project's tasks: the names come from the code, not from a `SELECT DISTINCT` over all runs."""

    title = _("task")
    parameter_name = "task"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        """Return what can be chosen, with the one that is: a task that has gone still has its runs."""
        names = set(registry.known())
        chosen = self.used_parameters.get(self.parameter_name)
        return [(name, name) for name in sorted(names | ({str(chosen)} if chosen else set()))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Run]) -> QuerySet[Run]:
        """Return the runs of the task."""
        return queryset.filter(task=self.value()) if self.value() else queryset


class AgeFilter(admin.SimpleListFilter):
    """How long ago the run was submitted: its id begins with that, so the primary key finds it."""

    title = _("submitted")
    parameter_name = "age"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        """Return what can be chosen."""
        names = (_("In the last hour"), _("In the last day"), _("In the last week"), _("In the last 30 days"))
        return list(zip(_AGES, names, strict=True))

    def queryset(self, request: HttpRequest, queryset: QuerySet[Run]) -> QuerySet[Run]:
        """Return the runs that are younger."""
        seconds = _AGES.get(self.value() or "")
        return queryset if seconds is None else queryset.filter(id__gte=_first_id(time.time() - seconds))


def _first_id(moment: float) -> uuid.UUID:
    """Return the id that is in front of every UUIDv7 made at `moment` (Unix seconds) or later."""
    return uuid.UUID(int=int(moment * 1000) << 80)
