"""A task that the clock starts; so rarely that no test meets it by chance."""

from __future__ import annotations

from taskkit import schedule, task


@schedule(cron="0 0 29 2 *", tz="Europe/Berlin", kwargs={"what": "leap"}, overlap="queue", catchup="none")
@task
def yearly(what: str) -> str:
    """Return what came."""
    return what
