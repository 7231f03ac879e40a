"""Runs, outbox, nodes in Django's admin: to look at, not to change.

The gateway is the only one that moves a run on; an edit here would be overwritten by the next transition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin
from django.db.models import Model, QuerySet
from django.http import HttpRequest

from taskkit.identifiers import parse_run_id
from taskkit.models import Node, Outbox, Run

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Model]
else:  # Django's class takes no type argument at run time
    _ModelAdmin = admin.ModelAdmin


class _ReadOnlyAdmin(_ModelAdmin):
    """Shows rows; `view` permission is all that counts."""

    show_full_result_count = False  # a count(*) over millions of runs, for a number nobody needs
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Refuse."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Refuse."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Refuse."""
        return False

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Model], search_term: str
    ) -> tuple[QuerySet[Model], bool]:
        """Find a run by its id, anything else by the `search_fields`."""
        run = parse_run_id(search_term.strip())
        if run is not None:
            return queryset.filter(pk=run), False
        return super().get_search_results(request, queryset, search_term)


@admin.register(Run)
class RunAdmin(_ReadOnlyAdmin):
    """The newest state that Django was told of each run."""

    list_display = ("id", "task", "status", "attempt", "created_at", "started_at", "duration")
    list_filter = ("status", "created_at")
    search_fields = ("task", "row_key")

    @admin.display(description="duration")
    def duration(self, run: Run) -> str:
        """Show the time from the start to the end in seconds; empty while either is missing."""
        if run.started_at is None or run.finished_at is None:
            return ""
        return f"{(run.finished_at - run.started_at).total_seconds():.3f} s"


@admin.register(Outbox)
class OutboxAdmin(_ReadOnlyAdmin):
    """Submissions on their way, with those that were refused."""

    list_display = ("id", "task", "state", "attempts", "created_at", "error")
    list_filter = ("state",)
    search_fields = ("row_key", "error")

    @admin.display(description="task")
    def task(self, entry: Outbox) -> str:
        """Show the task's name as it was submitted."""
        return str(entry.payload.get("task", "")) if isinstance(entry.payload, dict) else ""


@admin.register(Node)
class NodeAdmin(_ReadOnlyAdmin):
    """The trees that serve this database."""

    list_display = ("name", "pid", "seen_at", "poke_address", "url")
    search_fields = ("name",)
