"""Times of the project's database as Unix seconds, in both directions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from django.conf import settings
from django.utils import timezone


def moment(seconds: float) -> datetime:
    """Return Unix seconds as this project stores times: aware, or naive local time without USE_TZ."""
    found = datetime.fromtimestamp(seconds, UTC)
    return found if settings.USE_TZ else timezone.make_naive(found)


def unix_time(wanted: datetime | timedelta, name: str) -> float:
    """Return a time, or one from now on, as Unix seconds.

    Raises:
      ValueError: it is naive, which a project with USE_TZ does not mean; the message begins with `name`.
    """
    if isinstance(wanted, timedelta):
        wanted = timezone.now() + wanted
    if timezone.is_naive(wanted):
        if settings.USE_TZ:
            raise ValueError(f"{name} = {wanted!r}: give an aware datetime (django.utils.timezone.now() + …)")
        wanted = timezone.make_aware(wanted)
    return wanted.timestamp()
