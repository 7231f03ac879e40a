"""POST …/runs/{id}/input/{name}: something for a task to hear while it runs."""

from __future__ import annotations

import re
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth import Authenticator
from gateway.describing import Description, document
from gateway.documents import Told
from gateway.face import Engine
from gateway.finding import find_run
from gateway.reading import SMALL_BYTES, Parameters, Refusal, read_object
from gateway.resource import answer
from gateway.submitting import IDEMPOTENCY_KEY, idempotency_key

#: What an input's name looks like.
NAME: Final = r"[A-Za-z0-9_.:-]{1,100}"

_ANYTHING: Final = {
    "type": "object",
    "additionalProperties": True,
    "description": f"Anything, in at most {SMALL_BYTES:,} bytes.",
}


class Telling:
    """Takes inputs for one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator

    @Description(
        needs="cancel",
        headers=(IDEMPOTENCY_KEY,),
        body=_ANYTHING,
        body_optional=True,
        answers={
            200: document(Told, "The run was told before.", Idempotency_Replayed="`true`."),
            202: document(Told, "The run will hear it."),
        },
        problems=("unknown-run", "run-finished", "idempotency-conflict", "queue-full", "bad-parameter"),
    )
    async def tell(self, request: Request) -> Response:
        """Tell a run something: 202 when it is on disk, 409 when the run has ended.

        The task takes it with `current_run().inbox(name).get()`. A run that waits hears it when it begins, and each
        further attempt hears everything again. Whoever may cancel a run may tell it something.
        """
        claims = self._authenticator.require(request, "cancel")
        Parameters(request, ())
        key = idempotency_key(request)
        name = _name(request.path_params["inbox"])
        body = await read_object(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        run = await find_run(self._engine, request, claims)
        data = msgspec.json.encode(body)
        number, before = await self._engine.input(run, name, data, key or "")
        told: Told = {"id": run.id, "name": name, "number": number}
        return answer(told, 200, {"Idempotency-Replayed": "true"}) if before else answer(told, 202)


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise Refusal("bad-parameter", "the name of an input has 1 to 100 letters, digits, or _ . : -")
    return text
