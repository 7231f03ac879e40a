"""`{% load bulkhead %}`: a run on a page, live.

A ticket goes into the page, good for one request within a minute. So a page with one must not be kept: neither by
Django's cache, nor by a proxy, nor by the browser (`django.views.decorators.cache.never_cache`).
"""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any, Final

from django import template
from django.conf import settings
from django.template import Context

from taskkit import conf
from taskkit.errors import SettingsError
from taskkit.identifiers import parse_run_id
from taskkit.lifecycle import RunStatus
from taskkit.models import Run
from taskkit.outbox import RunHandle

logger = logging.getLogger("bulkhead.django")

register = template.Library()

#: Characters of a result that a page shows; the whole is at `/api/v1/runs/{id}/result`.
_SHOWN: Final = 2_000

#: In a template's own state: whether its script and style are in the page.
_LOADED: Final = "taskkit.stream"


@register.inclusion_tag("taskkit/stream.html", takes_context=True)
def stream(context: Context, run: Any, log: bool = False) -> dict[str, Any]:
    """Show a run's state, progress and last events until it has ended; with `log` also what it prints.

    `run` is a Run, what `submit` returned, a result of Django's Tasks, or an id. The page gets a ticket that reads
    this one run, for an hour.

    Raises:
      ValueError: it is none of these.
    """
    if run is None or run == "":
        return {}
    id = _id_of(run)
    known = run if isinstance(run, Run) else None
    shown: dict[str, Any] = {
        "id": id,
        "log": log,
        "status": RunStatus.READY.value if known is None else known.status,
        "task": "" if known is None else known.task,
        "result": "" if known is None or known.status != RunStatus.SUCCESSFUL.value else _shown(known.result),
        "error": "" if known is None else _message_of(known.error),
        "first": not context.render_context.get(_LOADED),
    }
    context.render_context[_LOADED] = True
    try:
        shown |= {
            "gateway": conf.gateway_url(),
            "url": conf.stream_url(id),
            "ticket": _ticket(context, id, log),
        }
    except SettingsError as error:  # a page of the site is not to fall for what the tree lacks
        logger.error("run %s cannot be shown live: %s", id, error)
        shown["problem"] = str(error) if settings.DEBUG or _is_staff(context) else ""
    return shown


@register.simple_tag(takes_context=True)
def stream_ticket(context: Context, run: Any, log: bool = False) -> str:
    """Return a ticket for this run alone, for a script of one's own: see `stream`.

    Raises:
      ValueError: `run` is none.
      SettingsError: there is no key yet, or this process may not read it; the message has the remedy.
    """
    return _ticket(context, _id_of(run), log)


def _id_of(run: Any) -> str:
    id = getattr(run, "id", run)
    found = parse_run_id(str(id)) if isinstance(id, str | uuid.UUID) else None
    if found is None:
        raise ValueError(f"{run!r:.200} is no run: give a Run, what submit() returned, or an id")
    return found


def _ticket(context: Context, id: str, log: bool) -> str:
    # Its subject is whoever looks on, so that what is taken back from a user (`--revoke-subject`) goes with it.
    user = getattr(context.get("request"), "user", None)
    subject = str(user.pk) if user is not None and user.is_authenticated else ""
    return RunHandle(id).ticket(actions=("read", "logs") if log else ("read",), subject=subject)


def _is_staff(context: Context) -> bool:
    return bool(getattr(getattr(context.get("request"), "user", None), "is_staff", False))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _message_of(error: Any) -> str:
    return str(error.get("message") or error.get("code") or "") if isinstance(error, dict) else ""
