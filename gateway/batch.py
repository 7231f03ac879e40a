"""A POST that becomes many runs, each with an outcome of its own.

Rule: one bad item harms no other. Items are checked one by one in a thread, in their order; what is good and needs no
row is committed all at once; rows of model tasks are made after that, as many at a time as there are intake runners.

A client that leaves in the middle finds on its return, by its idempotency keys, what was accepted: items that need no
row are accepted as if it had stayed, rows that were not begun are not made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response

from gateway import problems
from gateway.auth import Authenticator
from gateway.describing import Description, document
from gateway.documents import BatchAnswer
from gateway.face import Engine
from gateway.fields import array, body_schema, text
from gateway.leaving import Client, watched
from gateway.reading import Parameters, Refusal, document_of, parse_object, read_body_of_json
from gateway.resource import answer
from gateway.snapshot import BatchOutcome, accepted
from gateway.store.rows import RunRow
from gateway.submission import FIELDS, Submission
from gateway.submitting import (
    IDEMPOTENCY_KEY,
    MAX_KEY,
    RETRY_AFTER,
    Submitting,
    check_ownership,
    idempotency_key,
)
from taskkit.errors import InvalidArguments, NotWritable, SubmitError
from taskkit.tokens import Claims

#: Seconds for all rows of one batch; items that have not begun by then get 503. Proxies give up on a silent answer
#: after 60.
ROW_SECONDS: Final = 30.0

#: Name of an item's own idempotency key.
KEY: Final = "idempotency_key"

#: What an item may contain beyond a submission.
KEY_FIELD: Final = text(1, MAX_KEY).about("As the header, for this item.")

_SCHEMA: Final = body_schema({"runs": array().about("Submissions, at most LIMITS.batch_runs.")}, ["runs"])
_SCHEMA["properties"]["runs"]["items"] = body_schema({**FIELDS, KEY: KEY_FIELD}, ["task"])
_SCHEMA["properties"]["runs"]["minItems"] = 1


class Envelope(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a batch. Items are taken apart one by one: so the loop gets its turn in between."""

    runs: list[msgspec.Raw]


@dataclass(slots=True)
class _Item:
    """One item on its way: `submission` until it is submitted, then `run` or `refusal`."""

    index: int
    body: dict[str, Any]
    submission: Submission | None = None
    run: RunRow | None = None
    replayed: bool = False
    refusal: SubmitError | Refusal | None = None

    def settle(self, run: RunRow, replayed: bool) -> None:
        """It is a run; one that somebody else's id names is none of the caller's business."""
        assert self.submission is not None
        try:
            if replayed:
                check_ownership(run, self.submission)
        except SubmitError as error:
            self.refusal = error
        else:
            self.run, self.replayed = run, replayed


