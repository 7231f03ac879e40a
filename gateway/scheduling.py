"""The routes of schedules. They are in Django's database: the courier does what is asked for."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Authenticator
from gateway.describing import Description, Query, Reply, document, names, number
from gateway.face import Engine
from gateway.fields import body_schema
from gateway.reading import Parameters, Refusal, read_nothing, read_object
from gateway.resource import Resource, answer
from gateway.snapshot import API
from gateway.submitting import Submitting
from gateway.timing import Schedule, SchedulePage, parse_schedule, schedule_schema, show_schedule
from taskkit.errors import InvalidArguments
from taskkit.tokens import Claims
from taskkit.wire.messages import ScheduleAnswer, ScheduleDefinition, ScheduleOrder, ScheduleState


def _cursor(query: Parameters) -> str:
    """Return the name behind which a page begins."""
    said = query.text("cursor")
    if said is None:
        return ""
    try:
        return base64.b64decode(said + "=" * (-len(said) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise query.refusal("cursor", "must be the `next` of the page before") from None


_CURSOR: Final = Query(
    "cursor", "The `next` of the page before.", {"type": "string", "minLength": 1}, _cursor
)
_LIMIT: Final = number("limit", 1, 100, 50, "Most schedules on a page.")
_LIST: Final[tuple[Query[Any], ...]] = (_CURSOR, _LIMIT)

_SWITCH: Final = Description(
    needs="submit",
    body=body_schema({}),
    body_optional=True,
    answers={200: document(Schedule, "The schedule as it is now.")},
    problems=("unknown-schedule", "invalid-arguments"),
)


class Scheduling:
    """The handlers, over one engine. Who may submit a task may schedule it, switch and delete its schedules."""

    def __init__(self, engine: Engine, authenticator: Authenticator, submitting: Submitting) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._submitting = submitting

    def routes(self) -> list[Route]:
        """Return the routes, for Starlette."""
        base = f"{API}/schedules"
        return [
            Route(base, Resource(get=self.list_schedules, post=self.create_schedule)),
            Route(f"{base}/{{id}}", Resource(get=self.show_schedule, delete=self.delete_schedule)),
            Route(f"{base}/{{id}}/enable", Resource(post=self.enable_schedule)),
            Route(f"{base}/{{id}}/disable", Resource(post=self.disable_schedule)),
        ]

    @Description(needs="read", query=_LIST, answers={200: document(SchedulePage, "A page of schedules.")})
    async def list_schedules(self, request: Request) -> Response:
        """Serve the page of schedules that the token may see, by name."""
        claims = (await self._authenticator.admit(request, "read")).claims
        query = Parameters(request, names(_LIST))
        found = await self._order("list", after=_CURSOR.of(query), limit=_LIMIT.of(query))
        last = found.schedules[-1].definition.name if found.schedules else ""
        page: SchedulePage = {
            "schedules": [show_schedule(one) for one in found.schedules if _sees(claims, one)],
            "next": base64.urlsafe_b64encode(last.encode()).rstrip(b"=").decode() if found.more else None,
        }
        return answer(page)

    @Description(
        needs="submit",
        body=schedule_schema(),
        answers={
            200: document(Schedule, "It was there before.", Location="Path of the schedule."),
            201: document(Schedule, "It is there now.", Location="Path of the schedule."),
        },
        problems=("unknown-task", "invalid-arguments", "schedule-conflict"),
    )
    async def create_schedule(self, request: Request) -> Response:
        """Make a schedule: 201; the same one again is 200, another one of its name 409."""
        claims = self._authenticator.require(request, "submit")
        Parameters(request, ())
        body = await read_object(request, self._engine.settings.limits)
        # In a thread: a time that never comes is looked for through 50 years, which takes some milliseconds.
        definition, enabled = await trio.to_thread.run_sync(
            parse_schedule,
            body,
            lambda run: self._submitting.checked(run, claims, None),
            self._engine.catalogue,
            limiter=self._submitting.limiter,
        )
        self._authenticator.recheck(claims)
        found = await self._order("create", definition=definition, enabled=enabled, subject=claims.subject)
        shown = show_schedule(found.schedules[0])
        status = 201 if found.status == "made" else 200
        return answer(shown, status, {"Location": shown["urls"]["self"]})

    @Description(
        needs="read", answers={200: document(Schedule, "The schedule.")}, problems=("unknown-schedule",)
    )
    async def show_schedule(self, request: Request) -> Response:
        """Serve one schedule."""
        claims = (await self._authenticator.admit(request, "read")).claims
        Parameters(request, ())
        found = await self._found(request)
        if not _sees(claims, found):
            raise _unknown()
        return answer(show_schedule(found))

    @_SWITCH
    async def enable_schedule(self, request: Request) -> Response:
        """Have a schedule be kept from now on."""
        return answer(show_schedule(await self._change(request, "enable")))

    @_SWITCH
    async def disable_schedule(self, request: Request) -> Response:
        """Have a schedule not be kept until it is enabled; its runs go on."""
        return answer(show_schedule(await self._change(request, "disable")))

    @Description(
        needs="submit",
        body=body_schema({}),
        body_optional=True,
        answers={204: Reply("It is gone; its runs are not.")},
        problems=("unknown-schedule", "schedule-conflict", "invalid-arguments"),
    )
    async def delete_schedule(self, request: Request) -> Response:
        """Remove a schedule; one that the code declares cannot be removed, but disabled."""
        await self._change(request, "delete")
        return Response(None, 204, {"Cache-Control": "no-store"})

    async def _change(self, request: Request, order: str) -> ScheduleState:
        claims = self._authenticator.require(request, "submit")
        Parameters(request, ())
        await read_nothing(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        found = await self._found(request)
        if not claims.may_submit(found.definition.task):
            raise _unknown()
        return (await self._order(order, id=found.id)).schedules[0]

    async def _found(self, request: Request) -> ScheduleState:
        return (await self._order("show", id=request.path_params["id"])).schedules[0]

    async def _order(
        self,
        order: str,
        *,
        id: str = "",
        definition: ScheduleDefinition | None = None,
        enabled: bool = True,
        subject: str = "",
        after: str = "",
        limit: int = 50,
    ) -> ScheduleAnswer:
        found = await self._engine.schedule(
            ScheduleOrder(
                ask="",
                order=order,
                id=id,
                definition=definition,
                enabled=enabled,
                subject=subject,
                after=after,
                limit=limit,
            )
        )
        if found.status == "unknown":
            raise _unknown()
        if found.status == "taken":
            raise Refusal("schedule-conflict", found.detail)
        if found.status == "invalid":
            raise InvalidArguments(found.detail, errors=found.errors)
        return found


def _sees(claims: Claims, state: ScheduleState) -> bool:
    """Whether the token reaches the runs of a schedule."""
    return claims.sees_run("", state.definition.task, state.subject)


def _unknown() -> Refusal:
    return Refusal("unknown-schedule", "there is no such schedule, or the token does not reach it")
