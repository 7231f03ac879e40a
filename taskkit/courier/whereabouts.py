"""Which node has a run."""

from __future__ import annotations

from django.db.models.functions import Now

from taskkit.models import Node, Run
from taskkit.wire.messages import Located


def find(using: str, run: str, own: str) -> Located | None:
    """Return which other node has a run, if it lives and has a URL; None where that is nobody.

    Raises:
      DatabaseError: the database is away.
    """
    runs = Run.objects.using(using).filter(id=run).exclude(node__in=("", own))
    for node, task, options in runs.values_list("node", "task", "options"):
        urls = Node.objects.using(using).filter(name=node, expires_at__gt=Now()).values_list("url", flat=True)
        subject = options.get("subject", "") if isinstance(options, dict) else ""
        if url := next(iter(urls), ""):
            return Located(ask="", status="found", url=url, task=task, subject=subject)
    return None
