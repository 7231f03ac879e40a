"""Outbox entries to `Submit` messages, oldest first."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import msgspec
from django.db import connections
from django.db.models import Case, F, Value, When
from django.db.models.functions import Now

from taskkit import failpoints
from taskkit.errors import LocalWireError, NotWritable, QueueFull
from taskkit.identifiers import new_token
from taskkit.models import OPEN, Node, Outbox, Run
from taskkit.seqpacket import MESSAGE_LIMIT
from taskkit.wire import codec
from taskkit.wire.messages import Submit, Submitted

#: Answers that say "later", not "never".
LATER: Final = frozenset({QueueFull.code, NotWritable.code})


class Claimant(NamedTuple):
    """Who reads: a node, and whether it has to claim what it reads, as others may read it, too."""

    node: str
    claims: bool


def read(
    using: str, excluded: Collection[str], limit: int, claimant: Claimant | None = None
) -> tuple[list[Submit], list[Submitted]]:
    """Return up to `limit` pending submissions of the database `using`, with refusals of malformed ones.

    Args:
      excluded: ids that were sent and wait for their answer.
      claimant: gets what is its own or nobody's; without one, all.
    """
    submissions, refusals = [], []
    for id_, payload, fence in _entries(using, excluded, limit, claimant):
        try:
            submissions.append(_submission(str(id_), payload, using, fence))
        except (msgspec.ValidationError, LocalWireError, TypeError) as error:
            detail = f"malformed outbox entry: {error}"
            refusals.append(Submitted(id=str(id_), code="invalid-submission", error=detail, fence=fence))
    if claimant is not None and claimant.claims:
        submissions = _with_their_own(using, submissions, claimant.node)
    return submissions, refusals


def _with_their_own(using: str, submissions: list[Submit], node: str) -> list[Submit]:
    """Have runs that belong together be one node's: return those that may stay here.

    One whose parent, or one that it comes after, is another living node's goes there; what nobody has comes here.
    """
    related = [one for one in submissions if one.parent or one.after]
    if not related:
        return submissions
    ids = {id for one in related for id in (one.parent, *one.after) if id}
    runs = Run.objects.using(using).filter(id__in=ids)
    owners = {str(id): owner for id, owner in runs.values_list("id", "node")}
    living = set(
        Node.objects.using(using)
        .filter(name__in=set(owners.values()), expires_at__gt=Now())
        .values_list("name", flat=True)
    )
    away: set[str] = set()
    for one in related:
        names = {owners.get(id or "", "") for id in (one.parent, *one.after)}
        other = next(iter(sorted(names & living - {node})), None)
        if other is not None:
            Run.objects.using(using).filter(id=one.id, fence=one.fence).update(node=other)
            away.add(one.id)
    stay = [one for one in submissions if one.id not in away]
    _claim_all(using, {id for one in stay for id in (one.parent, *one.after) if id}, node)
    return stay


def _claim_all(using: str, ids: set[str], node: str) -> None:
    """Claim those of these runs that are nobody's, and what these wait for in turn."""
    kept = Case(When(fence="", then=Value(new_token())), default=F("fence"))
    seen: set[str] = set()
    while ids:
        runs = Run.objects.using(using).filter(id__in=ids, node="", status__in=OPEN)
        mine = list(runs.values_list("id", flat=True))
        runs.update(node=node, fence=kept)
        seen |= ids
        waiting = Outbox.objects.using(using).filter(id__in=mine).values_list("payload", flat=True)
        ids = {str(id) for one in waiting for id in (one.get("parent"), *one.get("after", ())) if id} - seen


def _entries(
    using: str, excluded: Collection[str], limit: int, claimant: Claimant | None
) -> list[tuple[uuid.UUID, Any, str]]:
    """Return (id, payload, fence); what is nobody's is the claimant's from now on."""
    connection = connections[using]
    claims = claimant is not None and claimant.claims
    at_once = claims and connection.vendor == "postgresql"
    native = connection.features.has_native_uuid_field
    known = [uuid.UUID(id_) for id_ in excluded]
    values: list[Any] = [] if claimant is None else [claimant.node]
    values += known if native else [id_.hex for id_ in known]
    values.append(limit)
    token = new_token()
    if at_once:
        assert claimant is not None
        values += [claimant.node, token]
    with connection.cursor() as cursor:
        cursor.execute(_statement(using, claimant is not None, len(known), at_once), values)
        found = [
            (id_ if isinstance(id_, uuid.UUID) else uuid.UUID(id_), payload, owner, fence or "")
            for id_, payload, owner, fence in cursor.fetchall()
        ]
    if claims and not at_once:
        assert claimant is not None
        found = _claimed(using, found, claimant.node, token)
    if claims and found:
        failpoints.hit("courier.claimed")
    return [
        (id_, json.loads(payload) if isinstance(payload, str) else payload, fence)
        for id_, payload, _, fence in found
    ]


