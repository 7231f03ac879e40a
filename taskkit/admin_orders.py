"""What people may have done to a run from the admin: cancel, replay, release.

The gateway does it, and only it changes the run; here the permission is checked, and what became of it is shown. Each
order has a permission of its own, on the list as on the run's page, whatever the request names.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from django.contrib import admin, messages
from django.contrib.admin.utils import quote, unquote
from django.contrib.auth import get_permission_codename
from django.core.exceptions import PermissionDenied
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.text import capfirst
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_POST

from taskkit import asking
from taskkit.errors import GatewayError, SettingsError
from taskkit.models import Run

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Model]
else:  # Django's class takes no type argument at run time
    _ModelAdmin = admin.ModelAdmin

#: Runs that one action of the list takes: each is a request to the gateway, and a page waits for them all.
MOST: Final = 100

#: Characters of a key that a form brings: a second click is the same new run.
_LONGEST_KEY: Final = 64


@dataclass(frozen=True)
class Order:
    """One order: `name` is that of its permission, URL and method, `label` of its button."""

    name: str
    label: Any
    done: Any


ORDERS: Final = {
    order.name: order
    for order in (
        Order("cancel", _("Cancel"), _("was asked to stop")),
        Order("replay", _("Run again"), _("is performed again as")),
        Order("release", _("Release"), _("is released from quarantine as")),
    )
}


class OrdersAdmin(_ModelAdmin):
    """Adds the orders to an admin of runs."""

    actions = ("cancel_runs", "replay_runs", "release_runs")

    # --- permissions ----------------------------------------------------------------------------------------

    def may_order(self, request: HttpRequest, name: str) -> bool:
        """Whether the user has the permission of an order."""
        codename = get_permission_codename(name, self.opts)
        return bool(request.user.has_perm(f"{self.opts.app_label}.{codename}"))

    def has_cancel_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Whether the user may cancel runs."""
        return self.may_order(request, "cancel")

    def has_replay_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Whether the user may have runs performed again."""
        return self.may_order(request, "replay")

    def has_release_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        """Whether the user may release runs from quarantine."""
        return self.may_order(request, "release")

    # --- the list -------------------------------------------------------------------------------------------

    @admin.action(description=_("Cancel selected runs"), permissions=["cancel"])
    def cancel_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Ask the selected runs to stop."""
        self._order_all(request, ORDERS["cancel"], queryset)

    @admin.action(description=_("Run selected runs again"), permissions=["replay"])
    def replay_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Have the selected runs performed again."""
        self._order_all(request, ORDERS["replay"], queryset)

    @admin.action(description=_("Release selected runs from quarantine"), permissions=["release"])
    def release_runs(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Release the selected runs from quarantine."""
        self._order_all(request, ORDERS["release"], queryset)

    def _order_all(self, request: HttpRequest, order: Order, queryset: QuerySet[Any]) -> None:
        runs = list(queryset[: MOST + 1])
        if len(runs) > MOST:
            self.message_user(request, _("Select at most %d runs.") % MOST, messages.ERROR)
            return
        for run in runs:
            if not self._order(request, order, run):
                break  # the others would wait for the same absent gateway

    # --- a run's page ---------------------------------------------------------------------------------------

    def get_urls(self) -> list[URLPattern]:
        """Return the routes of the orders, before Django's own, whose last one takes everything."""
        own = [
            path(
                f"<path:object_id>/{name}/",
                self.admin_site.admin_view(require_POST(partial(self.order_view, order=order))),
                name=f"{self.opts.app_label}_{self.opts.model_name}_{name}",
            )
            for name, order in ORDERS.items()
        ]
        return [*own, *super().get_urls()]

    def order_view(self, request: HttpRequest, object_id: str, order: Order) -> HttpResponse:
        """Do what a button of the run's page is for, then show the page again."""
        if not self.may_order(request, order.name):
            raise PermissionDenied  # in front of all else: whether there is such a run is not told either
        run = self.get_object(request, unquote(object_id))
        if run is None:
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)  # type: ignore[attr-defined,no-any-return]
        permitted: Callable[..., bool] = getattr(self, f"has_{order.name}_permission")
        if not (self.has_view_permission(request, run) and permitted(request, run)):
            raise PermissionDenied
        assert isinstance(run, Run)
        self._order(request, order, run, request.POST.get("key", "")[:_LONGEST_KEY])
        return HttpResponseRedirect(self._page_of(run.pk))

    def orders_of(self, request: HttpRequest, run: Run) -> list[dict[str, Any]]:
        """Return the buttons of a run's page that this user has."""
        released = asking.is_quarantined(run)
        return [
            {
                "name": name,
                "label": order.label,
                "url": self._url(name, run.pk),
                # Makes a double click the same new run; each page has its own, so that one may be had again later.
                "key": uuid.uuid4().hex,
            }
            for name, order in ORDERS.items()
            if getattr(self, f"has_{name}_permission")(request, run)
            and (name == "cancel" or released == (name == "release"))
        ]

    # --- both -----------------------------------------------------------------------------------------------

    def _order(self, request: HttpRequest, order: Order, run: Run, key: str = "") -> bool:
        """Have it done, say and note what became of it; return whether the gateway answered at all."""
        subject = str(request.user.pk)
        made = ""
        try:
            if order.name == "cancel":
                asking.cancel(run, subject=subject)
            elif order.name == "replay":
                made = asking.replay(run, subject=subject, key=f"admin-{run.pk}-{key}" if key else None)
            else:
                made = asking.release(run, subject=subject)
        except GatewayError as error:
            self.message_user(request, f"{capfirst(_('run'))} {run.pk}, {run.task}: {error}", messages.ERROR)
            return bool(error.problem) or order.name == "release"
        except SettingsError as error:
            self.message_user(request, str(error), messages.ERROR)
            return False
        self.log_change(request, run, f"{capfirst(order.name)} {made}".strip())
        link = format_html(' <a href="{}">{}</a>', self._page_of(made), made) if made else ""
        self.message_user(
            request,
            # Django begins a message with a capital, which the name of a task is not to have.
            format_html("{} {}, {}, {}{}.", capfirst(_("run")), run.pk, run.task, order.done, link),
            messages.SUCCESS,
        )
        return True

    def _page_of(self, run: Any) -> str:
        return self._url("change", run)

    def _url(self, name: str, run: Any) -> str:
        view = f"{self.admin_site.name}:{self.opts.app_label}_{self.opts.model_name}_{name}"
        return reverse(view, args=[quote(str(run))])
