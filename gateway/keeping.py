"""The route that gives the store's free pages back to the disk."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.auth import Authenticator
from gateway.describing import Description, document
from gateway.documents import Vacuumed
from gateway.face import Engine
from gateway.fields import body_schema
from gateway.reading import Parameters, Refusal, read_nothing
from gateway.resource import answer
from gateway.retention import Retention

#: Seconds that one request gives pages back for: less than clients and proxies wait for an answer.
SECONDS: Final = 10.0


class Keeping:
    """Serves POST /api/v1/vacuum."""

    def __init__(self, engine: Engine, authenticator: Authenticator, retention: Retention) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._retention = retention

    @Description(
        needs="operate",
        body=body_schema({}),
        body_optional=True,
        answers={200: document(Vacuumed, "What it came to.")},
        problems=("not-incremental", "invalid-arguments"),
    )
    async def vacuum(self, request: Request) -> Response:
        """Give free pages back for a while; `free_bytes` says what is left to do for another request.

        409 for a file of an older version that is too large to be converted.
        """
        claims = self._authenticator.require(request, "operate")
        Parameters(request, ())
        await read_nothing(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        found = await self._retention.vacuum(SECONDS)
        if not found["incremental"]:
            raise Refusal(
                "not-incremental",
                "the store was made by an older version and is too large to be converted while it is open: stop the "
                "tree and, in its state directory, run "
                "`sqlite3 store.sqlite3 'PRAGMA auto_vacuum = INCREMENTAL; VACUUM'`",
            )
        return answer(found)
