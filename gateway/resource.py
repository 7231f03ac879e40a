"""One path of the API: its handlers by method."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[ASGIApp]]


class Resource:
    """Serves one path as an ASGI application: HEAD, OPTIONS and 405 follow from the handlers that there are.

    Starlette's own routes answer a 405 with the methods of the first route of that path only.

    Attributes:
      handlers: by method.
    """

    def __init__(
        self, *, get: Handler | None = None, post: Handler | None = None, delete: Handler | None = None
    ) -> None:
        given = (("GET", get), ("HEAD", get), ("POST", post), ("DELETE", delete))
        self.handlers = {name: one for name, one in given if one}
        self._allow = ", ".join([*self.handlers, "OPTIONS"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        handler = self.handlers.get(scope["method"])
        if handler is None and scope["method"] == "OPTIONS":
            await Response(None, 204, {"Allow": self._allow})(scope, receive, send)
            return
        if handler is None:
            raise HTTPException(405, headers={"Allow": self._allow})
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)


def answer(
    document: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON object as a response that no cache keeps: it depends on the token."""
    common = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return Response(
        msgspec.json.encode(document), status, {**common, **(headers or {})}, media_type="application/json"
    )
