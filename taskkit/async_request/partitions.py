"""Which requests are performed in their order, one at a time: those of one object."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

import msgspec
from django.http import HttpRequest
from django.utils.module_loading import import_string

from taskkit.async_request.owners import Owner
from taskkit.settings import AsyncRequestSettings

#: Names the object; without it, it is `data.id` of a JSON body (JSON:API), as in bazis-async-request.
HEADER: Final = "X-Partition-Key"

#: Longest body that is looked into, bytes: a megabyte takes a millisecond.
_LONGEST: Final = 1024 * 1024

#: Longest key, characters; of a longer one the rest is a digest, and all of it a `concurrency_key`.
_KEY: Final = 180


class _Data(msgspec.Struct):
    id: str | int | None = None


class _Body(msgspec.Struct):
    data: _Data | None = None


def partition_of(request: HttpRequest, settings: AsyncRequestSettings, owner: Owner) -> str | None:
    """Return the key of the requests that are performed in their order; None: this one is on its own.

    What a header names is its sender's alone, as is all that a client without credentials says: whoever likes could
    hold up the others otherwise.
    """
    if settings.partition is not None:
        find: Callable[[HttpRequest], Any] = import_string(settings.partition)
        return _key("partition", find(request))
    if header := request.headers.get(HEADER):
        return _key("header", owner.subject, header)
    about = _object_of(request)
    return _key("object", about) if owner.user else _key("object", about, owner.subject)


def _key(*parts: Any) -> str | None:
    if parts[1] is None or parts[1] == "":
        return None
    text = ":".join(map(str, parts))
    return text if len(text) <= _KEY else f"{text[:_KEY]}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _object_of(request: HttpRequest) -> str | int | None:
    if not (request.content_type or "").endswith("json") or len(request.body) > _LONGEST:
        return None
    try:
        body = msgspec.json.decode(request.body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError):  # of another form: the view's business
        return None
    return None if body.data is None else body.data.id
