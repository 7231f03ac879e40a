"""The schema moves forward, whole or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gateway.store.protocol import StoreTooNew
from gateway.store.schema import STEPS, get_meta, migrate, set_meta

_OLD = ("CREATE TABLE old (a)",)
_NEW = ("ALTER TABLE old ADD COLUMN b", "CREATE INDEX old_b ON old (b)")


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "store.sqlite3", isolation_level=None)) as connection:
        yield connection


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def test_an_empty_file_gets_every_table(connection: sqlite3.Connection) -> None:
    migrate(connection)
    tables = {"meta", "run", "attempt", "event", "output", "source", "ending", "idempotency"}
    assert tables <= _tables(connection)
    assert get_meta(connection, "schema") == str(len(STEPS))


def test_a_second_time_nothing_changes(connection: sqlite3.Connection) -> None:
    migrate(connection)
    before = connection.total_changes
    migrate(connection)
    assert connection.total_changes == before


def test_only_the_missing_steps_are_taken(connection: sqlite3.Connection) -> None:
    migrate(connection, (_OLD,))
    connection.execute("INSERT INTO old VALUES (1)")
    migrate(connection, (_OLD, _NEW))
    assert connection.execute("SELECT a, b FROM old").fetchall() == [(1, None)]
    assert get_meta(connection, "schema") == "2"


def test_a_newer_schema_is_refused_with_a_remedy(connection: sqlite3.Connection) -> None:
    migrate(connection, (_OLD, _NEW))
    with pytest.raises(StoreTooNew, match=r"schema 2.*knows 1.*Install that version"):
        migrate(connection, (_OLD,))
    assert get_meta(connection, "schema") == "2"
    assert not connection.in_transaction


def test_a_step_that_fails_leaves_the_file_as_it_was(connection: sqlite3.Connection) -> None:
    migrate(connection, (_OLD,))
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, (_OLD, ("CREATE TABLE half (a)", "CREATE TABLE old (a)")))
    assert "half" not in _tables(connection)
    assert get_meta(connection, "schema") == "1"


def test_meta_holds_the_newest_value(connection: sqlite3.Connection) -> None:
    migrate(connection, (_OLD,))
    assert get_meta(connection, "boot_id") is None
    set_meta(connection, "boot_id", "a")
    set_meta(connection, "boot_id", "b")
    assert get_meta(connection, "boot_id") == "b"


def test_runs_of_before_are_found_by_their_tags(connection: sqlite3.Connection) -> None:
    """The tags of a store of three steps are taken over into their table."""
    migrate(connection, STEPS[:3])
    names = [name for _, name, *_ in connection.execute("PRAGMA table_info(run)")]
    values = dict.fromkeys(names, 0) | {"no": 1, "id": "a", "tags": '["x", "y\\"", "x"]'}
    connection.execute(f"INSERT INTO run VALUES ({', '.join('?' * len(names))})", list(values.values()))
    values |= {"no": 2, "id": "b", "tags": "[]"}
    connection.execute(f"INSERT INTO run VALUES ({', '.join('?' * len(names))})", list(values.values()))
    migrate(connection)
    assert connection.execute("SELECT tag, run FROM tag ORDER BY tag").fetchall() == [("x", 1), ('y"', 1)]
    assert connection.execute("SELECT followed FROM run").fetchall() == [(0,), (0,)]
