"""One batch is one transaction: all of it or nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway.store import reads
from gateway.store.rows import Batch
from gateway.store.writer import GAP, Checkpoint, WalGauge, Writer, checkpoint, connect, prepare
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.store import samples
from tests.unit.gateway.store.samples import write

_TABLES = ("run", "attempt", "event", "output", "source", "ending", "idempotency")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite3"


@pytest.fixture
def writer(path: Path) -> Iterator[Writer]:
    with closing(Writer(path, boot_id="boot-1", durability="process")) as writer:
        yield writer


def _content(writer: Writer) -> dict[str, list[tuple[Any, ...]]]:
    return {table: writer.connection.execute(f"SELECT * FROM {table}").fetchall() for table in _TABLES}


def _pragma(writer: Writer, name: str) -> Any:
    return writer.connection.execute(f"PRAGMA {name}").fetchall()[0][0]


def _die(writer: Writer) -> None:
    """End the connection as a SIGKILL does: without `close`."""
    writer.connection.close()


def test_the_file_is_private_to_its_user(writer: Writer, path: Path) -> None:
    write(writer, runs=[samples.run(1)])
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_a_full_batch_waits_for_the_disk_another_does_not(writer: Writer) -> None:
    write(writer, runs=[samples.run(1)], full=True)
    assert _pragma(writer, "synchronous") == 2
    write(writer, sources={"r1": 1})
    assert _pragma(writer, "synchronous") == 1
    write(writer, sources={"r1": 2}, full=True)
    assert _pragma(writer, "synchronous") == 2


def test_durability_power_waits_for_the_disk_always(path: Path) -> None:
    with closing(Writer(path, boot_id="boot-1", durability="power")) as writer:
        write(writer, sources={"r1": 1})
        assert _pragma(writer, "synchronous") == 2


def test_a_second_end_of_a_run_is_refused_whole(writer: Writer) -> None:
    write(writer, runs=[samples.run(1)], events=[samples.event(1, 1, 1)], ends=[1])
    before = _content(writer)
    with pytest.raises(sqlite3.IntegrityError):
        write(writer, events=[samples.event(2, 1, 2)], sources={"r1": 2}, ends=[1])
    assert _content(writer) == before


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_events_are_stored_as_they_are_however_many_come(writer: Writer, path: Path, count: int) -> None:
    row = samples.run(1)
    blobs = {3: samples.BLOB, 40: samples.BLOB}
    told = [samples.event(n, 1, n, b'{"n":%d}' % n, blobs.get(n)) for n in range(1, count + 1)]
    row.tail = count
    write(writer, runs=[row], events=told)
    stored = [tuple(event) if event.blob is None else tuple(event._replace(data=b"")) for event in told]
    assert _content(writer)["event"] == stored


def test_an_event_in_the_middle_that_was_stored_before_undoes_the_batch(writer: Writer) -> None:
    write(writer, runs=[samples.run(1)], events=[samples.event(1, 1, 50)])
    before = _content(writer)
    with pytest.raises(sqlite3.IntegrityError):
        write(writer, events=[samples.event(1 + n, 1, n) for n in range(1, 80)])
    assert _content(writer) == before


def test_a_run_that_only_speaks_keeps_what_else_is_stored_of_it(writer: Writer) -> None:
    row = samples.run(1)
    write(writer, runs=[row])
    row.tail, row.lines, row.progress, row.version = 3, 2, b"{}", 9
    write(writer, spoken={1: row})
    found = writer.connection.execute("SELECT tail, lines, progress, version FROM run").fetchall()
    assert found == [(3, 2, b"{}", 1)]
    write(writer, spoken={1: row}, changed={1: row})
    assert writer.connection.execute("SELECT version FROM run").fetchall() == [(9,)]


@pytest.mark.parametrize(
    "bad",
    [
        {"runs": [samples.run(1)]},
        {"runs": [samples.run(2, id="run-1")]},
        {"runs": [samples.run(2, row_key="demo.example:1")]},
        {"attempts": [samples.attempt(1)]},
        {"events": [samples.event(2, 1, 1)]},
        {"events": [samples.event(1, 1, 2)]},
        {"outputs": [samples.output(1, 1)]},
        {"keys": [samples.key("k")]},
    ],
    ids=["no", "id", "open row", "attempt", "offset", "pos", "line", "key"],
)
def test_nothing_is_stored_twice(writer: Writer, bad: dict[str, Any]) -> None:
    write(
        writer,
        runs=[samples.run(1, row_key="demo.example:1")],
        attempts=[samples.attempt(1)],
        events=[samples.event(1, 1, 1)],
        outputs=[samples.output(1, 1)],
        keys=[samples.key("k")],
    )
    before = _content(writer)
    with pytest.raises(sqlite3.IntegrityError):
        write(writer, **bad)
    assert _content(writer) == before


def test_a_change_of_what_does_not_exist_is_a_bug_that_shows(writer: Writer) -> None:
    with pytest.raises(LookupError, match="0 of 1 rows"):
        write(writer, changed={7: samples.run(7)}, sources={"r1": 1})
    with pytest.raises(LookupError, match="0 of 1 rows"):
        write(writer, changed_attempts=[samples.attempt(7)], sources={"r1": 1})
    assert _content(writer)["source"] == []


def test_a_row_gets_its_next_run_in_the_batch_that_ends_the_last(writer: Writer) -> None:
    old = samples.run(1, row_key="demo.example:1")
    write(writer, runs=[old])
    old.status = RunStatus.SUCCESSFUL
    write(writer, changed={1: old}, ends=[1], runs=[samples.run(2, row_key="demo.example:1")])
    assert list(reads.opened(writer.connection).runs) == [2]


def test_a_new_run_is_stored_as_it_is_at_the_commit(writer: Writer) -> None:
    run = samples.run(1)
    batch = Batch(runs=[run], changed={1: run})
    run.status, run.tail = RunStatus.RUNNING, 3
    prepared = prepare(batch)
    run.tail = 9
    writer.commit(prepared)
    stored = reads.run(writer.connection, "run-1")
    assert stored is not None
    assert (stored.status, stored.tail) == (RunStatus.RUNNING, 3)


def test_told_never_goes_back(writer: Writer) -> None:
    write(writer, runs=[samples.run(1, version=5, told=0)])
    write(writer, told={1: 4})
    write(writer, told={1: 2, 99: 1})
    assert writer.connection.execute("SELECT told FROM run").fetchall() == [(4,)]


def test_a_drained_runner_leaves_no_source(writer: Writer) -> None:
    write(writer, sources={"r1": 5, "r2": 1})
    write(writer, sources={"r1": 6}, forgotten=["r1", "never-seen"])
    assert _content(writer)["source"] == [("r2", 1)]


def test_the_data_of_a_blob_is_not_stored_twice(writer: Writer) -> None:
    write(writer, events=[samples.event(1, 1, 1, b'{"large":1}', samples.BLOB)])
    assert writer.connection.execute("SELECT data, blob FROM event").fetchall() == [(b"", samples.BLOB)]


def test_numbers_are_not_given_out_again_after_retention(writer: Writer) -> None:
    write(
        writer, runs=[samples.run(1), samples.run(2)], events=[samples.event(1, 1, 1), samples.event(2, 2, 1)]
    )
    writer.connection.execute("DELETE FROM run")
    writer.connection.execute("DELETE FROM event")
    found = reads.opened(writer.connection)
    assert (found.next_no, found.next_pos) == (3, 3)


def test_a_full_disk_writes_nothing_and_can_be_tried_again(writer: Writer) -> None:
    write(writer, runs=[samples.run(1)])
    before = _content(writer)
    writer.connection.execute(f"PRAGMA max_page_count = {_pragma(writer, 'page_count')}")
    events = [samples.event(n, 1, n, b"x" * 3000) for n in range(1, 50)]
    batch = Batch(changed={1: samples.run(1, tail=49)}, events=events, sources={"r1": 49}, ends=[1])
    for _ in range(3):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            writer.commit(prepare(batch))
        assert _content(writer) == before
    writer.connection.execute("PRAGMA max_page_count = 1000000")
    writer.commit(prepare(batch))
    assert len(_content(writer)["event"]) == 49
    assert writer.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_any_error_inside_the_transaction_rolls_back(writer: Writer) -> None:
    with pytest.raises(OverflowError):
        write(writer, sources={"r1": 1}, told={1: 2**63})
    with pytest.raises(UnicodeEncodeError):
        write(writer, sources={"r1": 1}, keys=[samples.key("\ud800")])
    assert _content(writer)["source"] == []
    write(writer, sources={"r1": 1})


class TestEpoch:
    """A power cut may take the newest events of an open run; a new epoch tells cursors of before."""

    def _epochs(self, path: Path, boot_id: str, durability: str = "process") -> list[int]:
        with closing(Writer(path, boot_id=boot_id, durability=durability)) as writer:
            return [
                epoch
                for (epoch,) in writer.connection.execute("SELECT epoch FROM run ORDER BY no").fetchall()
            ]

    def _leave(self, path: Path, durability: str = "process") -> Writer:
        writer = Writer(path, boot_id="boot-1", durability=durability)
        write(writer, runs=[samples.run(1), samples.run(2, status=RunStatus.SUCCESSFUL)])
        return writer

    def test_open_runs_get_a_new_epoch_when_the_machine_went_down_under_them(self, path: Path) -> None:
        _die(self._leave(path))
        assert self._epochs(path, "boot-2") == [1, 0]

    def test_the_same_boot_is_no_new_epoch(self, path: Path) -> None:
        _die(self._leave(path))
        assert self._epochs(path, "boot-1") == [0, 0]

    def test_a_clean_end_is_no_new_epoch(self, path: Path) -> None:
        self._leave(path).close()
        assert self._epochs(path, "boot-2") == [0, 0]

    def test_durability_power_loses_nothing(self, path: Path) -> None:
        _die(self._leave(path, "power"))
        assert self._epochs(path, "boot-2") == [0, 0]


class TestGap:
    """Positions that a lost event may have had are not given out again, and who stands there is known."""

    def _opened(self, path: Path, boot_id: str) -> tuple[int, list[tuple[int, int]]]:
        with closing(Writer(path, boot_id=boot_id, durability="process")) as writer:
            found = reads.opened(writer.connection)
        return found.next_pos, found.gaps

    def test_positions_leap_when_the_machine_went_down(self, path: Path) -> None:
        writer = Writer(path, boot_id="boot-1", durability="process")
        write(writer, runs=[samples.run(1)], events=[samples.event(1, 1, 1), samples.event(2, 1, 2)])
        _die(writer)
        writer = Writer(path, boot_id="boot-2", durability="process")
        found = reads.opened(writer.connection)
        assert (found.next_pos, found.gaps) == (GAP + 3, [(2, GAP + 2)])
        write(writer, events=[samples.event(GAP + 3, 1, 3)])
        _die(writer)
        assert self._opened(path, "boot-3") == (2 * GAP + 4, [(2, GAP + 2), (GAP + 3, 2 * GAP + 3)])

    def test_so_they_do_when_nothing_was_left(self, path: Path) -> None:
        writer = Writer(path, boot_id="boot-1", durability="process")
        write(writer, runs=[samples.run(1)])
        _die(writer)
        assert self._opened(path, "boot-2") == (GAP + 1, [(0, GAP)])

    def test_otherwise_they_go_on(self, path: Path) -> None:
        writer = Writer(path, boot_id="boot-1", durability="process")
        write(writer, runs=[samples.run(1)], events=[samples.event(1, 1, 1)])
        _die(writer)
        assert self._opened(path, "boot-1") == (2, [])


class TestWal:
    """The WAL stays small without a checkpoint in the way of a commit."""

    def test_a_decision_is_made_once_per_growth(self) -> None:
        gauge = WalGauge(passive=4, restart=16)
        seen = [gauge.decide(size) for size in range(20)]
        assert [size for size in range(20) if seen[size] is Checkpoint.PASSIVE] == [4, 8, 12]
        assert [size for size in range(20) if seen[size] is Checkpoint.RESTART] == [16]

    def test_a_wal_that_started_again_is_counted_afresh(self) -> None:
        gauge = WalGauge(passive=4, restart=16)
        none, passive = Checkpoint.NONE, Checkpoint.PASSIVE
        assert [gauge.decide(size) for size in (5, 1, 4, 5)] == [passive, none, passive, none]

    def test_a_commit_never_checkpoints_by_itself(self, writer: Writer) -> None:
        for n in range(1, 12):
            write(writer, events=[samples.event(n, 1, n, b"x" * 500_000)])
        assert writer.wal_size() > 5_000_000

    def test_the_size_is_what_is_in_use(self, writer: Writer, path: Path) -> None:
        write(writer, events=[samples.event(1, 1, 1, b"x" * 1_000_000)])
        assert writer.wal_size() > 1_000_000
        with closing(connect(path)) as beside:
            beside.execute("SELECT count(*) FROM event").fetchall()
            assert checkpoint(beside)
        write(writer, sources={"r1": 1})
        assert writer.wal_size() < 100_000

    def test_restart_starts_the_wal_again(self, writer: Writer) -> None:
        write(writer, events=[samples.event(1, 1, 1, b"x" * 1_000_000)])
        assert writer.restart_wal()
        write(writer, sources={"r1": 1})
        assert writer.wal_size() < 100_000

    def test_a_reader_inside_a_snapshot_delays_it(self, writer: Writer, path: Path) -> None:
        writer.connection.execute("PRAGMA busy_timeout = 10")
        write(writer, sources={"r1": 1})
        with closing(connect(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM source").fetchall()
            write(writer, sources={"r1": 2})
            assert not writer.restart_wal()
            reader.execute("COMMIT")
            assert writer.restart_wal()

    def test_a_clean_end_leaves_one_file(self, path: Path) -> None:
        with closing(Writer(path, boot_id="boot-1", durability="process")) as writer:
            write(writer, sources={"r1": 1})
        assert [file.name for file in path.parent.iterdir()] == ["store.sqlite3"]


@pytest.mark.parametrize("suffix", ["", "-wal"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_nothing_is_written_into_files_that_have_gone(
    writer: Writer, path: Path, suffix: str, how: str
) -> None:
    """Their descriptors still work, so SQLite would commit, and all of it would end with this process."""
    write(writer, runs=[samples.run(1)])
    file = path.with_name(path.name + suffix)
    kept = file.rename(file.with_name("kept"))
    if how == "replaced":
        file.touch()
    with pytest.raises(sqlite3.OperationalError, match="removed or replaced"):
        write(writer, runs=[samples.run(2)])
    kept.rename(file)
    write(writer, runs=[samples.run(2)])
    assert {row[0] for row in writer.connection.execute("SELECT no FROM run")} == {1, 2}
