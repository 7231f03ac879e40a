"""The routes that hand out tickets, take tokens back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Authenticator
from gateway.describing import Description, document
from gateway.documents import Granted, Revoked
from gateway.face import Engine
from gateway.fields import Field, body_schema, is_number, read, text
from gateway.grants import Revocation, TooManyRevocations
from gateway.reach import reaches
from gateway.reading import Parameters, Refusal, read_object
from gateway.resource import Resource, answer
from gateway.snapshot import API, rfc3339
from taskkit import tokens
from taskkit.errors import Forbidden, InvalidArguments
from taskkit.identifiers import parse_run_id
from taskkit.tokens import ACTIONS, OWN, Claims

#: What a session can do at all: a cookie only reads.
_OF_SESSIONS: Final = frozenset({"read", "logs"})

#: Runs that a ticket may name; about 40 fit into its cookie, and each is looked up.
_MAX_RUNS: Final = 100

_NAMES: Final = sorted(ACTIONS)

MAX_NAME: Final = 1_000  # characters of a `jti` or `sub`

_WILD: Final = frozenset("*?[")


def _is_reach(value: object) -> bool:
    if isinstance(value, str):
        return value in ("*", OWN)
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MAX_RUNS
        and all(isinstance(one, str) and parse_run_id(one) is not None for one in value)
    )


#: What a body may say of a ticket.
_WISHES: Final[Mapping[str, Field]] = {
    "actions": Field(
        lambda value: isinstance(value, list) and bool(value) and all(one in _NAMES for one in value),
        f"must be a list of some of {', '.join(_NAMES)}",
        {"type": "array", "minItems": 1, "items": {"type": "string", "enum": _NAMES}},
        "What it allows; `read` and `logs` are good for anything.",
    ),
    "runs": Field(
        _is_reach,
        f'must be "*", "own", or a list of 1 to {_MAX_RUNS} ids of runs',
        {
            "anyOf": [
                {"type": "string", "enum": ["*", OWN]},
                {"type": "array", "minItems": 1, "maxItems": _MAX_RUNS, "items": {"type": "string"}},
            ]
        },
        "The runs that it reaches: ids, all, or those submitted for its `sub`.",
    ),
    "tasks": Field(
        lambda value: isinstance(value, list) and all(isinstance(one, str) and one for one in value),
        "must be a list of texts",
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        "The tasks whose runs it reaches, `*` for any characters.",
    ),
    "session": Field(
        lambda value: is_number(value) and 1 <= value <= tokens.MAX_LIFE,
        f"must be a number of seconds from 1 to {tokens.MAX_LIFE:.0f}",
        {"type": "number", "minimum": 1, "maximum": tokens.MAX_LIFE},
        "Seconds that its cookie is good for, at most as long as the token.",
    ),
}

#: What becomes of it in a `_Wish`.
_MEANINGS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "actions": frozenset,
    "runs": lambda value: value if isinstance(value, str) else tuple(map(parse_run_id, value)),
    "tasks": tuple,
    "session": float,
}

#: What can be taken back.
_REVOCABLE: Final[Mapping[str, Field]] = {
    "jti": text(1, MAX_NAME).about("One token."),
    "sub": text(1, MAX_NAME).about("All that a subject has until now."),
}

_EITHER: Final = {"required": [], "minProperties": 1, "maxProperties": 1}


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a ticket is to allow; None: as much as its token."""

    actions: frozenset[str] | None = None
    runs: tuple[str, ...] | Literal["*", "own"] | None = None
    tasks: tuple[str, ...] | None = None
    session: float = tokens.SESSION_SECONDS


