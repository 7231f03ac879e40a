"""Open projections of runs that no store knows any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from taskkit.wire.messages import Company, Forgotten, Recall, Told, Transition
from tests.unit.taskkit.courier.harness import PATIENCE, Tree


@pytest.fixture
def asking(quiet_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Give a tree whose courier asks soon after each link, about runs of any age; not started yet."""
    from taskkit.courier import recall

    monkeypatch.setattr(recall, "FIRST", 0.05)
    monkeypatch.setattr(recall, "NEXT", 0.05)
    monkeypatch.setattr(recall, "AGE", 0.0)
    return quiet_tree


def _run(status: str = "RUNNING", version: int = 3, **fields: Any) -> str:
    from django.utils import timezone

    from taskkit.identifiers import new_run_id
    from taskkit.models import Run

    values = {"task": "proj.echo", "created_at": timezone.now() - timedelta(seconds=1), **fields}
    return str(Run.objects.create(id=new_run_id(), status=status, version=version, **values).id)


def _eventually(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def test_a_wiped_store_ends_what_it_left_open(asking: Tree) -> None:
    from taskkit.models import Run

    lost = [_run(row_key="proj.row:1"), _run("READY", version=0)]
    _run("SUCCESSFUL")
    known = _run("READY", version=1)
    asking.start()
    asking.link()
    assert asking.expect(Recall).runs == {lost[0]: 3, lost[1]: 0, known: 1}
    asking.tell(*(Forgotten(run=run) for run in lost))
    _eventually(lambda: Run.objects.filter(status="FAILED").count() == 2)
    ended = Run.objects.get(id=lost[0])
    assert ended.error["code"] == "forgotten"
    assert (ended.version, ended.finished_at is not None) == (3, True)
    assert Run.objects.get(id=known).status == "READY"


def test_one_that_was_thought_forgotten_comes_back_with_its_next_word(asking: Tree) -> None:
    from taskkit.models import Run

    run = _run("READY", version=1)
    asking.start()
    asking.link()
    asking.expect(Recall)
    asking.tell(Forgotten(run=run))
    _eventually(lambda: Run.objects.get().status == "FAILED")
    asking.tell(Transition(run=run, version=2, task="proj.echo", status="RUNNING", created_at=1e9))
    assert asking.expect(Told).version == 2
    assert Run.objects.get().status == "RUNNING"


def test_what_waits_in_the_outbox_is_not_asked_about(asking: Tree) -> None:
    from taskkit.outbox import submit
    from taskkit.wire.messages import Submit

    submit("proj.echo")
    asking.start()
    asking.link()
    asking.expect(Submit)
    asking.expect_silence(0.5)


def test_many_are_asked_about_a_few_at_a_time(asking: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskkit.courier import recall

    monkeypatch.setattr(recall, "BATCH", 2)
    runs = sorted(_run() for _ in range(5))
    asking.start()
    asking.link()
    asked = [asking.expect(Recall).runs for _ in range(3)]
    assert [len(found) for found in asked] == [2, 2, 1]
    assert [run for found in asked for run in found] == runs
    asking.expect_silence(0.3)
    asking.link()  # a new gateway, so from the beginning
    assert list(asking.expect(Recall).runs) == runs[:2]


def test_an_answer_to_no_question_is_nothing(asking: Tree) -> None:
    from taskkit.models import Run

    run = _run("SUCCESSFUL")
    asking.start()
    asking.link()
    asking.tell(Forgotten(run=run), Forgotten(run="0" * 32))
    asking.expect_silence(0.3)
    assert Run.objects.get().status == "SUCCESSFUL"


def test_runs_of_another_tree_are_not_asked_about(asking: Tree) -> None:
    from django.utils import timezone

    from taskkit.models import Node

    later = timezone.now() + timedelta(seconds=300)
    Node.objects.create(name="other", poke_address="@x", pid=1, seen_at=timezone.now(), expires_at=later)
    _run()
    _run(node="other")
    mine = _run(node=asking.start())
    asking.link()
    assert asking.expect(Company).shared
    assert asking.expect(Recall).runs == {mine: 3}


def test_a_tree_that_has_gone_is_no_other_tree(asking: Tree) -> None:
    from django.utils import timezone

    from taskkit.models import Node

    run = _run()
    Node.objects.create(
        name="other", poke_address="@x", pid=1, seen_at=timezone.now() - timedelta(seconds=300)
    )
    asking.start()
    asking.link()
    assert asking.expect(Recall).runs == {run: 3}
