"""The run that a request names, if its token reaches it: here, or at another node."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from gateway.face import Engine
from gateway.reach import reaches
from gateway.reading import Refusal
from gateway.store.rows import RunRow
from taskkit.identifiers import parse_run_id
from taskkit.tokens import Claims
from taskkit.wire.messages import Located


class Elsewhere(Exception):
    """Another node has the run: `url` is where the same request is answered."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url


async def find_run(engine: Engine, request: Request, claims: Claims) -> RunRow:
    """Return the run whose id is in the request's path, as it was written.

    Raises:
      Refusal: there is none; one beyond the token's reach is as unknown as one that is not there.
      Elsewhere: another node has it.
      NotWritable: other nodes live, and the database does not say whether one of them has it.
      StoreError: the disk does not answer.
    """
    canonical = parse_run_id(request.path_params["id"])
    run = None if canonical is None else await engine.store.run(canonical)
    if run is not None and reaches(claims, run):
        return run
    if run is None and canonical is not None:
        located = await engine.locate(canonical)
        if located is not None and claims.sees_run(canonical, located.task, located.subject):
            raise Elsewhere(_same_at(located, request))
    raise unknown_run()


def unknown_run() -> Refusal:
    """Return what whoever may not know of a run is told."""
    return Refusal("unknown-run", "there is no such run, or the token does not reach it")


def _same_at(located: Located, request: Request) -> str:
    path, query = quote(request.url.path), request.url.query
    return f"{located.url.rstrip('/')}{path}{'?' if query else ''}{query}"


async def on_elsewhere(request: Request, error: Exception) -> Response:
    """Send the client on, for Starlette's table of exception handlers: the same method, the same body."""
    assert isinstance(error, Elsewhere)
    return Response(None, 307, {"Location": error.url, "Cache-Control": "no-store"})