_Found = list[tuple[uuid.UUID, Any, str | None, str]]


def _claimed(using: str, found: _Found, node: str, token: str) -> _Found:
    """Claim what is nobody's; return what is the node's then. The condition decides, whatever was read before."""
    free = [id_ for id_, _, owner, _ in found if owner == ""]
    if not free:
        return found
    runs = Run.objects.using(using).filter(id__in=free)
    mine = set(free)
    # One that has a fence has got it since it was anybody's.
    kept = Case(When(fence="", then=Value(token)), default=F("fence"))
    if runs.filter(node="").update(node=node, fence=kept) != len(free):
        mine = set(runs.filter(node=node).values_list("id", flat=True))
    return [
        (id_, payload, owner, fence or (token if owner == "" else ""))
        for id_, payload, owner, fence in found
        if owner != "" or id_ in mine
    ]


@functools.lru_cache(maxsize=1_000)
def _statement(using: str, owned: bool, excluded: int, at_once: bool) -> str:
    """Return the statement that reads pending entries, oldest first, with the owner and the fence of their runs.

    By the ORM it takes the courier 3 ms to put together, by this none. With `at_once`, PostgreSQL claims in the same
    statement: whoever looks at the same moment gets the next ones, and an entry that another claimed in between is not
    returned, as the update sees it as it is by then.
    """
    quote = connections[using].ops.quote_name
    outbox, run = quote(Outbox._meta.db_table), quote(Run._meta.db_table)
    where = "o.state = 'pending'"
    if owned:
        where += " AND (r.node IS NULL OR r.node IN ('', %s))"
    if excluded:
        where += f" AND o.id NOT IN ({', '.join(['%s'] * excluded)})"
    pending = (
        f"SELECT o.id, o.payload, r.node, r.fence FROM {outbox} o LEFT JOIN {run} r ON r.id = o.id "
        f"WHERE {where} ORDER BY o.id LIMIT %s"
    )
    if not at_once:
        return pending
    return (
        f"WITH picked AS ({pending} FOR UPDATE OF o SKIP LOCKED), "
        f"claimed AS (UPDATE {run} SET node = %s, fence = CASE WHEN {run}.fence = '' THEN %s ELSE {run}.fence END "
        f"FROM picked WHERE {run}.id = picked.id AND {run}.node = '' RETURNING {run}.id, {run}.fence) "
        "SELECT picked.id, picked.payload, picked.node, COALESCE(claimed.fence, picked.fence) "
        "FROM picked LEFT JOIN claimed ON claimed.id = picked.id "
        "WHERE picked.node IS NULL OR picked.node <> '' OR claimed.id IS NOT NULL ORDER BY picked.id"
    )


def _submission(id_: str, payload: object, using: str, fence: str) -> Submit:
    if not isinstance(payload, dict):
        raise TypeError(f"the payload is {type(payload).__name__}, no object")
    submission = msgspec.convert(
        {**payload, "id": id_, "using": using, "fence": fence, "message": "Submit"}, Submit
    )
    if len(codec.pack(submission)) > MESSAGE_LIMIT:
        raise LocalWireError(f"it has more than {MESSAGE_LIMIT} bytes")
    return submission


def postpone(using: str, answer: Submitted, *, release: bool) -> None:
    """Note that the gateway put this submission off; it stays pending.

    Args:
      release: others may have room for it; only if it is certain that the gateway here does not have it.

    Raises:
      DatabaseError: the database is away.
    """
    if release and answer.code == QueueFull.code:
        Run.objects.using(using).filter(id=answer.id, fence=answer.fence).update(node="", fence=new_token())
    entry = Outbox.objects.using(using).filter(id=answer.id)
    entry.update(attempts=F("attempts") + 1, error=(answer.error or answer.code).replace("\0", "\ufffd"))


def data_version(using: str) -> int | None:
    """Return SQLite's counter of what other connections committed to this file; None for other databases.

    Two equal readings on one connection mean that nothing changed in between. Source: SQLite,
    "PRAGMA data_version".
    """
    connection = connections[using]
    if connection.vendor != "sqlite":
        return None
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA data_version")
        row = cursor.fetchone()
    return None if row is None else int(row[0])
