"""A request within its run: who sent it, as its mark says that no client can forge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from django.http import HttpRequest

#: Where META has the mark. What a client sends has names that begin with `HTTP_`: it cannot write this.
MARK: Final = "bulkhead.request"


@dataclass(frozen=True, slots=True)
class Mark:
    """Says that a run performs this request.

    Attributes:
      user: primary key of who sent it, "" for nobody who is known.
      named: he has no session; ASYNC_REQUEST.user has named him.
    """

    user: str
    named: bool = False


def is_performed(request: Any) -> bool:
    """Whether a run performs this request; also for what wraps one."""
    return isinstance(getattr(request, "META", {}).get(MARK), Mark)


def receive(request: HttpRequest) -> None:
    """Give a request the user who sent it, whose credentials were not kept.

    Who has gone since, or is no longer active, is anonymous. CSRF was checked where the request came in.

    Raises:
      DatabaseError: the user cannot be looked up.
    """
    request._dont_enforce_csrf_checks = True  # type: ignore[attr-defined]
    mark: Mark = request.META[MARK]
    if not mark.user:
        return
    user = _user(mark.user)

    async def auser() -> Any:
        return user

    request.user = user
    request.auser = auser
    if mark.named:
        # Django REST framework asks its own authenticators otherwise, which would look for the credentials. Of who has
        # a session it asks SessionAuthentication, if the view knows that: nobody gets in by a way that the view lacks.
        request._force_auth_user = user  # type: ignore[attr-defined]


def _user(key: str) -> Any:
    # Imported here: a project need not have users.
    from django.contrib.auth import get_user_model
    from django.contrib.auth.models import AnonymousUser

    found = get_user_model()._default_manager.filter(pk=key).first()
    return found if found is not None and found.is_active else AnonymousUser()
