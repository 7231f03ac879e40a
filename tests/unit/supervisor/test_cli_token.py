"""`bulkhead token` makes tickets as well, and takes tokens back."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from supervisor.cli import exits, main
from supervisor.cli import token as command
from taskkit import tokens


class Revoking:
    """Notes what is taken back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, str | None]] = []

    def revoke(self, *, jti: str | None = None, sub: str | None = None) -> dict[str, Any]:
        self.asked.append((jti, sub))
        return {"ended_streams": 3}


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Revoking:
    client = Revoking()
    monkeypatch.setattr(command, "connected", lambda *_: client)
    return client


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_a_ticket_opens_a_session_as_long_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "token",
        "--state-dir",
        str(tmp_path),
        "--ticket",
        "--runs",
        "own",
        "--subject",
        "ann",
        "--ttl",
        "2h",
    ]
    assert main.main(words) == exits.OK
    ticket = tokens.read_ticket(tokens.load_key(tmp_path / "key"), said(capsys))
    assert (ticket.claims.runs, ticket.claims.subject) == ("own", "ann")
    assert ticket.claims.expires_at == pytest.approx(time.time() + 7200, abs=10)


@pytest.mark.parametrize(
    ("flags", "why"), [(["--ttl", "900d"], "400 days"), (["--ticket", "--runs", "x" * 3000], "cookie")]
)
def test_what_cannot_be_made_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], why: str
) -> None:
    assert main.main(["token", "--state-dir", str(tmp_path), *flags]) == exits.BAD_CONFIGURATION
    assert why in capsys.readouterr().err


def test_a_token_is_taken_back_by_its_text_or_its_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gateway: Revoking
) -> None:
    place = ["token", "--state-dir", str(tmp_path)]
    assert main.main([*place, "--json"]) == exits.OK
    made = json.loads(capsys.readouterr().out)
    for given, what in ((made["token"], "token"), (made["id"], "whatever has the id")):
        assert main.main([*place, "--revoke", given]) == exits.OK
        out = capsys.readouterr().out
        assert out == f"Revoked {what} {made['id']}; streams ended: 3.\n"
        assert made["token"] not in out
    assert main.main([*place, "--revoke", made["token"][:60]]) != exits.OK, "cut off by a copy"
    assert "Revoked" not in capsys.readouterr().out
    assert main.main([*place, "--ticket", "--json"]) == exits.OK
    ticket = json.loads(capsys.readouterr().out)
    assert main.main([*place, "--revoke", ticket["token"], "--json"]) == exits.OK
    assert gateway.asked == [(made["id"], None), (made["id"], None), (ticket["id"], None)]


def test_a_subject_loses_what_it_has(tmp_path: Path, gateway: Revoking) -> None:
    assert main.main(["token", "--state-dir", str(tmp_path), "--revoke-subject", "ann"]) == exits.OK
    assert gateway.asked == [(None, "ann")]


def test_one_at_a_time(tmp_path: Path, gateway: Revoking) -> None:
    words = ["token", "--state-dir", str(tmp_path), "--revoke", "a", "--revoke-subject", "b"]
    assert main.main(words) == exits.BAD_CONFIGURATION
    assert gateway.asked == []


def test_a_token_of_another_tree_is_not_guessed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gateway: Revoking
) -> None:
    foreign = tokens.issue(b"o" * 32, actions=["read"], ttl=60, subject="t")
    assert main.main(["token", "--state-dir", str(tmp_path), "--revoke", foreign]) == exits.FAILED
    assert "another key" in capsys.readouterr().err
    assert gateway.asked == []
