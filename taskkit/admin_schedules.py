"""Schedules in Django's admin: looked at, switched, removed.

What a schedule says is the code's, or whoever made it over the API. Here people see when it is due next, what has
become of its slots, and switch it on or off.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from django.conf import settings
from django.contrib import admin, messages
from django.contrib.admin.utils import display_for_value, flatten_fieldsets, quote
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext_lazy as _

from taskkit import schedules
from taskkit.schedule_models import Schedule, Slot
from taskkit.timetable import ZoneMissing

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Model]
else:  # Django's class takes no type argument at run time
    _ModelAdmin = admin.ModelAdmin

#: Slots shown on a schedule's page, the newest.
SHOWN: Final = 20

#: The one field that people change here.
_SWITCH: Final = "enabled"


class ScheduleAdmin(_ModelAdmin):
    """The schedules of this database."""

    list_display = (
        "name",
        "task",
        "when",
        "enabled",
        "next",
        "last",
        "overlap",
        "catchup",
        "origin",
        "error",
    )
    list_filter = ("enabled", "origin")
    search_fields = ("name", "task")
    actions = ("enable_schedules", "disable_schedules")
    fieldsets = (
        (None, {"fields": ("name", "task", "when", "enabled", "next", "last", "error")}),
        (_("Rules"), {"fields": ("overlap", "catchup")}),
        (_("Runs"), {"fields": ("args", "kwargs", "options", "subject", "newest_slots")}),
        (_("Made"), {"fields": ("origin", "created_at", "updated_at")}),
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Refuse: `@schedule` in the code makes one, `taskkit.schedules.create`, or POST /api/v1/schedules."""
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: Model | None = None) -> list[str]:
        """Return all but the switch."""
        return [name for name in flatten_fieldsets(self.get_fieldsets(request, obj)) if name != _SWITCH]

    # --- what is shown ----------------------------------------------------------------------------------------

    @admin.display(description=_("when"))
    def when(self, schedule: Schedule) -> str:
        """Show when it is due."""
        return schedule.when

    @admin.display(description=_("next slot"), ordering="next_slot")
    def next(self, schedule: Schedule) -> Any:
        """Show the slot that is waited for."""
        return _told(schedule.next_at)

    @admin.display(description=_("last slot"), ordering="last_slot")
    def last(self, schedule: Schedule) -> Any:
        """Show the newest slot that was due."""
        return _told(schedule.last_at)

    @admin.display(description=_("newest slots"))
    def newest_slots(self, schedule: Schedule) -> str:
        """Show what has become of the newest slots, with their runs."""
        slots = schedule.slots.order_by("-at")[:SHOWN]
        return format_html_join("", "{} {}<br>", ((str(slot), self._link(slot)) for slot in slots)) or "-"

    def _link(self, slot: Slot) -> str:
        if slot.run is None:
            return ""
        try:
            url = reverse(f"{self.admin_site.name}:taskkit_run_change", args=[quote(str(slot.run))])
        except NoReverseMatch:  # a site of the project's own, without our runs
            return str(slot.run)
        return format_html('<a href="{}">{}</a>', url, slot.run)

    # --- what people do -----------------------------------------------------------------------------------------

    @admin.action(description=_("Enable selected schedules"), permissions=["change"])
    def enable_schedules(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Have the selected schedules be kept from now on."""
        self._switch(request, queryset, enabled=True)

    @admin.action(description=_("Disable selected schedules"), permissions=["change"])
    def disable_schedules(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Have the selected schedules not be kept; their runs go on."""
        self._switch(request, queryset, enabled=False)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Turn the switch; nothing else can have changed."""
        if _SWITCH in form.changed_data:
            self._switch(request, [obj], enabled=obj.enabled)

    def _switch(self, request: HttpRequest, rows: Iterable[Schedule], *, enabled: bool) -> None:
        done = 0
        for row in rows:
            try:
                schedules.switch(row.pk, enabled=enabled, using=row._state.db or schedules.home())
            except ZoneMissing as error:
                self.message_user(request, f"{row.name}: {error}", messages.ERROR)
                continue
            self.log_change(request, row, "Enabled" if enabled else "Disabled")
            done += 1
        if done:
            word = _("enabled") if enabled else _("disabled")
            self.message_user(request, format_html("{} {}.", done, word), messages.SUCCESS)

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """Name the schedules alone: each has up to a thousand slots."""
        return [str(one) for one in objs], {self.opts.verbose_name_plural: len(objs)}, set(), []

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Whether the user may delete it; nobody can delete what is in the code."""
        in_the_code = isinstance(obj, Schedule) and obj.origin == Schedule.Origin.CODE
        return not in_the_code and super().has_delete_permission(request, obj)

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        """Remove a schedule."""
        self._remove(request, obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Remove the selected schedules, but for those in the code."""
        for row in queryset:
            self._remove(request, row)

    def _remove(self, request: HttpRequest, row: Schedule) -> None:
        try:
            schedules.remove(row.pk, using=row._state.db or schedules.home())
        except schedules.InTheCode as error:
            self.message_user(request, f"{row.name}: {error}", messages.ERROR)


def _told(at: datetime | None) -> str:
    """Return a time as the admin shows those of fields: in the project's time zone and the reader's language."""
    if at is not None and not settings.USE_TZ:
        at = timezone.make_naive(at)
    return str(display_for_value(at, "-"))
