"""Has any view run as a task when its request asks for that, by X-Async-Request or X-Async-Background.

Put it last in MIDDLEWARE: what stands before it (sessions, CSRF, login) has spoken when a request is handed over.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from inspect import iscoroutinefunction
from typing import Any, Final

from asgiref.sync import markcoroutinefunction
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.db.models.functions import Now
from django.http import HttpRequest, HttpResponse, JsonResponse, RawPostDataException
from django.http.response import HttpResponseBase
from django.urls import NoReverseMatch, reverse
from django.utils import timezone
from django.utils.module_loading import import_string

from taskkit import outbox
from taskkit.async_request import AsyncRequestRequired
from taskkit.async_request.arriving import is_performed, receive
from taskkit.async_request.owners import HERE, Owner, Unknown, owner_of, wish_of
from taskkit.async_request.partitions import partition_of
from taskkit.async_request.recording import meta_of
from taskkit.async_request.requiring import conflict
from taskkit.conf import get_settings
from taskkit.models import OPEN, Node, Run
from taskkit.problems import private, problem
from taskkit.registry import REQUEST
from taskkit.request_models import StoredRequest
from taskkit.settings import AsyncRequestSettings

_log = logging.getLogger("bulkhead.django")

#: Old requests removed with each new one: more than come, so that none is left; few enough to cost nothing.
_REMOVED: Final = 10


class AsyncRequestMiddleware:
    """Answers 202 with `{"data": null, "meta": {"async_request_id": …}}`, and has the view run in a runner.

    There it gets the request as it came: method, path, query, headers, body, cookies, user. Credentials are not kept:
    the user is known by his primary key. What the view answers is the run's result, its status and headers included.
    The submission joins no transaction of the view's.

    401: nobody is known whose it could be. 413: its body is larger than ASYNC_REQUEST.body_bytes. 503: see
    ASYNC_REQUEST.away.
    """

    sync_capable = True
    async_capable = True

    def __init__(
        self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]
    ) -> None:
        self._get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Serve a request; what it returns is awaited under ASGI."""
        if is_performed(request):
            receive(request)
        elif wish_of(request) is not None and (refusal := _take_body(request)) is not None:
            return _soon(refusal) if iscoroutinefunction(self._get_response) else refusal
        return self._get_response(request)

    def process_view(
        self, request: HttpRequest, view: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HttpResponse | None:
        """Hand the request over, if it asks for that."""
        if is_performed(request) or wish_of(request) is None or getattr(view, HERE, False):
            return None
        settings = get_settings().async_request
        try:
            owner = owner_of(request, settings)
        except Unknown as error:
            return problem(401, "login-needed", str(error), **{"WWW-Authenticate": 'Session realm="django"'})
        if settings.away != "queue" and not _has_tree():
            if settings.away == "refuse":
                return problem(
                    503, "unavailable", "nothing performs requests just now", **{"Retry-After": "10"}
                )
            _log.warning("%s %s is performed at once: no tree was seen lately", request.method, request.path)
            return None
        return _accepted(_submit(request, owner, settings))

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """Answer 409 for a view that runs as a task only."""
        return conflict() if isinstance(error, AsyncRequestRequired) else None


async def _soon(response: HttpResponse) -> HttpResponse:
    return response


def _take_body(request: HttpRequest) -> HttpResponse | None:
    """Take in the raw body, before anybody parses it; return the refusal of one that is too large.

    Django's own limit for what it holds in memory (DATA_UPLOAD_MAX_MEMORY_SIZE) is for fields, not for files.
    """
    most = get_settings().async_request.body_bytes
    read = getattr(request, "_read_started", False)  # by a middleware before this one
    try:
        body = request.body if read else request.read(most + 1)
    except RawPostDataException:
        raise ImproperlyConfigured(
            "a middleware before AsyncRequestMiddleware has read request.POST: the raw body is gone"
        ) from None
    if len(body) > most:
        return problem(413, "too-large", f"a request may have {most:,} bytes (ASYNC_REQUEST.body_bytes)")
    request._body = body
    return None


def _has_tree() -> bool:
    fresh = Now() - timedelta(seconds=outbox.NODE_FRESH)
    return Node.objects.using(outbox.alias_of(None)).filter(seen_at__gte=fresh).exists()


def _submit(request: HttpRequest, owner: Owner, settings: AsyncRequestSettings) -> str:
    pool = settings.pool
    if settings.lane is not None:
        pool = import_string(settings.lane)(request) or pool
    partition = partition_of(request, settings, owner)
    now = timezone.now()
    alias = outbox.alias_of(None)
    rows = StoredRequest.objects.using(alias)
    id = uuid.uuid4()
    asked = {"id": str(id), "method": request.method, "path": request.get_full_path()}
    with transaction.atomic(using=alias):
        handle = outbox.submit(
            REQUEST,
            kwargs=asked,
            pool=pool,
            concurrency_key=partition or str(id),
            subject=owner.subject,
            using=alias,
        )
        stored = StoredRequest(
            id=id,
            run=handle.id,
            owner=owner.subject,
            user=owner.user,
            named=owner.named,
            method=request.method or "",
            path=request.path_info,
            endpoint=request.get_full_path(),
            meta=meta_of(request, settings.drop_headers),
            body=request.body,
            created_at=now,
        )
        rows.bulk_create([stored])
        _remove(alias, now - timedelta(seconds=settings.kept_seconds))
    return handle.id


def _remove(alias: str, before: datetime) -> None:
    """Remove some requests that were made before, but for those that nobody has performed yet."""
    rows = StoredRequest.objects.using(alias)
    old = rows.filter(created_at__lt=before).order_by("created_at").values_list("run", flat=True)[:_REMOVED]
    if runs := set(old):
        runs -= set(
            Run.objects.using(alias).filter(id__in=runs, status__in=OPEN).values_list("id", flat=True)
        )
        rows.filter(run__in=runs)._raw_delete(alias)


def _accepted(id: str) -> HttpResponse:
    answer = private(JsonResponse({"data": None, "meta": {"async_request_id": id}}, status=202))
    try:
        answer.headers["Location"] = reverse("taskkit:async_request_response", args=[id])
    except NoReverseMatch:  # the site does not include taskkit.urls
        pass
    return answer
