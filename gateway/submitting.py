"""A POST that becomes a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import Response

from gateway.accepting import named_by
from gateway.auth import Authenticator
from gateway.describing import Description, Header, document
from gateway.face import Engine
from gateway.fields import body_schema
from gateway.finding import find_run, unknown_run
from gateway.reach import reaches
from gateway.reading import Parameters, Refusal, parse_object, read_body_of_json, read_object
from gateway.resource import answer
from gateway.snapshot import Accepted, accepted, urls
from gateway.store.protocol import StoreError
from gateway.store.rows import RunRow
from gateway.submission import (
    FIELDS,
    ON_THE_SPOT,
    REPLAY_FIELDS,
    Submission,
    body_digest,
    parse_submission,
    replay_of,
)
from taskkit import failpoints, tokens
from taskkit.errors import (
    Forbidden,
    IdempotencyConflict,
    InvalidArguments,
    NotWritable,
    QueueFull,
    UnknownTask,
)
from taskkit.tokens import Claims

#: Seconds that the token of one run is good for.
RUN_TOKEN_SECONDS: Final = 24 * 3600.0

#: What it allows, on that run.
RUN_TOKEN_ACTIONS: Final = ("read", "cancel", "logs")

MAX_KEY: Final = 200  # characters of an Idempotency-Key

#: Seconds to answer a full queue or an absent database with, when nobody knows better.
RETRY_AFTER: Final = 1.0

IDEMPOTENCY_KEY: Final = Header(
    "Idempotency-Key",
    "Makes a repeat safe: the same key with the same body is the same run.",
    {"type": "string", "minLength": 1, "maxLength": MAX_KEY},
)

_WHERE: Final = "Path of the run."
_REFUSALS: Final = ("unknown-task", "invalid-arguments", "idempotency-conflict", "queue-full")


class Submitting:
    """Takes submissions for one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._creating: set[tuple[str, str]] = set()
        # One large body at a time: two would only share the GIL with the streams.
        self.limiter = trio.CapacityLimiter(1)

    @Description(
        needs="submit",
        headers=(IDEMPOTENCY_KEY,),
        body=body_schema(FIELDS, ["task"]),
        answers={
            200: document(Accepted, "It was a run before.", Location=_WHERE, Idempotency_Replayed="`true`."),
            202: document(Accepted, "It is a run now.", Location=_WHERE),
        },
        problems=_REFUSALS,
    )
    async def submit(self, request: Request) -> Response:
        """Submit a task: it becomes a run."""
        claims = self._authenticator.require(request, "submit")
        Parameters(request, ())
        key = idempotency_key(request)
        data = await read_body_of_json(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        body, submission = await self._parse(data, claims, key)
        await self.check_relatives(submission, claims)
        failpoints.hit("accept.asked")
        if submission.task.kind == "model":
            run, replayed = await self.submit_model(submission, body)
        else:
            with _retry_hints(submission):
                run, replayed = await self._engine.submit(submission)
        failpoints.hit("accept.answered")
        if replayed:
            check_ownership(run, submission)
        return self._answer(run, replayed, claims)

    @Description(
        needs="submit",
        headers=(IDEMPOTENCY_KEY,),
        body=body_schema(REPLAY_FIELDS),
        body_optional=True,
        answers={
            200: document(Accepted, "It was a run before.", Location=_WHERE, Idempotency_Replayed="`true`."),
            202: document(Accepted, "It is a run now.", Location=_WHERE),
        },
        problems=("unknown-run", "run-open", *_REFUSALS),
    )
    async def replay(self, request: Request) -> Response:
        """Have a run that has ended performed again, as a new one."""
        claims = self._authenticator.require(request, "submit")
        Parameters(request, ())
        key = idempotency_key(request)
        body = await read_object(request, self._engine.settings.limits)
        self._authenticator.recheck(claims)
        old = await self._ended_run(request, claims)
        submission = replay_of(
            old,
            body,
            self._engine.catalogue.find(old.task),
            subject=claims.subject,
            pools=self._engine.settings.all_pools,
        )
        if key is not None:
            submission.key, submission.digest = key, body_digest({"replay": old.id})
        with _retry_hints(submission):
            run, replayed = await self._engine.submit(submission)
        if replayed:
            check_ownership(run, submission)
        return self._answer(run, replayed, claims)

    async def _ended_run(self, request: Request, claims: Claims) -> RunRow:
        if not claims.may("read"):
            raise unknown_run()
        run = await find_run(self._engine, request, claims)
        self._check_reach(run.task, claims)
        if not run.status.is_terminal:
            raise Refusal(
                "run-open", f"run {run.id} is {run.status.value}; it can be performed again when it has ended"
            )
        return run

    def _answer(self, run: RunRow, replayed: bool, claims: Claims) -> Response:
        headers = {"Location": urls(run.id)["self"]}
        if replayed:
            headers["Idempotency-Replayed"] = "true"
        return answer(accepted(run, self.run_token(run, claims)), 200 if replayed else 202, headers)

    def run_token(self, run: RunRow, claims: Claims) -> str:
        """Return a token for just this run, on behalf of whoever submitted it."""
        return tokens.issue(
            self._authenticator.key,
            actions=RUN_TOKEN_ACTIONS,
            runs=(run.id,),
            ttl=RUN_TOKEN_SECONDS,
            subject=claims.subject,
        )

    async def _parse(self, data: bytes, claims: Claims, key: str | None) -> tuple[dict[str, Any], Submission]:
        def parse() -> tuple[dict[str, Any], Submission]:
            body = parse_object(data)
            return body, self.checked(body, claims, key)

        if len(data) <= ON_THE_SPOT:
            return parse()
        return await trio.to_thread.run_sync(parse, limiter=self.limiter)

    def checked(self, body: dict[str, Any], claims: Claims, key: str | None) -> Submission:
        """Return the submission in `body`. It may take seconds of CPU: call it in a thread for a large one.

        Raises:
          SubmitError: the token does not reach the task, there is none, or something is wrong with the rest.
        """
        self._check_reach(body.get("task"), claims)
        submission = parse_submission(
            body,
            self._engine.catalogue,
            self._engine.settings.limits,
            subject=claims.subject,
            pools=self._engine.settings.all_pools,
        )
        if key is not None:
            submission.key, submission.digest = key, body_digest(body)
        return submission

    async def check_relatives(self, submission: Submission, claims: Claims) -> None:
        """Refuse a submission that names runs which the token does not reach, whether there are any or not.

        Raises:
          InvalidArguments: by field.
        """
        named = named_by(submission)
        if not named:
            return
        found = await self._engine.store.runs_by_id(named)
        unknown = {id for id in named if id not in found or not reaches(claims, found[id])}
        if not claims.may("read"):
            unknown = set(named)
        errors = {"parent": f"there is no run {submission.parent}"} if submission.parent in unknown else {}
        if missing := [id for id in submission.after if id in unknown]:
            errors["after"] = f"there is no run {missing[0]}"
        if errors:
            raise InvalidArguments("the submission names runs that there are not", errors=errors)

    def _check_reach(self, name: object, claims: Claims) -> None:
        """Refuse a task that the token does not reach, whether it exists or not."""
        if not isinstance(name, str):
            return
        try:
            found = self._engine.catalogue.find(name).name
        except UnknownTask:
            found = name
        if not claims.may_submit(found):
            raise Forbidden(f"the token does not allow to submit {name[:200]!r}")

    async def submit_model(self, submission: Submission, body: dict[str, Any]) -> tuple[RunRow, bool]:
        """Create the task row, then submit it; a repeated submission creates no second row.

        Raises:
          SubmitError: it is refused; with 503, `run` is the id to come back with.
        """
        with _retry_hints(submission), self._alone(submission):
            if await self._is_known(submission, body):
                return await self._engine.submit(submission)
            made = await self._engine.create_row(submission, body.get("fields") or {})
            submission.row, submission.using = made.row, made.using
            submission.id = made.run or submission.id
            submission.fence = made.fence
            try:
                run, _ = await self._engine.submit(submission)
            except QueueFull as error:  # it has filled up since: the row is saved, and its outbox entry waits
                raise NotWritable(str(error), retry_after=error.retry_after, run=submission.id) from error
            return run, False  # even if the courier was faster to bring the entry

    async def _is_known(self, submission: Submission, body: dict[str, Any]) -> bool:
        store = self._engine.store
        if submission.key is not None and await store.key(submission.subject, submission.key) is not None:
            return True
        return body.get("id") is not None and await store.run(submission.id) is not None

    @contextmanager
    def _alone(self, submission: Submission) -> Iterator[None]:
        """Refuse the same submission while the first one still creates its row."""
        marks = {(submission.subject, mark) for mark in (submission.id, submission.key) if mark is not None}
        if marks & self._creating:
            raise NotWritable("the same submission is under way", retry_after=RETRY_AFTER)
        self._creating |= marks
        try:
            yield
        finally:
            self._creating -= marks


@contextmanager
def _retry_hints(submission: Submission) -> Iterator[None]:
    """Complete what a client needs to come back with: after how long, and with which id."""
    try:
        yield
    except (NotWritable, QueueFull) as error:
        if error.retry_after is None:
            error.retry_after = RETRY_AFTER
        if error.run is None and isinstance(error, NotWritable):
            error.run = submission.id
        raise
    except StoreError as error:
        raise NotWritable(
            "the store cannot be written now; send the same again, with `id` set to `run`",
            retry_after=RETRY_AFTER,
            run=submission.id,
        ) from error


def check_ownership(run: RunRow, submission: Submission) -> None:
    """Refuse an `id` that is another run's: the answer carries a token for the run.

    A replay by key has been compared by the engine, with subject and digest; its run has an id of its own.
    """
    if run.id != submission.id:
        return
    same = run.subject == submission.subject and run.task == submission.task.name
    if not same or (run.args, run.kwargs) != (submission.args, submission.kwargs):
        raise IdempotencyConflict("the id belongs to another run", errors={"id": "was used for another run"})


def idempotency_key(request: Request) -> str | None:
    values = request.headers.getlist("idempotency-key")
    if not values:
        return None
    if len(values) > 1 or not 0 < len(values[0]) <= MAX_KEY:
        raise Refusal("bad-request", f"Idempotency-Key must be one text of 1 to {MAX_KEY} characters")
    return values[0]
