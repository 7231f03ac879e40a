"""Which requests are performed in their order, one at a time: those of one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from django.http import HttpRequest
from django.utils.module_loading import import_string

from taskkit.settings import AsyncRequestSettings

#: Names the object; without it, it is `data.id` of a JSON body (JSON:API), as in bazis-async-request.
HEADER: Final = "X-Partition-Key"

#: Longest body that is looked into, bytes: a megabyte takes a millisecond.
_LONGEST: Final = 1024 * 1024

#: Longest key, characters: with what the middleware puts before it, it is a `concurrency_key`.
_KEY: Final = 180


class _Data(msgspec.Struct):
    id: str | int | None = None


class _Body(msgspec.Struct):
    data: _Data | None = None


def partition_of(request: HttpRequest, settings: AsyncRequestSettings) -> str | None:
    """Return what the requests share that are performed in their order; None: this one is on its own."""
    if settings.partition is not None:
        find: Callable[[HttpRequest], Any] = import_string(settings.partition)
        found = find(request)
    else:
        found = request.headers.get(HEADER) or _object_of(request)
    return None if found is None or found == "" else str(found)[:_KEY]


def _object_of(request: HttpRequest) -> str | int | None:
    if not (request.content_type or "").endswith("json") or len(request.body) > _LONGEST:
        return None
    try:
        body = msgspec.json.decode(request.body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError):  # of another form: the view's business
        return None
    return None if body.data is None else body.data.id
