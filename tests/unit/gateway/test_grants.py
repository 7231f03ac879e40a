"""What can be used once, or taken back."""

from __future__ import annotations

from typing import Any

import pytest

from gateway import grants
from gateway.grants import REMEMBERED, Grants, Revocation, TooManyRevocations
from gateway.store.rows import Batch, Opened, RevocationRow, TicketRow
from taskkit.tokens import MAX_LIFE, Claims, Ticket


def claims(id: str = "j", subject: str = "ann", issued_at: float = 100.0) -> Claims:
    return Claims(subject, 1e6, id, frozenset({"read"}), "*", (), issued_at)


def ticket(id: str = "t") -> Ticket:
    return Ticket(id, claims(), valid_until=160.0)


def opened(**what: Any) -> Opened:
    return Opened({}, [], {}, 1, 1, **what)


def test_a_ticket_is_redeemed_once_and_written_down() -> None:
    memory, batch = Grants(opened()), Batch()
    assert not memory.is_used(ticket())
    assert memory.redeem(ticket(), 0.0, batch)
    assert not memory.redeem(ticket(), 0.0, batch)
    assert memory.is_used(ticket())
    assert (batch.tickets, batch.full) == ([TicketRow("t", 160.0)], True)


def test_what_the_store_knows_is_used() -> None:
    memory = Grants(opened(tickets=[TicketRow("t", 160.0)]), moment=50.0)
    assert not memory.redeem(ticket(), 60.0, Batch())


def test_tickets_are_forgotten_long_after_they_have_expired() -> None:
    memory = Grants(opened())
    for n in range(10):
        memory.redeem(ticket(f"t{n}"), float(n), Batch())
    memory.redeem(ticket("late"), REMEMBERED + 5.5, Batch())
    assert memory.statistics()["tickets"] == 5  # t6 to t9, and the late one
    assert not memory.redeem(ticket("t6"), REMEMBERED + 5.5, Batch())


def test_a_token_is_revoked_by_its_id_and_no_other() -> None:
    memory, batch = Grants(opened()), Batch()
    memory.revoke(Revocation("jti", "j", 200.0), batch)
    assert memory.is_revoked(claims("j", issued_at=300.0))
    assert not memory.is_revoked(claims("k"))
    assert not memory.is_revoked(claims("k", subject="j"))
    assert batch.revocations == [RevocationRow("jti", "j", 200.0, 200.0 + MAX_LIFE)]
    assert batch.full


def test_a_subject_loses_what_was_issued_before() -> None:
    memory = Grants(opened())
    memory.revoke(Revocation("sub", "ann", 200.0), Batch())
    assert memory.is_revoked(claims(issued_at=199.0))
    assert memory.is_revoked(claims(issued_at=200.0))
    assert memory.is_revoked(claims(issued_at=0.0)), "a token that does not say when it was issued"
    assert not memory.is_revoked(claims(issued_at=200.001))
    assert not memory.is_revoked(claims(subject="bob"))


def test_a_later_revocation_of_a_subject_reaches_further() -> None:
    memory = Grants(opened(revocations=[RevocationRow("sub", "ann", 100.0, 1e9)]))
    assert not memory.is_revoked(claims(issued_at=150.0))
    memory.revoke(Revocation("sub", "ann", 200.0), Batch())
    assert memory.is_revoked(claims(issued_at=150.0))
    assert memory.statistics()["revocations"] == 1


def test_revocations_of_what_has_expired_are_forgotten() -> None:
    memory = Grants(opened(revocations=[RevocationRow("jti", "old", 0.0, 10.0)]))
    memory.revoke(Revocation("jti", "new", 10.0 + REMEMBERED + 1), Batch())
    assert memory.statistics()["revocations"] == 1


def test_there_is_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "MAX_REVOCATIONS", 2)
    memory, batch = Grants(opened()), Batch()
    for name in ("a", "b"):
        memory.revoke(Revocation("jti", name, 1.0), batch)
    with pytest.raises(TooManyRevocations):
        memory.revoke(Revocation("jti", "c", 1.0), batch)
    memory.revoke(Revocation("jti", "a", 2.0), batch)  # known already
    assert not memory.is_revoked(claims("c"))
    assert len(batch.revocations) == 3
