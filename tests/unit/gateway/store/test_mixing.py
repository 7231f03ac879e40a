"""Many runs by position, against a list of everything."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.store import mixing
from gateway.store.removal import OldRuns, SurplusEvents
from gateway.store.rows import EventRow, Mix, Place, RunRow
from gateway.store.writer import Writer
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.store import samples
from tests.unit.gateway.store.samples import BLOB, write

ENDED = RunStatus.SUCCESSFUL


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    (tmp_path / "blobs").mkdir()
    with closing(Writer(tmp_path / "store.sqlite3", boot_id="boot-1", durability="process")) as writer:
        yield writer


@pytest.fixture
def db(writer: Writer) -> sqlite3.Connection:
    return writer.connection


def speak(writer: Writer, order: list[int], **changes: RunRow) -> list[EventRow]:
    """Have runs speak in this order; their rows, by name, are made first."""
    offsets = dict.fromkeys(order, 0)
    rows = []
    for pos, run in enumerate(order, 1):
        offsets[run] += 1
        rows.append(samples.event(pos, run, offsets[run]))
    runs = [replace(row, tail=offsets.get(row.no, 0)) for row in changes.values()]
    write(writer, runs=runs, events=rows)
    return rows


def test_a_position_is_found_in_every_run(writer: Writer, db: sqlite3.Connection) -> None:
    speak(
        writer,
        [1, 2, 1, 1, 2, 3],
        a=samples.run(1, status=ENDED),
        b=samples.run(2),
        c=samples.run(3, status=ENDED, epoch=2),
        d=samples.run(4),
    )
    named = Mix(runs=(1, 2, 3, 4, 99))
    assert mixing.places(db, named, 3, 0)[0] == [
        Place(1, "run-1", 0, 2, 4, 4, False),
        Place(2, "run-2", 0, 1, 5, 5, True),
        Place(3, "run-3", 2, 0, 6, 6, False),
        Place(4, "run-4", 0, 0, 0, 0, True),
    ]
    assert [(place.after, place.next) for place in mixing.places(db, named, 6, 0)[0]] == [
        (3, 0),
        (2, 0),
        (1, 0),
        (0, 0),
    ]


def test_a_tag_has_its_open_runs_and_those_with_more(writer: Writer, db: sqlite3.Connection) -> None:
    order = [1, 2, 1, 1, 2, 3, 5]
    tagged = {"tags": ("t", "u")}
    speak(
        writer,
        order,
        a=samples.run(1, status=ENDED, **tagged),
        b=samples.run(2, **tagged),
        c=samples.run(3, status=ENDED, tags=("u",)),
        d=samples.run(4, tags=("t",)),
        e=samples.run(5, status=ENDED, tags=("other",)),
    )

    def numbers(mix: Mix, after: int) -> list[int]:
        return sorted(place.no for place in mixing.places(db, mix, after, 10)[0])

    assert numbers(Mix(tags=("t",)), 0) == [1, 2, 4]
    assert numbers(Mix(tags=("t",)), 4) == [2, 4], "run 1 has nothing behind its end"
    assert numbers(Mix(tags=("t", "u")), 0) == [1, 2, 3, 4], "each once"
    assert numbers(Mix(tags=("u",), runs=(5, 1)), 6) == [1, 2, 5], "named ones in any case"
    assert numbers(Mix(tags=("nobody",)), 0) == []
    assert numbers(Mix(tags=("t", "u"), ids=("run-3",), tasks=()), 0) == [3]
    assert numbers(Mix(tags=("t", "u"), ids=(), tasks=("demo.*",)), 0) == [1, 2, 3, 4]
    assert numbers(Mix(tags=("t",), ids=(), tasks=(), runs=(5,)), 0) == [5], "reach is a matter of tags"


def test_of_many_ended_runs_those_that_go_on_first_come_first(writer: Writer, db: sqlite3.Connection) -> None:
    runs = {f"r{no}": samples.run(no, status=ENDED, tags=("t",)) for no in range(1, 6)}
    speak(writer, [5, 4, 3, 2, 1, 1, 2, 3, 4, 5], **runs)
    places, until = mixing.places(db, Mix(tags=("t",)), 0, 3)
    assert ([place.no for place in places], until) == ([5, 4, 3], 3)
    places, until = mixing.places(db, Mix(tags=("t",)), 3, 3)
    assert ([place.no for place in places], until) == ([2, 1, 3], 8)
    assert mixing.places(db, Mix(tags=("t",)), 8, 3)[1] is None


def test_what_retention_took_is_a_place_without_a_predecessor(writer: Writer, db: sqlite3.Connection) -> None:
    speak(writer, [1] * 10, a=samples.run(1, status=ENDED))
    writer.remove(SurplusEvents(run=1, keep=4))
    (place,), _ = mixing.places(db, Mix(runs=(1,)), 3, 0)
    assert (place.after, place.next) == (0, 7)
    (place,), _ = mixing.places(db, Mix(runs=(1,)), 7, 0)
    assert (place.after, place.next) == (7, 8)


def test_a_removed_run_has_no_tag_any_more(writer: Writer, db: sqlite3.Connection) -> None:
    speak(
        writer,
        [1, 2],
        a=samples.run(1, status=ENDED, tags=("t", 'q"'), finished_at=5.0),
        b=samples.run(2, tags=("t",)),
    )
    while writer.remove(OldRuns(before=10.0))[0].more:
        pass
    assert db.execute("SELECT tag, run FROM tag").fetchall() == [("t", 2)]


def test_merging_keeps_to_its_bounds(writer: Writer, db: sqlite3.Connection, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    (blobs / BLOB).write_bytes(b'"large"')
    rows = [samples.event(1, 1, 1), samples.event(2, 2, 1, b"", BLOB), samples.event(3, 1, 2)]
    write(writer, runs=[samples.run(1, tail=2), samples.run(2, tail=1)], events=rows)

    def found(upto: int, limit: int, size: int) -> tuple[list[bytes], int]:
        rows, bound = mixing.merged(db, blobs, [(1, 0), (2, 0)], upto, limit, size)
        return [row.data for row in rows], bound

    one, large = b'{"n":1}', b'"large"'
    assert found(9, 9, 999) == ([one, large, one], 9)
    assert found(2, 9, 999) == ([one, large], 2)
    assert found(9, 2, 999) == ([one, large], 2)
    assert found(9, 9, 14) == ([one, large], 2)
    assert found(9, 9, 13) == ([one], 1)
    assert found(9, 9, 1) == ([one], 1), "the first in any case"
    assert found(0, 9, 999) == ([], 0)
    assert mixing.merged(db, blobs, [], 9, 9, 99) == ([], 9)


def test_any_place_and_any_bounds_lead_through_everything_once(
    writer: Writer, db: sqlite3.Connection, tmp_path: Path, rng: random.Random
) -> None:
    numbers = list(range(1, 30))
    order = [rng.choice(numbers[: rng.choice([1, 3, 29])]) for _ in range(1_500)]
    runs = {
        f"r{no}": samples.run(no, status=rng.choice([ENDED, RunStatus.RUNNING]), tags=("t",))
        for no in numbers
    }
    rows = speak(writer, order, **runs)
    trimmed = {no: rng.randrange(0, 5) for no in numbers}
    for no, count in trimmed.items():
        length = order.count(no)
        writer.remove(SurplusEvents(run=no, keep=max(1, length - count)))
    for _ in range(20):
        start = position = rng.randrange(0, len(order))
        got: list[int] = []
        heads: dict[int, int] = {}
        while position < len(order):
            places, until = mixing.places(db, Mix(tags=("t",)), position, rng.choice([3, 100]))
            heads = {place.no: place.after for place in places}
            horizon = len(order) if until is None else until
            assert horizon > position
            while position < horizon:
                found, position = mixing.merged(
                    db,
                    tmp_path / "blobs",
                    list(heads.items()),
                    horizon,
                    rng.choice([1, 7, 500]),
                    rng.choice([1, 300, 65_536]),
                )
                got += [row.pos for row in found]
                for row in found:
                    heads[row.run] = row.offset
        kept = {pos for (pos,) in db.execute("SELECT pos FROM event")}
        assert got == [row.pos for row in rows if row.pos > start and row.pos in kept]
