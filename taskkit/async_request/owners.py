"""Whose a request is that asks to run as a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.utils.module_loading import import_string

from taskkit.background import ANONYMOUS, is_channel
from taskkit.settings import AsyncRequestSettings

#: Headers that ask for it: the seed's text has one, its code the other.
HEADERS: Final = ("X-Async-Request", "X-Async-Background")

#: What the headers may say to ask for nothing.
_NO: Final = frozenset({"", "0", "false", "no", "off"})

#: What they say to ask without naming a channel.
_YES: Final = frozenset({"1", "true", "yes", "on"})


#: Attribute of views that are never run as a task: those that tell what became of one.
HERE: Final = "bulkhead_answers_here"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a request is.

    Attributes:
      subject: of its run.
      user: primary key of a user, "" for a client without credentials.
      named: ASYNC_REQUEST.user has named him.
    """

    subject: str
    user: str = ""
    named: bool = False


class Unknown(Exception):
    """Nobody who could own a run is told by the request; `str()` says what would help."""


def wish_of(request: HttpRequest) -> str | None:
    """Return what the request says in asking to be a task; None: it does not ask."""
    said = next((request.headers[name].strip() for name in HEADERS if name in request.headers), None)
    return None if said is None or said.lower() in _NO else said


def owner_of(request: HttpRequest, settings: AsyncRequestSettings) -> Owner:
    """Return whose the request is: of the logged-in user, of whom the project's function names, of a channel.

    A user's channel follows from who he is; no header chooses it.

    Raises:
      Unknown: nobody's.
      ImproperlyConfigured: ASYNC_REQUEST.user has named somebody who is no user of the project.
    """
    user = getattr(request, "user", None)
    named = (user is None or not user.is_authenticated) and settings.user is not None
    if named:
        user = _named(request, settings)
    if user is not None and user.is_authenticated:
        subject = str(user.pk)
        if subject.startswith(ANONYMOUS):
            raise Unknown(f"a user whose key begins with {ANONYMOUS!r} could not be told from a channel")
        return Owner(subject, subject, named)
    channel = wish_of(request)
    if channel is None or channel.lower() in _YES:
        raise Unknown("log in first")
    if not settings.anonymous:
        raise Unknown("log in first; clients without credentials are not served (ASYNC_REQUEST.anonymous)")
    if not is_channel(channel):
        raise Unknown(f"{HEADERS[0]}: a channel's name has 16 to 128 characters of A-Z a-z 0-9 _ -")
    return Owner(ANONYMOUS + channel)


def _named(request: HttpRequest, settings: AsyncRequestSettings) -> Any:
    from django.contrib.auth import get_user_model  # a project need not have users

    assert settings.user is not None
    find: Callable[[HttpRequest], Any] = import_string(settings.user)
    user = find(request)
    if user is not None and user.is_authenticated and not isinstance(user, get_user_model()):
        raise ImproperlyConfigured(
            f"ASYNC_REQUEST.user: {settings.user} returned {type(user).__name__}; name a user of AUTH_USER_MODEL"
        )
    return user
