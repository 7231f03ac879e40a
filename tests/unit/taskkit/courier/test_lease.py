"""Nodes that share a database: leases, claims, what becomes of a dead node's runs, fences."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from taskkit.identifiers import new_run_id
from taskkit.wire.messages import (
    Company,
    Disown,
    Disowned,
    Locate,
    Located,
    Row,
    Submit,
    Submitted,
    Told,
    Transition,
)
from tests.unit.taskkit.courier.harness import PATIENCE, Tree

pytestmark = pytest.mark.usefixtures("django_project")


class Clock:
    """Monotonic seconds, as the test wants them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lease(name: str, clock: Clock, seconds: float = 15.0) -> Any:
    from taskkit.courier.lease import Lease
    from taskkit.courier.node import NodeIdentity

    return Lease("default", NodeIdentity(name, "", f"http://{name}"), seconds, clock)


def node(name: str, expires_in: float, **fields: Any) -> None:
    """Make another node's row, as the database's clock has it."""
    from django.db.models.functions import Now

    from taskkit.models import Node

    values = {"poke_address": "", "pid": 1, "seen_at": Now(), **fields}
    Node.objects.filter(name=name).delete()
    Node.objects.bulk_create([Node(name=name, expires_at=Now() + timedelta(seconds=expires_in), **values)])


def submitted(**fields: Any) -> str:
    """Submit, and give the run the fields that a node would have."""
    from taskkit.models import Run
    from taskkit.outbox import submit

    id = submit("proj.add", [1, 2], priority=3, max_attempts=4, tags=["t"], subject="ann").id
    if fields:
        Run.objects.filter(id=id).update(**fields)
    return id


def accepted(**fields: Any) -> str:
    """Submit, and have a node take it from the outbox."""
    from taskkit.models import Outbox

    id = submitted(**{"node": "n1", "fence": "f1", "version": 5, **fields})
    Outbox.objects.filter(id=id).delete()
    return id


def run_of(id: str) -> Any:
    from taskkit.models import Run

    return Run.objects.get(id=id)


def read(name: str, *, claims: bool = True, limit: int = 9) -> list[Submit]:
    from taskkit.courier import outbox_reader

    found, refusals = outbox_reader.read("default", (), limit, outbox_reader.Claimant(name, claims))
    assert refusals == []
    return found


def eventually(holds: Any) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return found


# --- leases


def test_a_lease_is_renewed_as_long_as_it_holds_in_the_databases_time() -> None:
    from taskkit.models import Node

    clock = Clock()
    mine = lease("n1", clock)
    mine.renew()
    first = Node.objects.get().expires_at
    mine.renew()
    assert Node.objects.get().expires_at >= first
    assert Node.objects.get().url == "http://n1"
    assert not mine.shared
    assert not mine.claims, "alone on SQLite"
    assert mine.next == clock.now + 30.0


def test_who_is_not_alone_renews_sooner_and_claims() -> None:
    from django.utils import timezone

    from taskkit.models import Node

    node("n2", 10.0)
    clock = Clock()
    mine = lease("n1", clock)
    mine.renew()
    assert mine.shared
    assert mine.claims
    assert mine.next == clock.now, "as short as the others expect it, at once"
    mine.renew()
    assert mine.next == clock.now + 15.0 / 4
    left = Node.objects.get(name="n1").expires_at - timezone.now()
    assert timedelta(seconds=13) < left < timedelta(seconds=16)


def test_nobody_judges_before_he_has_kept_his_own_lease_for_as_long() -> None:
    node("n2", -1.0)
    id = accepted(node="n2")
    clock = Clock()
    mine = lease("n1", clock)
    assert not mine.renew()
    clock.now += 14.0
    assert not mine.renew()
    node("n1", -1.0)  # it was away
    assert not mine.renew()
    clock.now += 14.0
    assert not mine.renew()
    assert run_of(id).node == "n2"
    clock.now += 1.0
    assert mine.renew()
    assert run_of(id).node == ""


def test_a_node_that_lives_is_left_alone() -> None:
    node("n2", 60.0)
    id = accepted(node="n2")
    clock = Clock()
    mine = lease("n1", clock)
    mine.renew()
    clock.now += 60.0
    assert not mine.renew()
    assert run_of(id).node == "n2"