class Batching:
    """Serves POST /api/v1/runs/batch."""

    def __init__(self, engine: Engine, authenticator: Authenticator, submitting: Submitting) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._submitting = submitting

    @Description(
        needs="submit",
        headers=(IDEMPOTENCY_KEY,),
        body=_SCHEMA,
        answers={200: document(BatchAnswer, "An outcome per item, in their order.")},
        problems=("invalid-arguments",),
    )
    async def submit(self, request: Request) -> Response:
        """Submit up to LIMITS.batch_runs runs: 200 with one outcome per item, in their order."""
        claims = self._authenticator.require(request, "submit")
        Parameters(request, ())
        key = idempotency_key(request)
        limits = self._engine.settings.limits
        data = await read_body_of_json(request, limits, "batch_bytes")
        self._authenticator.recheck(claims)
        beside = self._submitting.limiter  # what takes a hundred milliseconds is done beside the loop
        items = await trio.to_thread.run_sync(self._read, data, claims, key, limiter=beside)
        await self._check_relatives(items, claims)
        await self._submit_plain([item for item in items if not _needs_row(item)])
        async with watched(request.receive) as client:
            await self._submit_models([item for item in items if _needs_row(item)], client)
        return await trio.to_thread.run_sync(self._answer, items, claims, request.url.path, limiter=beside)

    # --- reading --------------------------------------------------------------------------------------------

    def _read(self, data: bytes, claims: Claims, key: str | None) -> list[_Item]:
        """Return the items of a body, each checked.

        Raises:
          Refusal: the body is no JSON. InvalidArguments: it is no batch.
        """
        raws = _open(data, self._engine.settings.limits.batch_runs)
        return [self._item(index, bytes(raw), claims, key) for index, raw in enumerate(raws)]

    def _item(self, index: int, data: bytes, claims: Claims, key: str | None) -> _Item:
        item = _Item(index, {})
        try:
            most = self._engine.settings.limits.body_bytes
            if len(data) > most:
                raise Refusal("too-large", f"the item exceeds LIMITS.body_bytes = {most}", max_bytes=most)
            item.body = parse_object(data)
            # Not to be mistaken for a key of a client's: those have no line break.
            own = _own_key(item.body) or (None if key is None else f"{key}\n{index}")
            item.submission = self._submitting.checked(item.body, claims, own)
        except (SubmitError, Refusal) as error:
            item.refusal = error
        return item

    # --- submitting -----------------------------------------------------------------------------------------

    async def _check_relatives(self, items: Sequence[_Item], claims: Claims) -> None:
        for item in items:
            if item.submission is not None:
                try:
                    await self._submitting.check_relatives(item.submission, claims)
                except SubmitError as error:
                    item.submission, item.refusal = None, error

    async def _submit_plain(self, items: Sequence[_Item]) -> None:
        """Submit the items that need no row, in one commit."""
        good = [(item, item.submission) for item in items if item.submission is not None]
        outcomes = await self._engine.submit_all([submission for _, submission in good])
        for (item, _), outcome in zip(good, outcomes, strict=True):
            if isinstance(outcome, SubmitError):
                item.refusal = outcome
            else:
                item.settle(*outcome)

    async def _submit_models(self, items: Sequence[_Item], client: Client) -> None:
        """Make the rows, and submit them, while somebody waits for the answer and there is time."""
        deadline = trio.current_time() + ROW_SECONDS
        waiting = iter(items)

        async def work() -> None:
            for item in waiting:  # shared: whoever is free takes the next
                if client.gone or trio.current_time() >= deadline:
                    item.refusal = _not_begun(item)
                else:
                    await self._submit_model(item)

        async with trio.open_nursery() as nursery:
            for _ in range(min(len(items), max(1, self._engine.settings.intake_runners))):
                nursery.start_soon(work)

    async def _submit_model(self, item: _Item) -> None:
        assert item.submission is not None
        try:
            run, replayed = await self._submitting.submit_model(item.submission, item.body)
        except SubmitError as error:
            item.refusal = error
        else:
            item.settle(run, replayed)

    # --- answering ------------------------------------------------------------------------------------------

    def _answer(self, items: Sequence[_Item], claims: Claims, path: str) -> Response:
        outcomes = [self._outcome(item, claims, path) for item in items]
        runs = [item for item in items if item.run is not None]
        replayed = sum(item.replayed for item in runs)
        found: BatchAnswer = {
            "accepted": len(runs) - replayed,
            "replayed": replayed,
            "refused": len(items) - len(runs),
            "runs": outcomes,
        }
        return answer(found)

    def _outcome(self, item: _Item, claims: Claims, path: str) -> BatchOutcome | msgspec.Raw:
        if item.run is not None:
            shown = accepted(item.run, self._submitting.run_token(item.run, claims))
            return {"index": item.index, "replayed": item.replayed, **shown}
        where = f"{path}#/runs/{item.index}"
        if isinstance(item.refusal, Refusal):
            return msgspec.Raw(document_of(item.refusal, where, index=item.index))
        assert item.refusal is not None
        return msgspec.Raw(problems.of_submit_error(item.refusal, where, index=item.index))


def _open(data: bytes, most: int) -> list[msgspec.Raw]:
    try:
        raws = msgspec.json.decode(data, type=Envelope).runs
    except msgspec.ValidationError as error:
        complaint = f'a batch is {{"runs": [submission, …]}}: {error}'
        raise InvalidArguments(complaint, errors={"runs": str(error)}) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("bad-json", f"the body is no JSON: {error}") from error
    if not 0 < len(raws) <= most:
        complaint = f"must have 1 to {most} items (LIMITS.batch_runs), not {len(raws)}"
        raise InvalidArguments(f"runs: {complaint}", errors={"runs": complaint})
    return raws


def _own_key(body: dict[str, Any]) -> str | None:
    """Take the idempotency key out of an item."""
    key = body.pop(KEY, None)
    if key is None:
        return None
    if not KEY_FIELD.check(key):
        raise InvalidArguments(f"{KEY}: {KEY_FIELD.complaint}", errors={KEY: KEY_FIELD.complaint})
    return str(key)


def _needs_row(item: _Item) -> bool:
    return item.submission is not None and item.submission.task.kind == "model"


def _not_begun(item: _Item) -> NotWritable:
    assert item.submission is not None
    return NotWritable(
        "its row was not begun within the time of one batch; send it again, with `id` set to `run`",
        retry_after=RETRY_AFTER,
        run=item.submission.id,
    )
