"""The routes that hand out tickets, take tokens back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Authenticator
from gateway.face import Engine
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

MAX_NAME: Final = 1_000  # characters of a `jti` or `sub`

_WILD: Final = frozenset("*?[")


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

    async def make_ticket(self, request: Request) -> Response:
        """Swap a Bearer token for a ticket that allows as much, or less: 201. What it may open is not more."""
        claims = self._authenticator.claims(request)
        Parameters(request, ())
        wish = _wish(await read_object(request, self._engine.settings.limits))
        now = time.time()
        granted = await self._narrowed(claims, wish)
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
        times = {"expires_at": rfc3339(int(until)), "session_expires_at": rfc3339(int(now + session))}
        return answer({"ticket": ticket, **times}, 201)

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

    async def revoke(self, request: Request) -> Response:
        """Take back one token (`jti`), or all that a subject has until now (`sub`); their streams end.

        Tickets made of a revoked token, and sessions opened by them, are taken back with it.
        """
        self._authenticator.require(request, "operate")
        Parameters(request, ())
        body = await read_object(request, self._engine.settings.limits)
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
        return answer(
            {revocation.kind: revocation.name, "at": rfc3339(revocation.at), "ended_streams": ended}
        )


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
    known = {"actions": _actions, "runs": _runs, "tasks": _texts, "session": _session}
    errors: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, value in body.items():
        if name not in known:
            errors[name[:100]] = f"is no field here; there are {', '.join(known)}"
            continue
        try:
            found[name] = known[name](value)
        except ValueError as error:
            errors[name] = str(error)
    if errors:
        raise InvalidArguments("the ticket cannot be made", errors=errors)
    return _Wish(**found)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


def _actions(value: Any) -> frozenset[str]:
    found = frozenset(_texts(value))
    if not found or found - ACTIONS:
        raise ValueError(f"must be a list of some of {', '.join(sorted(ACTIONS))}")
    return found


def _runs(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str) and value in ("*", OWN):
        return value
    ids = [parse_run_id(text) for text in _texts(value)]
    if not 0 < len(ids) <= _MAX_RUNS or None in ids:
        raise ValueError(f'must be "*", "own", or a list of 1 to {_MAX_RUNS} ids of runs')
    return tuple(id for id in ids if id is not None)


def _session(value: Any) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= tokens.MAX_LIFE
    if not fine:
        raise ValueError(f"must be a number of seconds from 1 to {tokens.MAX_LIFE:.0f}")
    return float(value)


def _revocation(body: Mapping[str, Any], now: float) -> Revocation:
    kinds: tuple[Literal["jti", "sub"], ...] = ("jti", "sub")
    errors = {str(name)[:100]: "is no field here; there are jti, sub" for name in body if name not in kinds}
    for name in set(kinds) & set(body):
        if not isinstance(body[name], str) or not 0 < len(body[name]) <= MAX_NAME:
            errors[name] = f"must be a text of 1 to {MAX_NAME} characters"
    if not errors and len(body) != 1:
        errors = {"jti": "give either jti (one token), or sub (all tokens of a subject)"}
    if errors:
        raise InvalidArguments("the revocation is invalid", errors=errors)
    kind = kinds[0] if "jti" in body else kinds[1]
    return Revocation(kind, body[kind], now)
