"""Runs, outbox, nodes in Django's admin: to look at, not to edit; schedules are in `taskkit.admin_schedules`.

The gateway is the only one that moves a run on; an edit here would be overwritten by the next transition. What
people may have it do with a run is in `taskkit.admin_orders`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from django.contrib import admin
from django.contrib.admin.utils import flatten_fieldsets, unquote
from django.contrib.admin.views.main import ChangeList
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext_lazy as _

from taskkit.admin_filters import AgeFilter, OpenFilter, TaskFilter
from taskkit.admin_orders import OrdersAdmin
from taskkit.admin_schedules import ScheduleAdmin
from taskkit.identifiers import parse_run_id
from taskkit.models import OPEN, Node, Outbox, Run, Schedule

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Model]
else:  # Django's class takes no type argument at run time
    _ModelAdmin = admin.ModelAdmin


#: Fields that may be large, and that no list shows.
_LARGE: Final = ("args", "kwargs", "result", "metadata", "errors")

#: Characters of a value that a page shows.
_SHOWN: Final = 20_000


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


class _RunList(ChangeList):
    """The list, without what it does not show: a result may have megabytes."""

    def get_queryset(self, *args: Any, **kwargs: Any) -> QuerySet[Any]:
        """Return the runs of the page that was asked for."""
        return super().get_queryset(*args, **kwargs).defer(*_LARGE)


@admin.register(Run)
class RunAdmin(OrdersAdmin, _ReadOnlyAdmin):
    """The newest state that Django was told of each run; its page is live."""

    list_display = ("id", "task", "status", "attempt", "created_at", "started_at", "duration")
    list_filter = (OpenFilter, "status", AgeFilter, TaskFilter)
    search_fields = ("task", "row_key")
    search_help_text = _("The id of a run, or a part of its task's name or row")
    change_form_template = "admin/taskkit/run/change_form.html"
    fieldsets = (
        (None, {"fields": ("id", "task", "shown_arguments", "shown_metadata", "tags", "row_key")}),
        (_("Submitted"), {"fields": ("created_at", "run_after", "priority", "queue", "backend")}),
        (
            _("Performed"),
            {"fields": ("attempt", "started_at", "finished_at", "duration", "worker_ids", "node")},
        ),
        (_("Outcome"), {"fields": ("status", "shown_result", "shown_error", "shown_errors")}),
    )

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the list's class."""
        return _RunList

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """Serve a run's page."""
        run = self.get_object(request, unquote(object_id))
        own: dict[str, Any] = {}
        if isinstance(run, Run):  # the title without a state, which would be that of now for ever
            own = {"orders": self.orders_of(request, run), "subtitle": f"{run.task} {run.pk}"}
        return super().change_view(request, object_id, form_url, {**own, **(extra_context or {})})

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> list[str]:
        """Return all of them."""
        return list(flatten_fieldsets(self.get_fieldsets(request, obj)))

    @admin.display(description=_("duration"))
    def duration(self, run: Run) -> str:
        """Show the time from the start to the end in seconds; empty while either is missing."""
        if run.started_at is None or run.finished_at is None:
            return ""
        return f"{(run.finished_at - run.started_at).total_seconds():.3f} s"

    @admin.display(description=_("arguments"))
    def shown_arguments(self, run: Run) -> str:
        """Show what the task is called with, as Python writes it."""
        named = (f"{name}={value!r}" for name, value in run.kwargs.items())
        return _block(", ".join([*map(repr, run.args), *named]))

    @admin.display(description=_("metadata"))
    def shown_metadata(self, run: Run) -> str:
        """Show what was submitted with it."""
        return _block(_json(run.metadata) if run.metadata else "")

    @admin.display(description=_("result"))
    def shown_result(self, run: Run) -> str:
        """Show what it returned."""
        return _block("" if run.result is None else _json(run.result))

    @admin.display(description=_("error"))
    def shown_error(self, run: Run) -> str:
        """Show why it failed, with the traceback."""
        return _error(run.error)

    @admin.display(description=_("earlier attempts"))
    def shown_errors(self, run: Run) -> str:
        """Show why each attempt but the last has ended badly."""
        earlier = [error for error in run.errors if error != run.error]
        return format_html_join("", "{}", ((_error(error),) for error in earlier)) or "-"


def _error(error: Any) -> str:
    if not isinstance(error, dict):
        return _block("")
    head = ": ".join(str(error[name]) for name in ("code", "exception", "message") if error.get(name))
    traceback = error.get("traceback") or ""
    return _block(f"{head}\n\n{traceback}".strip())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _block(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return format_html('<pre class="bulkhead-value">{}</pre>', shown) if shown else "-"


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

    list_display = ("name", "pid", "seen_at", "expires_at", "open_runs", "url")
    search_fields = ("name",)

    @admin.display(description=_("open runs"))
    def open_runs(self, node: Node) -> int:
        """Show how many runs it has that have not ended."""
        return Run.objects.using(node._state.db).filter(node=node.name, status__in=OPEN).count()


admin.site.register(Schedule, ScheduleAdmin)
