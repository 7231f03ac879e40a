"""Errors of the Django site's routes, in the form that the gateway's have (RFC 9457)."""

from __future__ import annotations

from typing import Final

from django.http import HttpResponse, JsonResponse

_TITLES: Final = {
    401: "Login needed",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    413: "Too large",
    503: "Not available now",
}


def problem(status: int, code: str, detail: str, **headers: str) -> HttpResponse:
    """Return an error as `application/problem+json`."""
    document = {
        "type": f"urn:bulkhead:problem:{code}",
        "title": _TITLES[status],
        "status": status,
        "detail": detail,
    }
    media_type = "application/problem+json"
    return private(JsonResponse(document, status=status, headers=headers, content_type=media_type))


def private(response: HttpResponse) -> HttpResponse:
    """Return an answer as one that nobody keeps and no browser guesses the type of."""
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
