"""The projection follows the gateway: versions, one open run per row, values that cannot be stored."""

from __future__ import annotations

import random
from typing import Any

import pytest
from django.test import override_settings

from taskkit.identifiers import new_run_id
from taskkit.wire.messages import Row, Submitted, Transition

pytestmark = pytest.mark.usefixtures("django_project")

ROW = Row(app="proj", model="Row", pk=1)


def _transition(run: str, version: int = 1, status: str = "READY", **fields: Any) -> Transition:
    fields = {"task": "proj.Row", "created_at": 1e9, **fields}
    return Transition(run=run, version=version, status=status, **fields)


def _write(*transitions: Transition) -> None:
    from taskkit.courier import projection

    projection.write("default", transitions)


def _run(id_: str) -> Any:
    from taskkit.models import Run

    return Run.objects.get(id=id_)


def test_any_order_of_arrival_ends_at_the_newest(rng: random.Random) -> None:
    states = ["READY", "RUNNING", "READY", "RUNNING", "SUCCESSFUL"]
    for _ in range(20):
        run = new_run_id()
        news = [_transition(run, version, status) for version, status in enumerate(states, 1)]
        rng.shuffle(news)
        _write(*news[:2])
        for one in [*news[2:], *news[:1]]:
            _write(one)
        assert (_run(run).version, _run(run).status) == (5, "SUCCESSFUL")


def test_a_second_open_run_of_a_row_supersedes_one_whose_end_was_lost() -> None:
    old, new = new_run_id(), new_run_id()
    _write(_transition(old, 2, "RUNNING", row=ROW))
    _write(_transition(new, 1, "READY", row=ROW))
    assert (_run(old).status, _run(old).error["code"]) == ("FAILED", "superseded")
    assert (_run(new).status, _run(new).row_key) == ("READY", ROW.key)
    _write(_transition(old, 3, "SUCCESSFUL", row=ROW, result=b"7"))
    assert (_run(old).status, _run(old).result, _run(old).error) == ("SUCCESSFUL", 7, None)


def test_a_waiting_submission_makes_way_and_gets_its_row_back() -> None:
    from taskkit.outbox import submit
    from tests.project.models import Row as RowModel

    row = RowModel.objects.create(message="x")
    address = Row(app="proj", model="Row", pk=row.pk)
    waiting, other = submit(row), new_run_id()
    _write(_transition(other, 1, "RUNNING", row=address))
    assert (waiting.run().status, waiting.run().row_key) == ("READY", None)
    assert submit(row).id == other
    _write(_transition(other, 2, "SUCCESSFUL", row=address), _transition(waiting.id, 1, "READY", row=address))
    assert waiting.run().row_key == address.key
    assert submit(row).id == waiting.id


def test_a_retry_opens_the_row_again() -> None:
    run = new_run_id()
    for version, status in enumerate(["READY", "RUNNING", "READY", "RUNNING", "CANCELLED"], 1):
        _write(_transition(run, version, status, row=ROW))
        assert _run(run).status == status


def test_a_value_that_cannot_be_stored_costs_the_value_not_the_status() -> None:
    good, bad = new_run_id(), new_run_id()
    _write(
        _transition(good, 1, "SUCCESSFUL", result=b"1"),
        _transition(bad, 1, "SUCCESSFUL", attempt=2, result=b"NaN"),  # JSON_VALID refuses it
    )
    assert (_run(good).status, _run(good).result) == ("SUCCESSFUL", 1)
    assert (_run(bad).status, _run(bad).attempt, _run(bad).result) == ("SUCCESSFUL", 2, None)


def test_what_cannot_be_stored_at_all_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    from taskkit.models import Run

    good = new_run_id()
    _write(_transition(new_run_id(), 1, "NONSENSE"), _transition(good))
    assert str(Run.objects.get().id) == good
    assert "stays as it is" in caplog.text


def test_a_row_key_that_is_too_long_is_left_out() -> None:
    run = new_run_id()
    _write(_transition(run, row=Row(app="proj", model="Row", pk="x" * 600)))
    assert _run(run).row_key is None


def test_settling_twice_changes_nothing_more() -> None:
    from taskkit.courier import projection
    from taskkit.models import Outbox
    from taskkit.outbox import submit

    accepted, refused = submit("proj.echo"), submit("proj.echo")
    answers = [
        Submitted(id=accepted.id, run=accepted.id),
        Submitted(id=refused.id, code="forbidden", error="no"),
        Submitted(id=new_run_id(), run=new_run_id()),
    ]
    for _ in range(2):
        projection.settle("default", answers)
        assert [str(entry.id) for entry in Outbox.objects.all()] == [refused.id]
        assert (accepted.run().status, refused.run().status) == ("READY", "FAILED")


def test_a_refusal_is_a_failed_row_with_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    from taskkit.courier import projection
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    with caplog.at_level("WARNING", "bulkhead.courier"):
        projection.settle("default", [Submitted(id=handle.id, code="invalid-arguments", error="pool:\nnone")])
    run = handle.run()
    assert (run.status, run.is_finished) == ("FAILED", True)
    assert run.error == {"code": "invalid-arguments", "message": "pool:\nnone"}
    (line,) = caplog.messages
    assert line == f"run {handle.id} of proj.echo in 'default' was refused (invalid-arguments): pool: none"


def test_a_refusal_does_not_overwrite_what_the_gateway_said_since() -> None:
    from taskkit.courier import projection
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    _write(_transition(handle.id, 1, "RUNNING"))
    projection.settle("default", [Submitted(id=handle.id, code="forbidden", error="no")])
    assert handle.run().status == "RUNNING"


def test_no_signal_runs_user_code() -> None:
    from django.db.models import signals

    from taskkit.courier import projection
    from taskkit.outbox import submit

    handle = submit("proj.echo")
    heard: list[Any] = []

    def listener(**kwargs: Any) -> None:
        heard.append(kwargs)

    kinds = (signals.pre_save, signals.post_save, signals.pre_delete, signals.post_delete)
    for kind in kinds:
        kind.connect(listener)
    try:
        _write(_transition(new_run_id()))
        projection.settle("default", [Submitted(id=handle.id, run=new_run_id())])
    finally:
        for kind in kinds:
            kind.disconnect(listener)
    assert heard == []


def test_naive_projects_get_naive_times() -> None:
    from taskkit.times import moment

    with override_settings(USE_TZ=False, TIME_ZONE="UTC"):
        assert moment(1e9).tzinfo is None


def test_json_is_parsed_here_whatever_it_is() -> None:
    run, deep = new_run_id(), new_run_id()
    _write(_transition(run, args=b'[1,"\\u00e9"]', kwargs=b'{"a":[null]}', metadata=b'{"m":1.5}'))
    assert (_run(run).args, _run(run).kwargs, _run(run).metadata) == (
        [1, "\u00e9"],
        {"a": [None]},
        {"m": 1.5},
    )
    _write(_transition(deep, 1, "SUCCESSFUL", args=b"[" * 100_000 + b"]" * 100_000))
    assert _run(deep).status == "SUCCESSFUL", "what cannot be stored is left out"
