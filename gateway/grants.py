"""What can be used once or taken back: tickets, tokens. Pure.

A round of the engine decides here and writes down what the store has to commit; so of two requests with one ticket, in
one round or an hour apart, before or after a SIGKILL, one is let in.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Literal

from gateway.store.rows import Batch, Opened, RevocationRow, TicketRow
from taskkit.claims import MAX_LIFE, Claims, Ticket

#: Seconds, on a clock that nobody sets, for which a used ticket is remembered here: a ticket is good for a minute, and
#: the wall clock, which says when that is over, may be set back meanwhile.
REMEMBERED: Final = 3_600.0

#: Revocations at once, 0.2 KB each. Only an operator makes them; one of a subject stands for any number of tokens.
MAX_REVOCATIONS: Final = 100_000


class TooManyRevocations(Exception):
    """There are MAX_REVOCATIONS; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """What is to be taken back: one token by its `jti`, or all that a `sub` has at `at` (Unix seconds)."""

    kind: Literal["jti", "sub"]
    name: str
    at: float

    def covers(self, claims: Claims) -> bool:
        """Whether a token with these claims is taken back. One that does not say when it was issued is old."""
        if self.kind == "jti":
            return claims.id == self.name
        return claims.subject == self.name and claims.issued_at <= self.at


class Grants:
    """The memory of one store's tickets and revocations.

    Args:
      moment: monotonic seconds.
    """

    def __init__(self, opened: Opened, moment: float = 0.0) -> None:
        self._used: OrderedDict[str, float] = OrderedDict((row.id, moment) for row in opened.tickets)
        self._revoked: dict[tuple[str, str], Revocation] = {}
        self._expiries: dict[tuple[str, str], float] = {}
        for row in opened.revocations:
            self._remember(row)

    def is_used(self, ticket: Ticket) -> bool:
        """Whether the ticket was redeemed."""
        return ticket.id in self._used

    def redeem(self, ticket: Ticket, moment: float, batch: Batch) -> bool:
        """Use a ticket up; return whether this was the first time. `moment` is in monotonic seconds."""
        while self._used and next(iter(self._used.values())) < moment - REMEMBERED:
            self._used.popitem(last=False)
        if ticket.id in self._used:
            return False
        self._used[ticket.id] = moment
        batch.tickets.append(TicketRow(ticket.id, ticket.valid_until))
        batch.full = True
        return True

    def revoke(self, revocation: Revocation, batch: Batch) -> None:
        """Take tokens back, from this moment on.

        Raises:
          TooManyRevocations: there is no room for another.
        """
        self._forget(revocation.at)
        if len(self._revoked) >= MAX_REVOCATIONS and (revocation.kind, revocation.name) not in self._revoked:
            raise TooManyRevocations
        # Nothing that it covers is valid for longer: tokens with a later `exp` are refused.
        row = RevocationRow(
            revocation.kind, revocation.name, revocation.at, expires_at=revocation.at + MAX_LIFE
        )
        self._remember(row)
        batch.revocations.append(row)
        batch.full = True

    def is_revoked(self, claims: Claims) -> bool:
        """Whether a token with these claims was taken back."""
        found = (self._revoked.get(("jti", claims.id)), self._revoked.get(("sub", claims.subject)))
        return any(one is not None and one.covers(claims) for one in found)

    def statistics(self) -> dict[str, int]:
        """Return how much is remembered."""
        return {"tickets": len(self._used), "revocations": len(self._revoked)}

    def _remember(self, row: RevocationRow) -> None:
        kind: Literal["jti", "sub"] = "jti" if row.kind == "jti" else "sub"
        self._revoked[kind, row.name] = Revocation(kind, row.name, row.at)
        self._expiries[kind, row.name] = row.expires_at

    def _forget(self, now: float) -> None:
        """Drop revocations of which everything has expired, as retention does in the store."""
        for key in [key for key, expires_at in self._expiries.items() if expires_at < now - REMEMBERED]:
            del self._revoked[key], self._expiries[key]
