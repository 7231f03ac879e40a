"""The view that turns a logged-in user into a token.

Answers are JSON, errors `application/problem+json` as the gateway's: it is for `fetch`, which a redirect to a login
page would only confuse. The token is signed here, with the key that the settings name; the gateway is not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.decorators import decorator_from_middleware
from django.utils.module_loading import import_string
from django.views.decorators.csrf import csrf_exempt

from taskkit import tokens
from taskkit.conf import get_settings, key_file
from taskkit.errors import SettingsError
from taskkit.problems import private, problem

logger = logging.getLogger("bulkhead.django")

#: Seconds that a user's token is valid, and the session of its ticket lasts.
TOKEN_SECONDS: Final = 3600.0

#: What TOKEN_CLAIMS may say; the names are those of `taskkit.tokens.issue`.
_CLAIMS: Final = frozenset({"actions", "runs", "tasks", "ttl", "subject"})


def own_runs(request: HttpRequest) -> dict[str, Any]:
    """Return the claims of a user who follows what was submitted for him: `submit(…, subject=str(user.pk))`.

    TOKEN_CLAIMS may name another function of this form. What that leaves out is as here; None refuses the user.
    """
    return {
        "subject": str(request.user.pk),
        "actions": ("read",),
        "runs": tokens.OWN,
        "tasks": (),
        "ttl": TOKEN_SECONDS,
    }


class _Csrf(CsrfViewMiddleware):
    """Django's check with an answer that a script can read."""

    def _reject(self, request: HttpRequest, reason: str) -> HttpResponse:
        return problem(403, "csrf", f"{reason} Send the CSRF token as the header X-CSRFToken.")


def _serve(request: HttpRequest) -> HttpResponse:
    """Serve POST: `{token, expires_at}`; with the field `ticket` also `{ticket, ticket_expires_at}`.

    401 without a logged-in user, 403 when TOKEN_CLAIMS refuses one or the CSRF token is not right.
    """
    if request.method != "POST":
        return problem(405, "method-not-allowed", "send a POST", Allow="POST")
    user = getattr(request, "user", None)
    if user is None or not user.is_authenticated:
        return problem(401, "login-needed", "log in first", **{"WWW-Authenticate": 'Session realm="django"'})
    claims = _claims_of(request)
    if claims is None:
        return problem(403, "forbidden", "this user may not follow runs")
    try:
        key = tokens.load_key(key_file())
    except SettingsError as error:
        logger.error("no token for a user: %s", error)
        return problem(503, "unavailable", "tokens cannot be signed now; the site's log says why")
    text = tokens.issue(key, **claims)
    issued = tokens.verify(key, text)
    answer = {"token": text, "expires_at": _rfc3339(issued.expires_at)}
    if request.POST.get("ticket"):
        answer |= _ticket(key, claims, issued.id)
    return private(JsonResponse(answer))


# The check of our own stands in for the project's, whose answer is a page.
token = csrf_exempt(decorator_from_middleware(_Csrf)(_serve))


def _claims_of(request: HttpRequest) -> dict[str, Any] | None:
    """Return what the user's token says; None refuses it.

    Raises:
      ImproperlyConfigured: TOKEN_CLAIMS names nothing that can be called, or it said something else than claims.
    """
    path = get_settings().token_claims
    if path is None:
        return own_runs(request)
    try:
        hook: Callable[[HttpRequest], Mapping[str, Any] | None] = import_string(path)
    except ImportError as error:
        raise ImproperlyConfigured(f"TASKKIT: TOKEN_CLAIMS = {path!r}: {error}") from error
    said = hook(request)
    if said is None:
        return None
    if unknown := sorted(set(said) - _CLAIMS):
        known = ", ".join(sorted(_CLAIMS))
        raise ImproperlyConfigured(f"TOKEN_CLAIMS: {path} returned {', '.join(unknown)}; there are {known}")
    return {**own_runs(request), **said}


def _ticket(key: bytes, claims: dict[str, Any], parent: str) -> dict[str, str]:
    wanted = {name: value for name, value in claims.items() if name != "ttl"}
    text = tokens.issue_ticket(key, **wanted, session=claims["ttl"], parent=parent)
    return {"ticket": text, "ticket_expires_at": _rfc3339(tokens.read_ticket(key, text).valid_until)}


def _rfc3339(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