class Granting:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator

    def routes(self) -> list[Route]:
        """Return the routes, for Starlette."""
        return [
            Route(f"{API}/tickets", Resource(post=self.make_ticket)),
            Route(f"{API}/tokens/revoke", Resource(post=self.revoke)),
        ]

    @Description(
        needs="",
        body=body_schema(_WISHES),
        body_optional=True,
        answers={201: document(Granted, "It is good for one GET within a minute.")},
        problems=("unknown-run", "invalid-arguments"),
    )
    async def make_ticket(self, request: Request) -> Response:
        """Swap a Bearer token for a ticket that allows as much, or less: 201. What it may open is not more."""
        claims = self._authenticator.claims(request)
        Parameters(request, ())
        wish = _wish(await read_object(request, self._engine.settings.limits))
        granted = await self._narrowed(claims, wish)
        self._authenticator.recheck(claims)
        now = time.time()
        session = min(wish.session, claims.expires_at - now)
        try:
            ticket = tokens.issue_ticket(
                self._authenticator.key,
                actions=granted.actions,
                runs=granted.runs,
                tasks=granted.tasks,
                session=session,
                subject=claims.subject,
                parent=claims.id,
                now=now,
            )
        except ValueError as error:
            raise InvalidArguments(str(error), errors={"runs": "too long for a cookie"}) from error
        until = now + min(tokens.TICKET_SECONDS, session)
        made: Granted = {
            "ticket": ticket,
            "expires_at": rfc3339(int(until)),
            "session_expires_at": rfc3339(int(now + session)),
        }
        return answer(made, 201)

    async def _narrowed(self, claims: Claims, wish: _Wish) -> Claims:
        """Return what the wish leaves of the claims.

        Raises:
          Forbidden: it wants more than there is. Refusal: it names a run that the token does not reach.
        """
        actions = claims.actions & _OF_SESSIONS if wish.actions is None else wish.actions
        if lacking := actions - claims.actions:
            raise Forbidden(f"the token does not allow {', '.join(sorted(lacking))}")
        if not actions:
            raise Forbidden("the token allows nothing that a ticket is good for: read, logs")
        narrowed = replace(claims, actions=actions)
        if wish.runs is None and wish.tasks is None:
            return narrowed
        _check_tasks(claims, wish.tasks or (), actions)
        runs = await self._reached(claims, wish.runs or ())
        return replace(narrowed, runs=runs, tasks=wish.tasks or ())

    async def _reached(
        self, claims: Claims, runs: tuple[str, ...] | Literal["*", "own"]
    ) -> frozenset[str] | Literal["*", "own"]:
        if isinstance(runs, str):
            if claims.runs not in ("*", runs):
                raise Forbidden(f"the token does not reach {'every run' if runs == '*' else 'own runs'}")
            return runs
        for id in runs:
            run = await self._engine.store.run(id)
            if run is None or not reaches(claims, run):
                raise Refusal("unknown-run", f"there is no run {id}, or the token does not reach it")
        return frozenset(runs)

    @Description(
        needs="operate",
        body=body_schema(_REVOCABLE, _REVOCABLE) | _EITHER,
        answers={200: document(Revoked, "It is refused from now on, after a restart as well.")},
        problems=("too-many-revocations", "invalid-arguments"),
    )
    async def revoke(self, request: Request) -> Response:
        """Take back one token (`jti`), or all that a subject has until now (`sub`); their streams end.

        Tickets made of a revoked token, and sessions opened by them, are taken back with it.
        """
        claims = self._authenticator.require(request, "operate")
        Parameters(request, ())
        body = await read_object(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        revocation = _revocation(body, time.time())
        try:
            await self._engine.revoke(revocation)
        except TooManyRevocations:
            raise Refusal(
                "too-many-revocations",
                "there is no room for another; revoke a subject instead of its tokens, or replace the key",
            ) from None
        finally:
            # Also when the answer of the store did not come in time: they are refused from now on in any case.
            ended = self._authenticator.sessions.end_revoked()
        found: Revoked = {"at": rfc3339(revocation.at), "ended_streams": ended}
        found[revocation.kind] = revocation.name
        return answer(found)


def _check_tasks(claims: Claims, patterns: Iterable[str], actions: frozenset[str]) -> None:
    """Refuse patterns that reach further than the token's. Who reads every run may read any task's."""
    if claims.runs == "*" and actions <= _OF_SESSIONS:
        return
    for pattern in patterns:
        plain = not _WILD & set(pattern)
        if pattern in claims.tasks or "*" in claims.tasks or (plain and claims.matches_task(pattern)):
            continue
        raise Forbidden(f"the token does not reach the tasks {pattern[:200]!r}")


def _wish(body: Mapping[str, Any]) -> _Wish:
    """Return what a body asks for.

    Raises:
      InvalidArguments: a message per field.
    """
    errors: dict[str, str] = {}
    found = read(body, _WISHES, errors)
    if errors:
        raise InvalidArguments("the ticket cannot be made", errors=errors)
    return _Wish(**{name: _MEANINGS[name](value) for name, value in found.items()})


def _revocation(body: Mapping[str, Any], now: float) -> Revocation:
    errors: dict[str, str] = {}
    found = read(body, _REVOCABLE, errors)
    if not errors and (len(found), len(body)) != (1, 1):
        errors = {"jti": "give either jti (one token), or sub (all tokens of a subject)"}
    if errors:
        raise InvalidArguments("the revocation is invalid", errors=errors)
    kind: Literal["jti", "sub"] = "jti" if "jti" in found else "sub"
    return Revocation(kind, found[kind], now)
