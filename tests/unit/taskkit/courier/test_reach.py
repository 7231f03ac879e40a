"""Databases that hang, move or are poked without an end."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connections

from taskkit.wire.messages import Submit, Told, Transition
from tests.conftest import DjangoProject
from tests.unit.taskkit.courier.harness import Tree


def _transition(run: str) -> Transition:
    return Transition(run=run, version=1, task="proj.echo", status="READY", created_at=1e9)


def _runs(database: Path) -> int:
    with closing(sqlite3.connect(database)) as other:
        return int(other.execute("SELECT count(*) FROM taskkit_run").fetchone()[0])


def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.courier import reach

    monkeypatch.setattr(reach, "HANG_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    read, write = os.pipe()
    with pytest.raises(OperationalError, match="'other' hangs"), reach.hang_limit("other"):
        os.read(read, 1)
    os.close(read)
    os.close(write)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_does_not_hang_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.courier import reach

    with reach.hang_limit("other"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_another_thread_has_no_limit() -> None:
    from taskkit.courier import reach

    found: list[Any] = []

    def look() -> None:
        with reach.hang_limit("other"):
            found.append(signal.getitimer(signal.ITIMER_REAL))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(0.0, 0.0)]


@pytest.mark.parametrize(
    ("vendor", "said", "options"),
    [
        ("postgresql", {}, {"connect_timeout": 5}),
        ("mysql", {"connect_timeout": 60}, {"connect_timeout": 60}),
        ("sqlite", {}, {"timeout": 5.0}),
        ("sqlite", {"timeout": 0.1}, {"timeout": 0.1}),
        ("sqlite", {"timeout": 600}, {"timeout": 5.0}),
        ("oracle", {}, {}),
    ],
)
def test_no_wait_is_longer_than_a_courier_may_be_silent(
    django_project: DjangoProject,
    vendor: str,
    said: dict[str, Any],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from taskkit.courier import reach

    one = connections["default"]
    monkeypatch.setattr(type(one), "vendor", vendor)
    monkeypatch.setitem(one.settings_dict, "OPTIONS", dict(said))
    reach.limit_waiting("default")
    assert one.settings_dict["OPTIONS"] == options


def test_a_file_that_was_moved_away_gets_nothing_until_it_is_back(
    linked: Tree, django_project: DjangoProject, tmp_path: Path
) -> None:
    from taskkit.identifiers import new_run_id

    connections.close_all()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in list(tmp_path.glob("project.sqlite3*")):
        path.rename(folder / path.name)
    run = new_run_id()
    linked.tell(_transition(run))
    linked.expect_silence(1.0)
    assert not django_project.database.exists(), "and no new one is made"
    assert _runs(folder / "project.sqlite3") == 0
    for path in list(folder.iterdir()):
        path.rename(tmp_path / path.name)
    assert linked.expect(Told) == Told(run=run, version=1)
    assert _runs(django_project.database) == 1


def test_a_file_that_was_replaced_is_opened_anew(
    quiet_tree: Tree, django_project: DjangoProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with connections that are never closed: a backup was restored over the file."""
    from taskkit.identifiers import new_run_id
    from taskkit.outbox import submit

    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
    quiet_tree.start()
    quiet_tree.link()
    quiet_tree.tell(_transition(new_run_id()))
    quiet_tree.expect(Told)
    connections.close_all()
    old = tmp_path / "old.sqlite3"
    with closing(sqlite3.connect(django_project.database)) as whole:
        whole.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    shutil.copyfile(django_project.database, tmp_path / "copy.sqlite3")
    for path in list(tmp_path.glob("project.sqlite3*")):
        path.rename(tmp_path / path.name.replace("project", "old"))
    (tmp_path / "copy.sqlite3").rename(django_project.database)
    quiet_tree.tell(_transition(new_run_id()))
    quiet_tree.expect(Told)
    assert (_runs(old), _runs(django_project.database)) == (1, 2)
    handle = submit("proj.echo")
    assert quiet_tree.expect(Submit).id == handle.id


def test_a_flood_of_pokes_is_no_flood_of_queries(linked: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.courier import database, outbox_reader
    from taskkit.outbox import submit

    looks: list[float] = []
    look = outbox_reader.data_version

    def counted(using: str) -> int | None:
        looks.append(time.monotonic())
        return look(using)

    monkeypatch.setattr(outbox_reader, "data_version", counted)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        linked.poke()
    assert len(looks) <= 0.5 / database.POKED + 5
    asked = time.monotonic()
    handle = submit("proj.echo")
    assert linked.expect(Submit).id == handle.id
    assert time.monotonic() - asked < database.POLL


def test_a_slow_database_gets_smaller_pieces(
    django_project: DjangoProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit.courier import projection
    from taskkit.courier.database import Away, Database
    from taskkit.courier.node import NodeIdentity
    from taskkit.identifiers import new_run_id

    now = 0.0
    database = Database("default", NodeIdentity("n", ""), lambda: now)
    for _ in range(250):
        database.hold(_transition(new_run_id()), 1)
    sizes: list[int] = []
    write = projection.write

    def slow(using: str, transitions: Any, node: str) -> None:
        sizes.append(len(transitions))
        if len(transitions) > 30:
            raise OperationalError("hangs")
        write(using, transitions, node)

    monkeypatch.setattr(projection, "write", slow)
    while database.held:
        now += 60
        try:
            list(database.work(now, linked=False))
        except Away:
            continue
    assert sizes[:4] == [100, 50, 25, 50]
    assert sum(size for size in sizes if size <= 30) == 250