def test_a_name_is_kept_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from taskkit.courier.node import NodeIdentity

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as poke:
        monkeypatch.setattr(socket, "gethostname", lambda: "first")
        name = NodeIdentity.of(poke, str(tmp_path)).name
        assert name.startswith("first-")
        monkeypatch.setattr(socket, "gethostname", lambda: "second")
        assert NodeIdentity.of(poke, str(tmp_path)).name == name
        assert NodeIdentity.of(poke, "/nowhere/at/all").name.startswith("second-")


# --- claims


def test_what_is_nobodys_is_claimed_by_one() -> None:
    ids = [submitted() for _ in range(3)]
    mine = read("n1", limit=2)
    assert [one.id for one in mine] == ids[:2]
    assert len({one.fence for one in mine}) == 1
    assert all(one.fence for one in mine)
    assert [one.id for one in read("n2")] == ids[2:]
    again = read("n1")
    assert [(one.id, one.fence) for one in again] == [(one.id, one.fence) for one in mine], (
        "its own, as before"
    )
    assert [run_of(id).node for id in ids] == ["n1", "n1", "n2"]


def test_a_claim_that_another_made_in_between_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.courier import outbox_reader
    from taskkit.models import Run

    ids = [submitted() for _ in range(2)]
    make = outbox_reader.new_token

    def late() -> str:
        Run.objects.filter(id=ids[0]).update(node="n2", fence="theirs")
        return make()

    monkeypatch.setattr(outbox_reader, "new_token", late)
    assert [one.id for one in read("n1")] == ids[1:]
    assert run_of(ids[0]).fence == "theirs"


def test_alone_nothing_is_written_to_take_a_submission() -> None:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    id = submitted()
    with CaptureQueriesContext(connection) as queries:
        assert [(one.id, one.fence) for one in read("n1", claims=False)] == [(id, "")]
    assert [query["sql"].split()[0] for query in queries] == ["SELECT"]
    assert run_of(id).node == ""


def test_one_that_found_no_room_is_left_to_others() -> None:
    from taskkit.courier import outbox_reader

    submitted()
    (mine,) = read("n1")
    for code, owner in (("not-writable", "n1"), ("queue-full", "")):
        answer = Submitted(id=mine.id, code=code, fence=mine.fence)
        outbox_reader.postpone("default", answer, release=True)
        assert run_of(mine.id).node == owner, "unless it may be there already"
    (theirs,) = read("n2")
    assert theirs.fence != mine.fence


def related(**fields: Any) -> str:
    """Insert a submission that belongs to others."""
    from taskkit.outbox import insert_rows

    id = new_run_id()
    insert_rows(Submit(id=id, task="proj.add", **fields))
    return id


def test_what_belongs_to_a_run_of_another_node_goes_there() -> None:
    node("n2", 60.0)
    node("dead", -1.0)
    theirs, gone = accepted(node="n2"), accepted(node="dead")
    child, after, lone = related(parent=theirs), related(after=[gone, theirs]), related(parent=gone)
    assert [one.id for one in read("n1")] == [lone]
    assert {one.id for one in read("n2")} == {child, after}
    assert {run_of(id).node for id in (child, after)} == {"n2"}


def test_who_takes_one_of_a_chain_takes_what_it_waits_for() -> None:
    from taskkit.models import Outbox

    first = submitted()
    second = related(after=[first])
    third = related(after=[second])
    Outbox.objects.filter(id__in=[first, second]).update(state="refused")  # not seen at this look
    assert [one.id for one in read("n1")] == [third]
    Outbox.objects.update(state="pending")
    assert read("n2") == []
    assert {run_of(id).node for id in (first, second, third)} == {"n1"}


# --- taking over


