"""What an operator may do: end runners, send them home, let a task's runs go."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.auth import Authenticator
from gateway.describing import Description, document
from gateway.documents import Ordered, Reset
from gateway.face import Engine
from gateway.fields import body_schema
from gateway.reading import Parameters, Refusal, read_nothing
from gateway.resource import answer
from taskkit.errors import UnknownTask

_ORDER: Final = Description(
    needs="operate",
    body=body_schema({}),
    body_optional=True,
    answers={202: document(Ordered, "It was ordered.")},
    problems=("unknown-runner", "invalid-arguments"),
)


class Operating:
    """The handlers, over one engine. Every one needs the action `operate`."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator

    async def _check(self, request: Request) -> None:
        """Refuse who may not, and whatever a body says: nothing of it would have an effect."""
        claims = self._authenticator.require(request, "operate")
        Parameters(request, ())
        await read_nothing(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)

    @_ORDER
    async def kill_runner(self, request: Request) -> Response:
        """End a runner now: 202; its runs are lost, and put back as their `on_lost` says."""
        return await self._end(request, "kill")

    @_ORDER
    async def drain_runner(self, request: Request) -> Response:
        """Have a runner finish what it has, then leave: 202."""
        return await self._end(request, "drain")

    async def _end(self, request: Request, how: str) -> Response:
        await self._check(request)
        id = request.path_params["id"]
        if not await self._engine.end_runner(id, now=how == "kill"):
            raise Refusal("unknown-runner", "no living runner has this id; GET /api/v1/runners lists them")
        found: Ordered = {"id": id, "ordered": how}
        return answer(found, 202)

    @Description(
        needs="operate",
        body=body_schema({}),
        body_optional=True,
        answers={200: document(Reset, "It is not held now.")},
        problems=("unknown-task", "invalid-arguments"),
    )
    async def reset_task(self, request: Request) -> Response:
        """Let the runs of a held task go; a task that has left the catalogue may be held still."""
        await self._check(request)
        name = request.path_params["name"]
        try:
            name = self._engine.catalogue.find(name).name
        except UnknownTask:
            if not await self._engine.reset_task(name):
                raise
            return answer(_reset(name, True))
        return answer(_reset(name, await self._engine.reset_task(name)))


def _reset(task: str, was_held: bool) -> Reset:
    return {"task": task, "was_held": was_held}
