"""The task that performs a view: the request that was kept, through all of the project's middleware."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from django.conf import settings
from django.core.handlers.base import BaseHandler
from django.core.handlers.wsgi import WSGIRequest
from django.core.signals import got_request_exception, request_started
from django.http import HttpRequest
from django.http.response import HttpResponseBase, StreamingHttpResponse

from taskkit.async_request.answers import Kept, shown, spoken
from taskkit.async_request.recording import rebuilt
from taskkit.conf import get_settings
from taskkit.current import current_run
from taskkit.errors import RunCancelled, TaskkitError, TaskTimeout
from taskkit.outbox import alias_of
from taskkit.request_models import StoredRequest
from taskkit.tasks import task

_log = logging.getLogger("bulkhead.django")


class RequestGone(TaskkitError):
    """The request that is to be performed is not kept any more, or was answered and is performed again."""


class ViewFailed(Exception):
    """The view raised. What, only the run's log says: whoever sent the request sees this."""


# One at a time of each key, which is a request's own unless it has a partition.
@task(name="taskkit.request", concurrency=1)
def request(id: str, method: str, path: str) -> dict[str, Any]:
    """Perform a view for a request that asked to be a task.

    Each chunk of a streaming answer is an event `chunk`, with `text` or `base64`. Returns `{status, headers, endpoint,
    response}`, with `encoding` for bytes that are no text, and `truncated` if only the beginning is there.

    Raises:
      ViewFailed: the view raised.
      RequestGone: there is nothing to perform.
    """
    rows = StoredRequest.objects.using(alias_of(None))
    stored = rows.filter(id=id).first()
    if stored is None or stored.body is None:
        raise RequestGone(
            f"{method} {path}: the request was answered, or is older than ASYNC_REQUEST.kept_seconds"
        )
    performed = rebuilt(stored)
    request_started.send(sender=BaseHandler, environ=performed.environ)
    try:
        found = _answered(performed)
    except (TaskTimeout, RunCancelled):
        raise
    except (Exception, SystemExit, GeneratorExit, KeyboardInterrupt) as error:
        if settings.DEBUG:
            raise
        if not isinstance(error, _Told):  # Django has logged that
            _log.exception("%s %s", method, path)
        raise ViewFailed("Internal server error") from None
    rows.filter(id=id).update(body=None)
    return found


@cache
def _handler() -> BaseHandler:
    handler = BaseHandler()
    handler.load_middleware()
    return handler


class _Told(Exception):
    """What the view raised, for which Django has an answer of status 500."""


def _answered(performed: WSGIRequest) -> dict[str, Any]:
    with _failures(performed) as failed:
        response = _handler().get_response(performed)
    try:
        if failed and (isinstance(failed[0], TaskTimeout) or settings.DEBUG):
            raise failed[0]
        if failed:
            raise _Told
        return shown(response, _consumed(response), endpoint=performed.get_full_path())
    finally:
        response.close()  # and whatever the request has opened


@contextmanager
def _failures(performed: HttpRequest) -> Iterator[list[BaseException]]:
    """Collect what Django turns into an answer of status 500."""
    found: list[BaseException] = []

    def note(request: HttpRequest | None = None, **_: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and request is performed:
            found.append(error)

    got_request_exception.connect(note)
    try:
        yield found
    finally:
        got_request_exception.disconnect(note)


def _consumed(response: HttpResponseBase) -> Kept:
    """Take in the whole answer; of a streaming one, each chunk is told as it comes."""
    kept = Kept(get_settings().async_request.response_bytes)
    if not isinstance(response, StreamingHttpResponse):
        kept.add(response.content)  # type: ignore[attr-defined]
        return kept
    said = spoken(response)

    def take(chunk: bytes) -> None:
        kept.add(chunk)
        for event in said(chunk):
            current_run().emit("chunk", event)

    if response.is_async:
        asyncio.run(_follow(response, take))
    else:
        for chunk in response.streaming_content:  # type: ignore[union-attr]
            take(chunk)
    for event in said(b"", final=True):
        current_run().emit("chunk", event)
    return kept


async def _follow(response: StreamingHttpResponse, take: Any) -> None:
    async for chunk in response.streaming_content:  # type: ignore[union-attr]
        take(chunk)