def test_a_dead_nodes_run_goes_back_with_what_is_known_of_it() -> None:
    from taskkit.courier import takeover
    from taskkit.models import Outbox, Takeover

    errors = [{"code": "lost", "attempt": 1}, {"code": "crashed", "attempt": 2}]
    id = accepted(status="RUNNING", attempt=3, errors=errors, worker_ids=["a", "b", "c"], moves=1)
    waits = accepted(status="READY", version=1)
    over = accepted(status="SUCCESSFUL")
    elsewhere = accepted(node="n2")
    unknown = accepted(options=None)
    node("n1", -1.0)
    assert takeover.owners("default", ["n1", "n3"]) == ["n1"]
    assert takeover.put_back("default", "n1") == 2
    assert takeover.put_back("default", "n1") == 0
    run = run_of(id)
    assert (run.node, run.status, run.moves, run.version) == ("", "READY", 2, 5)
    assert run.fence not in ("", "f1")
    assert [run_of(one).node for one in (over, elsewhere, unknown)] == ["n1", "n2", "n1"]
    assert {(str(note.run), note.node, note.fence) for note in Takeover.objects.all()} == {
        (id, "n1", "f1"),
        (waits, "n1", "f1"),
    }
    assert Outbox.objects.count() == 2
    (again, later) = read("n2")
    assert (again.id, again.task, again.args, again.priority, again.max_attempts) == (
        id,
        "proj.add",
        [1, 2],
        3,
        4,
    )
    assert (again.tags, again.subject, again.fence) == (["t"], "ann", run_of(id).fence)
    assert again.taken is not None
    assert (again.taken.node, again.taken.moves, again.taken.version, again.taken.attempt) == ("n1", 2, 5, 3)
    assert (again.taken.counted, again.taken.crashes, again.taken.began, again.taken.runner) == (
        1,
        1,
        True,
        "c",
    )
    assert later.taken is not None
    assert (later.taken.began, later.taken.counted, later.taken.version) == (False, 0, 1)


def test_one_that_was_claimed_and_not_accepted_goes_back_as_well() -> None:
    from taskkit.courier import takeover

    id = submitted()
    (mine,) = read("n1")
    node("n1", -1.0)
    assert takeover.put_back("default", "n1") == 1
    (theirs,) = read("n2")
    assert (theirs.id, mine.id) == (id, id)
    assert theirs.fence != mine.fence
    assert theirs.taken is not None
    assert not theirs.taken.began


def test_what_its_former_node_says_is_void() -> None:
    from taskkit.courier import projection, takeover
    from taskkit.models import Outbox

    plain = accepted(status="RUNNING")
    failed = accepted(status="RUNNING")
    unsettled = submitted()
    (late,) = read("n1")
    node("n1", -1.0)
    takeover.put_back("default", "n1")

    def ends(run: str, fence: str, **fields: Any) -> Transition:
        return Transition(run=run, version=99, task="proj.add", status="SUCCESSFUL", fence=fence, **fields)

    old = [ends(plain, "f1"), ends(failed, "f1", failure=b'{"code":"x"}'), ends(unsettled, late.fence)]
    projection.write("default", old, "n1")
    projection.settle("default", [Submitted(id=late.id, run=late.id, fence=late.fence)])
    projection.settle("default", [Submitted(id=late.id, code="unknown-task", fence=late.fence)])
    assert {run_of(id).status for id in (plain, failed, unsettled)} == {"READY"}
    assert Outbox.objects.filter(state="pending").count() == 3
    new = {one.id: one.fence for one in read("n2")}
    projection.write("default", old, "n1")
    assert {run_of(id).status for id in new} == {"READY"}
    projection.write("default", [ends(plain, new[plain]), ends(failed, new[failed], attempt=2)], "n2")
    assert [run_of(id).status for id in (plain, failed, unsettled)] == ["SUCCESSFUL", "SUCCESSFUL", "READY"]
    projection.settle("default", [Submitted(id=id, run=id, fence=fence) for id, fence in new.items()])
    assert Outbox.objects.count() == 0


def test_a_takeover_that_nobody_can_perform_has_failed() -> None:
    from taskkit.courier import projection, takeover

    id = accepted(status="RUNNING")
    node("n1", -1.0)
    takeover.put_back("default", "n1")
    (mine,) = read("n2")
    projection.settle("default", [Submitted(id=id, code="unknown-task", error="none", fence=mine.fence)])
    assert (run_of(id).status, run_of(id).error["code"]) == ("FAILED", "unknown-task")


