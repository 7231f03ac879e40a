"""The routes of bazis-async-request: what became of a request that ran as a task."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api import result_of
from gateway.auth import Authenticator
from gateway.describing import Description, choice, document, names
from gateway.face import Engine
from gateway.finding import unknown_run
from gateway.reach import reaches
from gateway.reading import Parameters
from gateway.resource import Resource, answer
from gateway.snapshot import API
from gateway.store.rows import RunRow
from taskkit import background
from taskkit.errors import Forbidden
from taskkit.identifiers import parse_run_id

_FULL: Final = choice("full_response", ["true", "false"], "`true` adds the run's own state, and its channel.")


class BackgroundRoutes:
    """Serves /api/v1/async_background_response/{id}/ and /api/v1/async_request_response/{id}/ over one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator

    def routes(self) -> list[Route]:
        """Return the routes, for Starlette."""
        resource = Resource(get=self.show)
        kinds = ("background", "request")
        return [Route(f"{API}/async_{kind}_response/{{id}}/", resource) for kind in kinds]

    @Description(
        needs="read",
        query=(_FULL,),
        answers={
            200: document(
                dict[str, Any],
                'The outcome: `{task_id, status, endpoint, headers, response}`, or `{"status": "not ready"}`.',
            )
        },
        problems=("unknown-run", "forbidden"),
    )
    async def show(self, request: Request) -> Response:
        """Serve what a view has answered that ran as a task; its own status is inside.

        404 for an unknown id, 403 for a run beyond the token's reach, as the seed's clients expect.
        """
        claims = (await self._authenticator.admit(request, "read")).claims
        query = Parameters(request, names((_FULL,)))
        id = parse_run_id(request.path_params["id"])
        run = None if id is None else await self._engine.store.run(id)
        if run is None:
            raise unknown_run()
        if not reaches(claims, run):
            raise Forbidden("the request is another user's")
        result = await result_of(self._engine.store, run)
        error = None if run.error is None else msgspec.json.decode(run.error)
        found = background.outcome(run.id, run.status, _parts(result), error, _endpoint(run))
        if _FULL.of(query) == "true":
            found = background.full(run.status, run.subject, found)
        return answer(dict(found))


def _parts(result: msgspec.Raw | None) -> Any:
    """Return an object's members without looking into them: a body may have megabytes."""
    try:
        return None if result is None else msgspec.json.decode(result, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:  # no object
        return result


def _endpoint(run: RunRow) -> str:
    try:
        return msgspec.json.decode(run.kwargs or b"{}", type=_Asked).path
    except msgspec.ValidationError:  # a task of the project's own
        return ""


class _Asked(msgspec.Struct):
    path: str = ""
