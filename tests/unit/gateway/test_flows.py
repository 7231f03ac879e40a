"""The book and runs that belong together: who waits, who is told, who ends with whom, what is bounded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway import flows
from gateway.inputs import MOST_BYTES, Inputs
from gateway.store.rows import Batch, RunRow
from taskkit.errors import InvalidArguments, QueueFull
from taskkit.lifecycle import RunStatus
from taskkit.wire.messages import Cancel, Finished, Input, RunnerSpec, Start
from tests.unit.gateway.test_book_crashes import Tree


def perform(tree: Tree, run: RunRow, ending: str = "returned", result: bytes = b"1") -> None:
    """Give a waiting run a fresh runner; it ends there."""
    tree.runner()
    tree.begin(run)
    id, token = tree.place(run)
    tree.say(id, Finished(token=token, ending=ending, result=result))
    tree.round()


def said(tree: Tree, run: RunRow) -> list[tuple[str, dict[str, Any]]]:
    return [(event.type, json.loads(event.data)) for event in tree.store.events.get(run.no, [])]


def parented() -> tuple[Tree, RunRow, str, str, RunRow]:
    """Return a tree with a parent under way, its runner and token, and a child that waits."""
    tree = Tree()
    id = tree.runner()
    parent = tree.accept()
    tree.begin(parent)
    child = tree.accept(parent=parent.id)
    tree.round()
    return tree, parent, id, tree.place(parent)[1], child


def test_a_parents_stream_tells_of_a_child_and_its_attempt_hears_the_end() -> None:
    tree, parent, id, token, child = parented()
    perform(tree, child, result=b'{"n":1}')
    assert [type for type, _ in said(tree, parent)] == [
        *("run.started", "run.child.submitted", "run.child.started", "run.child.ended")
    ]
    last = said(tree, parent)[-1][1]
    assert (last["child"], last["status"]) == (child.id, "SUCCESSFUL")
    assert last["children"] == {"total": 1, "ended": 1, "failed": 0}
    (order,) = [order for to, order in tree.orders if to == id and isinstance(order, Input)]
    assert (order.token, order.name) == (token, f"ended/{child.id}")
    assert json.loads(order.data) == {
        "run": child.id,
        "task": "t.f",
        "status": "SUCCESSFUL",
        "result": {"n": 1},
    }


def test_a_gateway_that_takes_over_repeats_what_a_parent_may_not_have_heard_and_tells_nobody_twice() -> None:
    tree, parent, id, _, child = parented()
    perform(tree, child)
    after = Tree(tree.store, (id,))
    after.book.runner_up(RunnerSpec(id=id), 1, 0.0, adopted=True)
    after.round()
    assert [order.name for _, order in after.orders if isinstance(order, Input)] == [f"ended/{child.id}"]
    assert [type for type, _ in said(after, parent)].count("run.child.ended") == 1


def test_children_of_an_ended_parent_go_on_in_silence() -> None:
    tree, parent, id, token, child = parented()
    tree.say(id, Finished(token=token, ending="returned"))
    tree.round()
    perform(tree, child)
    assert child.status is RunStatus.SUCCESSFUL
    assert said(tree, parent)[-1][0] == "stream.end"


def test_a_cancellation_reaches_every_generation() -> None:
    tree, parent, id, token, child = parented()
    grandchild = tree.accept(parent=child.id)
    other = tree.runner()
    tree.begin(child)
    tree.book.cancel(parent, 3.0, 1.0)
    tree.round()
    assert {order.token for _, order in tree.orders if isinstance(order, Cancel)} == {
        token,
        tree.place(child)[1],
    }
    assert grandchild.status is RunStatus.CANCELLED
    late = tree.accept(parent=parent.id)
    assert late.status is RunStatus.CANCELLED
    for runner, one in ((id, parent), (other, child)):
        tree.say(runner, Finished(token=tree.place(one)[1], ending="cancelled"))
    tree.round()
    assert tree.accept(parent=parent.id, relatives={parent.id: parent}).status is RunStatus.CANCELLED


def test_a_run_waits_for_all_that_it_comes_after_and_begins_with_their_results() -> None:
    tree = Tree()
    first, second = tree.accept(), tree.accept()
    last = tree.accept(after=(second.id, first.id))
    assert tree.book.waiting == 3
    perform(tree, first, result=b"1")
    assert tree.book.flows.holds(last.no)
    perform(tree, second, result=b"2")
    tree.runner()
    tree.round()
    (start,) = [order for _, order in tree.orders if isinstance(order, Start)]
    assert [told["result"] for told in json.loads(start.after)] == [2, 1]


def test_who_has_ended_before_counts_as_what_has_become_of_it() -> None:
    tree = Tree()
    good, bad = tree.accept(), tree.accept()
    perform(tree, good, result=b"7")
    perform(tree, bad, "raised")
    ready = tree.accept(after=(good.id,), relatives={good.id: good})
    assert tree.book.queues.waits_for(ready.no)
    for order in ((good, bad), (bad, good)):
        run = tree.accept(after=tuple(one.id for one in order), relatives={one.id: one for one in order})
        tree.round()
        assert run.status is RunStatus.FAILED
        assert said(tree, run)[-1][1]["error"]["code"] == "dependency_failed"


@pytest.mark.parametrize(("ending", "status"), [("raised", "FAILED"), ("cancelled", "CANCELLED")])
def test_a_chain_of_thousands_ends_in_one_round(ending: str, status: str) -> None:
    tree = Tree()
    runs = [tree.accept()]
    for _ in range(3_000):
        runs.append(tree.accept(after=(runs[-1].id,)))
    tree.round()
    perform(tree, runs[0], ending)
    assert {run.status.value for run in runs} == {status}
    assert len(tree.book.flows) == 0
    assert not tree.book.runs


def test_a_run_that_waits_can_expire_and_takes_those_behind_it_along() -> None:
    tree = Tree()
    first = tree.accept()
    second = tree.accept(after=(first.id,), schedule_timeout=5.0)
    third = tree.accept(after=(second.id,))
    tree.round(1e10)
    assert (second.status, third.status) == (RunStatus.FAILED, RunStatus.FAILED)
    assert said(tree, second)[-1][1]["error"]["code"] == "expired"
    assert first.status is RunStatus.READY


def test_what_was_refused_is_told_once_and_is_no_reason_to_wait() -> None:
    tree, parent, _, _, _ = parented()
    for _ in range(2):
        tree.book.refuse("a-child", "t.g", parent.id, "invalid-arguments", "no", 1.0)
        tree.round()
    assert tree.book.flows.is_hopeless(["a-child"])
    last = [data for type, data in said(tree, parent) if type == "run.child.ended"]
    assert len(last) == 1
    assert last[0]["error"] == {"code": "invalid-arguments", "message": "no"}
    assert last[0]["children"] == {"total": 2, "ended": 1, "failed": 1}
    tree.book.refuse("nobody's", "t.g", "", "invalid-arguments", "no", 1.0)


# --- bounds


def test_a_run_has_so_many_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MOST_CHILDREN", 2)
    tree, parent, _, _, _ = parented()
    tree.book.flows.check(parent, (), "another")
    tree.accept(parent=parent.id)
    with pytest.raises(InvalidArguments, match="2 children at most"):
        tree.book.flows.check(parent, (), "another")
    for no in range(9):
        tree.book.refuse(f"refused-{no}", "t.g", parent.id, "invalid-arguments", "no", 1.0)
    assert parent.children == 4


def test_so_many_ties_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MOST_TIES", 3)
    tree = Tree()
    first = tree.accept()
    waiting = tree.accept(after=(first.id,))
    tree.book.flows.check(None, ["a", "b"], "x")
    with pytest.raises(QueueFull):
        tree.book.flows.check(None, ["a", "b", "c"], "x")
    tree.book.cancel(waiting, 0.0, 1.0)
    tree.book.flows.check(None, ["a", "b", "c"], "x")


def test_refusals_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "_REFUSED", 2)
    tree = Tree()
    for id in "abc":
        tree.book.refuse(id, "t", "", "unknown-task", "no", 1.0)
    assert not tree.book.flows.is_hopeless(["a"])
    assert tree.book.flows.is_hopeless(["b", "c"])


def test_a_result_for_which_there_is_no_room_is_left_out() -> None:
    tree, parent, _, _, child = parented()
    tree.book.input(parent, "x", b"x" * (MOST_BYTES - 10), "", 1.0)
    perform(tree, child, result=b'"of eleven"')
    (heard,) = [row for row in tree.store.inputs[parent.no] if row.name == f"ended/{child.id}"]
    assert json.loads(heard.data) == {"run": child.id, "task": "t.f", "status": "SUCCESSFUL"}


def test_ends_take_no_room_of_what_clients_may_say() -> None:
    inputs, batch = Inputs([]), Batch()
    for no in range(1_000):
        assert inputs.tell(7, f"ended/{no}", b"{}", 1.0, batch) is not None
    assert inputs.tell(7, "ended/1", b"{}", 1.0, batch) is None
    for _ in range(1_000):
        inputs.add(7, "a", b"{}", "", 1.0, batch)
    with pytest.raises(QueueFull):
        inputs.add(7, "a", b"{}", "", 1.0, batch)
    assert [row.number for row in inputs.of(7)] == list(range(1, 2_001))
    again = Inputs(batch.inputs)
    assert again.has_heard(7, "ended/1")