def test_a_run_that_http_brought_can_be_taken_over_too() -> None:
    from taskkit.courier import projection, takeover

    plain, bad = new_run_id(), new_run_id()
    options = b'{"pool":"default","max_attempts":2,"subject":"bob"}'
    told = {"version": 1, "task": "proj.add", "fence": "f1", "options": options, "created_at": 1e9}
    first = Transition(run=plain, status="RUNNING", args=b"[1,2]", attempt=1, runner="r", **told)
    second = Transition(run=bad, status="READY", args=b"[3,4]", error=b'{"code":"x"}', **told)
    projection.write("default", [first, second], "n1")
    assert {run_of(id).node for id in (plain, bad)} == {"n1"}
    node("n1", -1.0)
    assert takeover.put_back("default", "n1") == 2
    found = {one.id: one for one in read("n2")}
    assert (found[plain].args, found[plain].max_attempts, found[plain].subject) == ([1, 2], 2, "bob")
    assert found[bad].args == [3, 4]


def test_another_nodes_run_keeps_its_row() -> None:
    from taskkit.courier import projection

    row = Row(app="proj", model="Row", pk=1)
    first, second = new_run_id(), new_run_id()
    for id, owner in ((first, "n1"), (second, "n2")):
        told = Transition(
            run=id, version=1, task="proj.Row", status="READY", row=row, created_at=1e9, fence=owner
        )
        projection.write("default", [told], owner)
    assert [(run_of(id).status, run_of(id).row_key) for id in (first, second)] == [
        ("READY", row.key),
        ("READY", None),
    ]


# --- between courier and gateway


def test_a_node_that_is_back_has_its_copies_forgotten(quiet_tree: Tree) -> None:
    from taskkit.models import Takeover

    name = quiet_tree.start()
    run = new_run_id()
    from django.db.models.functions import Now

    Takeover.objects.bulk_create(
        [Takeover(run=run, node=one, fence="f1", at=Now()) for one in (name, "somebody else")]
    )
    quiet_tree.link()
    assert quiet_tree.expect(Disown) == Disown(run=run, fence="f1")
    quiet_tree.link()
    assert quiet_tree.expect(Disown) == Disown(run=run, fence="f1"), "said again to a new gateway"
    quiet_tree.tell(Disowned(run=run, fence="other"), Disowned(run=run, fence="f1"))
    eventually(lambda: list(Takeover.objects.values_list("node", flat=True)) == ["somebody else"])


def test_the_gateway_hears_of_company_and_where_a_run_is(quiet_tree: Tree) -> None:
    from taskkit.models import Run

    node("n2", 60.0, url="http://n2")
    node("silent", 60.0)
    node("dead", -60.0, url="http://dead")
    ids = {name: accepted(node=name, status="SUCCESSFUL") for name in ("n2", "silent", "dead", "")}
    quiet_tree.start()
    quiet_tree.link()
    assert quiet_tree.expect(Company).shared
    for name in ("n2", "silent", "dead", ""):
        quiet_tree.tell(Locate(ask=name, run=ids[name]))
        answer = quiet_tree.expect(Located)
        wanted = ("found", "http://n2", "proj.add", "ann") if name == "n2" else ("unknown", "", "", "")
        assert (answer.ask, answer.status, answer.url, answer.task, answer.subject) == (name, *wanted)
    Run.objects.all().delete()
    quiet_tree.tell(Locate(ask="x", run=ids["n2"]))
    assert quiet_tree.expect(Located).status == "unknown"


def test_what_is_told_of_a_run_says_whose_it_is(linked: Tree) -> None:
    from taskkit.models import Node

    run = submitted()
    assert linked.expect(Submit).fence == ""
    linked.tell(
        Submitted(id=run, run=run, fence="g1"),
        Transition(run=run, version=1, task="proj.add", status="RUNNING", fence="g1", created_at=1e9),
    )
    assert linked.expect(Told).version == 1
    assert (run_of(run).node, run_of(run).fence) == (Node.objects.get().name, "g1")
