"""The browser's module, `tasks.js`: a file that everybody may read.

It holds no secret and asks for none, so it takes no token, and pages of every origin may import it.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.describing import Description, Header, Reply
from gateway.reading import Parameters
from gateway.resource import Resource

PATH: Final = "/tasks.js"

IF_NONE_MATCH: Final = Header("If-None-Match", "The `ETag` of what the client has.", {"type": "string"})

#: `no-cache`: a browser keeps it, and asks each time whether it is still the gateway's (304), so that an upgrade
#: reaches every page at its next load.
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Access-Control-Allow-Origin": "*",
}


class Script:
    """The file, read once: what is served belongs to the code that serves it, whatever is installed meanwhile."""

    def __init__(self) -> None:
        self._body = (resources.files("gateway") / "tasks.js").read_bytes()
        self._headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'}

    def routes(self) -> list[Route]:
        """Return the route, for Starlette."""
        return [Route(PATH, Resource(get=self.show))]

    @Description(
        needs=None,
        headers=(IF_NONE_MATCH,),
        answers={
            200: Reply(
                "The module.", {"text/javascript": str}, {"ETag": "What tells one version from another."}
            ),
            304: Reply("The client has it."),
        },
        problems=("bad-parameter",),
    )
    async def show(self, request: Request) -> Response:
        """Serve the file, or 304 when the client has this very one."""
        Parameters(request, ())
        if has_tag(request.headers.get("if-none-match", ""), self._headers["ETag"]):
            return Response(None, 304, self._headers)
        return Response(self._body, 200, self._headers, media_type="text/javascript")


def has_tag(header: str, tag: str) -> bool:
    """Whether an If-None-Match header names `tag`, weakly compared (RFC 9110 §13.1.2)."""
    given = [part.strip().removeprefix("W/") for part in header.split(",")]
    return header.strip() == "*" or tag in given
