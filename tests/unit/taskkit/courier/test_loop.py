"""The courier's loop with real sockets and a real database."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.db import OperationalError, connections

from taskkit import linux, seqpacket
from taskkit.wire import codec
from taskkit.wire.messages import (
    Answer,
    Ask,
    Beat,
    CourierMessage,
    Link,
    Row,
    Submit,
    Submitted,
    Told,
    Transition,
)
from tests.unit.taskkit.courier.harness import PATIENCE, Tree, receive


def _eventually(holds: Callable[[], Any]) -> Any:
    """Return what `holds` returns once it is true; looks every 10 ms, for a commit makes no noise."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := holds():
            return found
        threading.Event().wait(0.01)
    raise AssertionError("it never came true")


def _transition(run: str, version: int = 1, **fields: Any) -> Transition:
    fields = {"task": "proj.echo", "status": "READY", "created_at": 1e9, **fields}
    return Transition(run=run, version=version, **fields)


@contextmanager
def _locked(database: Any) -> Iterator[None]:
    """Keep every other connection from writing."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def test_a_row_becomes_a_submission_and_goes_when_it_is_accepted(linked: Tree) -> None:
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    handle = submit("proj.add", [1, 2], priority=3)
    asked = linked.expect(Submit)
    assert asked == Submit(id=handle.id, task="proj.add", args=[1, 2], priority=3)
    linked.tell(Submitted(id=asked.id, run=asked.id))
    _eventually(lambda: not Outbox.objects.exists())
    assert handle.run().status == "READY"


def test_a_poke_is_faster_than_the_poll(linked: Tree) -> None:
    from taskkit.courier import database
    from taskkit.outbox import submit

    delays = []
    for _ in range(9):
        submitted = submit("proj.echo")
        at = time.monotonic()
        assert linked.expect(Submit).id == submitted.id
        delays.append(time.monotonic() - at)
    assert statistics.median(delays) < database.POLL / 4


def test_a_row_of_another_connection_is_found_without_a_poke(linked: Tree) -> None:
    from taskkit.models import Node
    from taskkit.outbox import submit

    Node.objects.update(poke_address=str(linked.directory / "nobody"))
    handle = submit("proj.echo")
    assert linked.expect(Submit).id == handle.id


def test_rows_that_waited_for_a_courier_are_sent_in_order(quiet_tree: Tree) -> None:
    from taskkit.outbox import submit

    handles = [submit("proj.echo", [number]).id for number in range(5)]
    quiet_tree.start()
    quiet_tree.link()
    assert {quiet_tree.expect(Submit).id for _ in handles} == set(handles)


def test_at_most_a_window_is_unanswered_and_all_arrive_once(linked: Tree) -> None:
    from django.db import transaction

    from taskkit.courier import database
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    with transaction.atomic():
        wanted = {submit("proj.echo").id for _ in range(database.WINDOW + 20)}
    first = [linked.expect(Submit).id for _ in range(database.WINDOW)]
    linked.expect_silence(1.5)
    linked.tell(*(Submitted(id=id_, run=id_) for id_ in first))
    rest = [linked.expect(Submit).id for _ in range(20)]
    assert sorted(first + rest) == sorted(wanted)
    linked.tell(*(Submitted(id=id_, run=id_) for id_ in rest))
    _eventually(lambda: not Outbox.objects.exists())


def test_a_new_gateway_is_asked_what_the_old_one_did_not_answer(linked: Tree) -> None:
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    assert linked.expect(Submit).id == handle.id
    linked.link()
    assert linked.expect(Submit).id == handle.id


def test_a_refused_submission_fails_its_run_and_stays_for_people(linked: Tree) -> None:
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    handle = submit("proj.echo")  # known here; the tree may have older code
    linked.expect(Submit)
    linked.tell(Submitted(id=handle.id, code="unknown-task", error="no task proj.nothing\0"))
    entry = _eventually(lambda: Outbox.objects.filter(state="refused").first())
    assert entry.error == "no task proj.nothing\ufffd"
    run = handle.run()
    assert (run.status, run.error["code"]) == ("FAILED", "unknown-task")
    assert run.finished_at is not None


def test_a_submission_that_is_put_off_is_tried_again(linked: Tree) -> None:
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    linked.expect(Submit)
    linked.tell(Submitted(id=handle.id, code="queue-full", error="10000 runs wait"))
    assert linked.expect(Submit).id == handle.id
    entry = Outbox.objects.get()
    assert (entry.state, entry.attempts, entry.error) == ("pending", 1, "10000 runs wait")


def test_a_malformed_entry_is_refused_and_others_pass(linked: Tree) -> None:
    from django.utils import timezone

    from taskkit.identifiers import new_run_id
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    for payload in ([], {"task": 5}, {"task": "proj.echo", "args": [2**70]}):
        Outbox.objects.create(id=new_run_id(), payload=payload, created_at=timezone.now())
    handle = submit("proj.echo")
    assert linked.expect(Submit).id == handle.id
    _eventually(lambda: Outbox.objects.filter(state="refused").count() == 3)


def test_a_row_that_runs_already_loses_its_submission(linked: Tree) -> None:
    from taskkit.identifiers import new_run_id
    from taskkit.models import Outbox, Run
    from taskkit.outbox import submit
    from tests.project.models import Row as RowModel

    row = RowModel.objects.create(message="x")
    handle = submit(row)
    assert linked.expect(Submit).row == Row(app="proj", model="Row", pk=row.pk)
    other = new_run_id()
    linked.tell(Submitted(id=handle.id, run=other))
    _eventually(lambda: not Outbox.objects.exists())
    assert not Run.objects.exists()


def test_transitions_reach_the_projection_and_are_told(linked: Tree) -> None:
    from taskkit.identifiers import new_run_id
    from taskkit.models import Run

    run = new_run_id()
    linked.tell(_transition(run, args=b"[1]", tags=["a"]))
    assert linked.expect(Told) == Told(run=run, version=1)
    linked.tell(
        _transition(run, 2, status="RUNNING", attempt=1, started_at=1e9 + 1),
        _transition(run, 3, status="SUCCESSFUL", attempt=1, finished_at=1e9 + 2, result=b'{"x": 1}'),
    )
    told = {linked.expect(Told).version}
    if told == {2}:  # the newest one alone, when both were read in one round
        told = {linked.expect(Told).version}
    assert told == {3}
    found = Run.objects.get(id=run)
    assert (found.status, found.version, found.attempt, found.result) == ("SUCCESSFUL", 3, 1, {"x": 1})
    assert found.created_at.timestamp() == 1e9


def test_more_transitions_than_a_batch_are_all_told(linked: Tree) -> None:
    from taskkit.identifiers import new_run_id
    from taskkit.models import Run

    runs = {new_run_id() for _ in range(250)}
    sender = threading.Thread(target=lambda: linked.tell(*(_transition(run) for run in runs)), daemon=True)
    sender.start()
    assert {linked.expect(Told).run for _ in runs} == runs
    sender.join(PATIENCE)
    assert Run.objects.count() == 250


def test_questions_about_rows(linked: Tree) -> None:
    from django.utils import timezone

    from tests.project.models import Row as RowModel

    done = timezone.now()
    row = RowModel.objects.create(message="x", completed_at=done, final_value={"n": 1})
    for app, model, pk in (("proj", "row", str(row.pk)), ("", "ROW", f"0{row.pk}")):
        linked.tell(Ask(ask="1", app=app, model=model, pk=pk))
        assert linked.expect(Answer) == Answer(
            ask="1",
            status="found",
            task="proj.Row",
            row=Row(app="proj", model="Row", pk=row.pk),
            completed_at=done.isoformat(),
            final_value=json.dumps({"n": 1}).encode(),
        )


@pytest.mark.parametrize(
    ("app", "model", "pk", "status"),
    [
        ("proj", "Row", "99", "unknown"),
        ("proj", "Row", "9" * 30, "unknown"),
        ("proj", "Row", "one", "bad_pk"),
        ("proj", "Row", "", "bad_pk"),
        ("proj", "Nothing", "1", "unknown"),
        ("auth", "User", "1", "unknown"),
        ("", "User", "1", "unknown"),
    ],
)
def test_questions_without_an_answer(linked: Tree, app: str, model: str, pk: str, status: str) -> None:
    linked.tell(Ask(ask="q", app=app, model=model, pk=pk))
    answer = linked.expect(Answer)
    assert (answer.ask, answer.status) == ("q", status)


def test_a_row_is_read_fresh(linked: Tree) -> None:
    from tests.project.models import Row as RowModel

    row = RowModel.objects.create(message="x")
    for value in (1, 2):
        RowModel.objects.update(final_value=value)
        linked.tell(Ask(ask="q", app="proj", model="Row", pk=str(row.pk)))
        assert linked.expect(Answer).final_value == str(value).encode()
    row.delete()
    linked.tell(Ask(ask="q", app="proj", model="Row", pk="1"))
    assert linked.expect(Answer).status == "unknown"


def test_a_locked_database_delays_and_loses_nothing(
    quiet_tree: Tree, django_project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit.identifiers import new_run_id
    from taskkit.models import Run

    # Each try waits for the lock as long as the project says; a short wait makes it several tries.
    monkeypatch.setitem(connections.settings["default"]["OPTIONS"], "timeout", 0.05)
    quiet_tree.start()
    quiet_tree.link()
    run = new_run_id()
    with _locked(django_project.database):
        quiet_tree.tell(_transition(run))
        quiet_tree.expect_silence(1.0)
        for _ in range(2):
            assert receive(quiet_tree.control, CourierMessage) == Beat()
    assert quiet_tree.expect(Told) == Told(run=run, version=1)
    assert Run.objects.get().status == "READY"


def test_a_database_that_is_away_is_said_so_and_found_again(
    linked: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db.backends.sqlite3.base import DatabaseWrapper

    from taskkit.identifiers import new_run_id
    from tests.project.models import Row as RowModel

    row = RowModel.objects.create(message="x")
    real = DatabaseWrapper.create_cursor
    test = threading.current_thread()

    def create_cursor(self: Any, name: Any = None) -> Any:
        if threading.current_thread() is not test:
            raise OperationalError("the database went away")
        return real(self, name)

    run = new_run_id()
    with monkeypatch.context() as broken:
        broken.setattr(DatabaseWrapper, "create_cursor", create_cursor)
        linked.tell(Ask(ask="1", app="proj", model="Row", pk=str(row.pk)), _transition(run))
        assert linked.expect(Answer).status == "away"
        linked.expect_silence(0.5)
    assert linked.expect(Told) == Told(run=run, version=1)
    linked.tell(Ask(ask="2", app="proj", model="Row", pk=str(row.pk)))
    assert linked.expect(Answer).status == "found"


@pytest.fixture
def other_database(django_project: Any, tmp_path: Path) -> Iterator[Path]:
    """Give the project a second database, migrated as well, under the alias "other"."""
    path = tmp_path / "other.sqlite3"
    shutil.copyfile(django_project.database, path)
    default = connections.settings["default"]
    connections.settings["other"] = {**default, "NAME": str(path), "OPTIONS": dict(default["OPTIONS"])}
    try:
        yield path
    finally:
        connections["other"].close()
        del connections["other"], connections.settings["other"]


def test_each_database_has_its_outbox_and_its_projection(other_database: Path, quiet_tree: Tree) -> None:
    from taskkit.models import Node, Outbox, Run
    from taskkit.outbox import submit

    quiet_tree.start()
    quiet_tree.link()
    assert Node.objects.using("other").count() == 1
    handle = submit("proj.echo", using="other")
    assert quiet_tree.expect(Submit) == Submit(id=handle.id, task="proj.echo", using="other")
    quiet_tree.tell(Submitted(id=handle.id, run=handle.id), _transition(handle.id, using="other"))
    assert quiet_tree.expect(Told).run == handle.id
    assert handle.run().version == 1
    assert not Outbox.objects.using("other").exists()
    assert not Run.objects.exists()


def test_one_database_that_is_away_does_not_hold_up_another(
    other_database: Path, quiet_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit.identifiers import new_run_id

    monkeypatch.setitem(connections.settings["other"]["OPTIONS"], "timeout", 0.05)
    quiet_tree.start()
    quiet_tree.link()
    here, there = new_run_id(), new_run_id()
    with _locked(other_database):
        quiet_tree.tell(_transition(there, using="other"), _transition(here))
        assert quiet_tree.expect(Told).run == here
    assert quiet_tree.expect(Told).run == there


def test_news_for_an_alias_that_is_gone_go_to_the_default(linked: Tree) -> None:
    from taskkit.identifiers import new_run_id
    from taskkit.models import Run

    run = new_run_id()
    linked.tell(_transition(run, using="gone"))
    assert linked.expect(Told).run == run
    assert Run.objects.count() == 1


def test_missing_tables_are_waited_for(
    quiet_tree: Tree, django_project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskkit.courier import database
    from taskkit.identifiers import new_run_id

    monkeypatch.setattr(database, "MISSING_TABLES", 0.1)
    with connections["default"].cursor() as cursor:
        cursor.execute("ALTER TABLE taskkit_node RENAME TO elsewhere")
    assert quiet_tree.start() == ""
    quiet_tree.link()
    run = new_run_id()
    quiet_tree.tell(_transition(run))
    quiet_tree.expect_silence(0.5)
    with connections["default"].cursor() as cursor:
        cursor.execute("ALTER TABLE elsewhere RENAME TO taskkit_node")
    assert quiet_tree.expect(Told).run == run


def test_it_registers_its_node_and_renews_it(quiet_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.courier import lease
    from taskkit.models import Node

    monkeypatch.setattr(lease, "ALONE", 0.1)
    name = quiet_tree.start()
    node = Node.objects.get()
    assert (node.name, node.poke_address, node.pid) == (name, quiet_tree.poke_path, os.getppid())
    _eventually(lambda: Node.objects.get().seen_at > node.seen_at)
    assert Node.objects.count() == 1


def test_it_beats(linked: Tree) -> None:
    begun = time.monotonic()
    for _ in range(3):
        assert receive(linked.control, CourierMessage) == Beat()
    assert time.monotonic() - begun > 0.9


def test_garbage_from_the_gateway_ends_that_link_only(linked: Tree) -> None:
    assert linked.gateway is not None
    linked.gateway.send(b"\x00garbage")
    with pytest.raises((EOFError, ConnectionError)):
        receive(linked.gateway, Beat)
    linked.link()
    linked.tell(Ask(ask="q", app="", model="nothing", pk="1"))
    assert linked.expect(Answer).status == "unknown"


def test_a_link_without_a_socket_is_the_supervisors_error(linked: Tree) -> None:
    from taskkit.errors import RemoteWireError

    seqpacket.send(linked.control, codec.pack(Link()))
    linked.wait()
    assert isinstance(linked.failure, RemoteWireError)


def test_it_leaves_when_it_is_told_to_stop(linked: Tree) -> None:
    linked.stop()
    assert linked.failure is None


def test_it_leaves_when_the_supervisor_is_gone(linked: Tree) -> None:
    linked.control.close()
    linked.wait()
    assert linked.failure is None


def test_a_gateway_that_does_not_read_stops_neither_beat_nor_others(linked: Tree) -> None:
    """The courier stops reading from that gateway; its memory is bounded, its beat goes on."""
    assert linked.gateway is not None
    linked.gateway.setblocking(False)
    question = codec.pack(Ask(ask="q" * 1000, app="", model="nothing", pk="1"))
    sent = 0
    blocked_since = None
    while blocked_since is None or time.monotonic() - blocked_since < 1.0:
        try:
            seqpacket.send(linked.gateway, question)
            sent, blocked_since = sent + 1, None
        except BlockingIOError:
            blocked_since = blocked_since or time.monotonic()
            threading.Event().wait(0.01)
        assert sent < 100_000, "the courier reads without bound"
    assert receive(linked.control, CourierMessage) == Beat()
    linked.gateway.settimeout(PATIENCE)
    for _ in range(sent):
        assert linked.expect(Answer).status == "unknown"


def test_a_poke_address_that_only_the_binder_can_read_is_spelled_out(tmp_state_dir: Any) -> None:
    from taskkit.courier.node import _address

    assert _address("/proc/self/fd/7/poke.sock", "/deep") == "/deep/poke.sock"
    assert _address(b"\0name", "/deep") == "@name"


def test_descriptors_are_not_left_open(linked: Tree) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    linked.link()
    linked.tell(Ask(ask="q", app="", model="nothing", pk="1"))
    linked.expect(Answer)
    before = count()
    for _ in range(20):
        linked.link()
        linked.tell(Ask(ask="q", app="", model="nothing", pk="1"))
        linked.expect(Answer)
    one, other = linux.seqpacket_pair()
    with one, other:
        assert linked.gateway is not None
        seqpacket.send(linked.gateway, codec.pack(Ask(ask="q", app="", model="x", pk="1")), (one.fileno(),))
        linked.expect(Answer)
    assert count() == before
