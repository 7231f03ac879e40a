"""Views of every kind, none of which knows that it may run as a task."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.middleware.csrf import get_token
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt

from taskkit import progress
from taskkit.async_request import require_async


def of_api_key(request: HttpRequest) -> Any:
    """Return the user whose name the header X-Api-Key has."""
    from django.contrib.auth.models import User

    return User.objects.filter(username=request.headers.get("X-Api-Key", "")).first()


def token(request: HttpRequest) -> HttpResponse:
    """Serve the CSRF token that forms need."""
    return HttpResponse(get_token(request))


def told(request: HttpRequest) -> HttpResponse:
    """Serve what the request says."""
    return JsonResponse(
        {
            "pid": os.getpid(),
            "method": request.method,
            "path": request.get_full_path(),
            "query": request.GET.dict(),
            "form": request.POST.dict(),
            "files": {name: hashlib.sha256(file.read()).hexdigest() for name, file in request.FILES.items()},
            "body": hashlib.sha256(request.body).hexdigest() if not request.FILES else "",
            "type": request.content_type,
            "headers": dict(request.headers.items()),
            "cookies": request.COOKIES,
            "user": getattr(request.user, "username", ""),
            "scheme": request.scheme,
            "host": request.get_host(),
            "session": len(dict(request.session.items())),
        },
        status=201,
        headers={"X-Told": "yes", "Set-Cookie": "secret=1"},
    )


exempt = csrf_exempt(told)


async def awaited(request: HttpRequest) -> HttpResponse:
    """Serve who asks, from an event loop."""
    user = await request.auser()
    return JsonResponse({"pid": os.getpid(), "user": user.get_username()})


def five(request: HttpRequest) -> StreamingHttpResponse:
    """Serve five chunks, with characters that two of them share."""

    def chunks() -> Iterator[bytes]:
        for n in range(5):
            yield f"chunk {n} é".encode()[:-1]
            time.sleep(0.01)
            yield b"\xa9"

    return StreamingHttpResponse(chunks(), content_type="text/plain")


async def five_awaited(request: HttpRequest) -> StreamingHttpResponse:
    """Serve five chunks from an event loop."""

    async def chunks() -> AsyncIterator[bytes]:
        for n in range(5):
            yield f"chunk {n}\n".encode()

    return StreamingHttpResponse(chunks(), content_type="text/plain")


def patch(request: HttpRequest) -> HttpResponse:
    """Note a value of an object, slowly."""
    from tests.project.models import Row

    data = json.loads(request.body)["data"]
    row = Row.objects.get(pk=data["id"])
    time.sleep(random.random() / 50)
    row.final_value = [*(row.final_value or []), data["value"]]
    row.save()
    return HttpResponse("noted")


patch = csrf_exempt(patch)


def large(request: HttpRequest) -> HttpResponse:
    """Serve more than is kept."""
    return HttpResponse(b"x" * 150_000, content_type="text/plain")


def binary(request: HttpRequest) -> HttpResponse:
    """Serve what is no text."""
    return HttpResponse(b"\xff\x00\xfe", content_type="image/png")


def boom(request: HttpRequest) -> HttpResponse:
    """Fail with something that is nobody's business."""
    raise RuntimeError("secret=42")


def late(request: HttpRequest) -> StreamingHttpResponse:
    """Fail when some of it is out."""

    def chunks() -> Iterator[bytes]:
        yield b"one"
        raise RuntimeError("secret=42")

    return StreamingHttpResponse(chunks(), content_type="text/plain")


def leaving(request: HttpRequest) -> HttpResponse:
    """Leave."""
    sys.exit("secret=42")


def forbidden(request: HttpRequest) -> HttpResponse:
    """Refuse."""
    raise PermissionDenied


def working(request: HttpRequest) -> HttpResponse:
    """Tell how far it is."""
    for n in range(3):
        progress(n + 1, 3)
    return HttpResponse("done")


@require_async
def only(request: HttpRequest) -> HttpResponse:
    """Serve tasks only."""
    return HttpResponse("as a task")


@require_async
async def only_awaited(request: HttpRequest) -> HttpResponse:
    """Serve tasks only, from an event loop."""
    return HttpResponse("as a task")


def within(request: HttpRequest) -> HttpResponse:
    """Serve tasks only, as it says itself."""
    require_async(request)
    return HttpResponse("as a task")


VIEWS = {
    view.__name__: view
    for view in (
        token,
        told,
        awaited,
        five,
        five_awaited,
        large,
        binary,
        boom,
        late,
        leaving,
        forbidden,
        working,
    )
}
VIEWS |= {"exempt": exempt, "patch": patch, "only": only, "only-awaited": only_awaited, "within": within}

urlpatterns = [
    path("api/v1/", include("taskkit.urls")),
    *(path(f"{name}/", view) for name, view in VIEWS.items()),
]
