"""What a view says that runs as a task only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final, TypeVar, overload

from django.http import HttpRequest, HttpResponse, JsonResponse

from taskkit.async_request.arriving import is_performed

_View = TypeVar("_View", bound=Callable[..., Any])

#: The seed's words.
DETAIL: Final = "This endpoint is available only via async request."


class AsyncRequestRequired(Exception):
    """The view runs as a task only, and was called by a request itself; the middleware answers 409."""

    def __init__(self) -> None:
        super().__init__(DETAIL)


@overload
def require_async(subject: HttpRequest, /) -> None: ...
@overload
def require_async(subject: _View, /) -> _View: ...


def require_async(subject: Any, /) -> Any:
    """Have a view run as a task only: `@require_async` above it, or `require_async(request)` within it.

    A request that does not ask for it gets 409; no header of a client can pretend to be a task. On a class-based view:
    `@method_decorator(require_async, name="dispatch")`.

    Raises:
      AsyncRequestRequired: called with a request that is not performed as a task.
    """
    if isinstance(subject, HttpRequest) or not callable(subject):  # also a request of Django REST framework
        if not is_performed(subject):
            raise AsyncRequestRequired
        return None
    if iscoroutinefunction(subject):

        @wraps(subject)
        async def awaited(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            return await subject(request, *args, **kwargs) if is_performed(request) else conflict()

        return awaited

    @wraps(subject)
    def called(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return subject(request, *args, **kwargs) if is_performed(request) else conflict()

    return called


def conflict() -> HttpResponse:
    """Return the answer to a request that does not ask to be a task."""
    return JsonResponse({"detail": DETAIL}, status=409, headers={"Cache-Control": "no-store"})
