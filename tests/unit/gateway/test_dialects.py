"""The seeds' words: what their clients hear, what may be said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.dialects import (
    KEPT,
    MAX_VALUE,
    WORDS,
    Complaint,
    Filter,
    Ping,
    Renew,
    Subscribe,
    Unsubscribe,
    Updates,
    channel_frame,
    event_message,
    parse,
    pattern_of,
    task_update,
    words_of,
)
from gateway.sse import Cursor, Origin
from gateway.store.rows import RunRow
from taskkit.lifecycle import RunStatus

RUN = RunRow(no=1, id="r1", task="demo.count", args=b"[1]", kwargs=b'{"n":2}', subject="ann", created_at=0.0)


def updated(run: RunRow) -> dict[str, Any]:
    message = json.loads(task_update(run))
    assert message.keys() == {"type", "task"}
    assert message["type"] == "task.update"
    task: dict[str, Any] = message["task"]
    return task


def test_every_state_has_its_words() -> None:
    assert WORDS.keys() == set(RunStatus)
    assert {words.flowrra for words in WORDS.values()} == {"pending", "running", "success", "failed"}


@pytest.mark.parametrize(("attempt", "words"), [(0, ("pending", "pending")), (1, ("retrying", "processing"))])
def test_a_run_that_waits_again_is_retrying(attempt: int, words: tuple[str, str]) -> None:
    assert words_of(replace(RUN, attempt=attempt)) == words


def test_an_update_has_flowrras_eleven_keys_from_the_first_to_the_last() -> None:
    ended = replace(RUN, status=RunStatus.SUCCESSFUL, attempt=3, started_at=1.0, finished_at=2.5, result=b"7")
    assert updated(RUN).keys() == updated(ended).keys()
    assert updated(ended) == {
        "task_id": "r1",
        "task_name": "demo.count",
        "status": "success",
        "result": 7,
        "error": None,
        "submitted_at": "1970-01-01T00:00:00.000Z",
        "started_at": "1970-01-01T00:00:01.000Z",
        "finished_at": "1970-01-01T00:00:02.500Z",
        "retries": 2,
        "args": [1],
        "kwargs": {"n": 2},
    }


@pytest.mark.parametrize(
    ("error", "shown"), [(b'{"code":"raised","message":"boom"}', "boom"), (b"{}", ""), (b"\xff", "failed")]
)
def test_an_error_is_a_text(error: bytes, shown: str) -> None:
    assert updated(replace(RUN, status=RunStatus.FAILED, error=error))["error"] == shown


@pytest.mark.parametrize("field", ["args", "kwargs", "result"])
def test_a_large_value_is_left_out_visibly(field: str) -> None:
    fits, exceeds = b'"%s"' % (b"x" * (MAX_VALUE - 2)), b'"%s"' % (b"x" * (MAX_VALUE - 1))
    assert len(updated(replace(RUN, **{field: fits}))[field]) == MAX_VALUE - 2
    assert "_omitted" in updated(replace(RUN, **{field: exceeds}))[field]


def test_a_result_in_a_file_is_left_out_visibly() -> None:
    assert "_omitted" in updated(replace(RUN, status=RunStatus.SUCCESSFUL, result_blob="b"))["result"]


def test_bazis_gets_json_within_json() -> None:
    message = json.loads(channel_frame(replace(RUN, status=RunStatus.RUNNING)))
    assert message.keys() == {"type", "data"}
    assert message["type"] == "data"
    assert json.loads(message["data"]) == {"task_id": "r1", "status": "processing", "action": "async_bg"}


def test_an_event_carries_its_cursor() -> None:
    assert json.loads(event_message("r1", "e1-5", "progress", b'{"n":1}')) == {
        "type": "event",
        "run": "r1",
        "id": "e1-5",
        "event": "progress",
        "data": {"n": 1},
    }


def test_an_update_is_rendered_once_for_everybody() -> None:
    updates = Updates()
    first = updates.of(RUN)
    assert updates.of(replace(RUN)) is first
    assert updates.of(replace(RUN, version=2, status=RunStatus.RUNNING)) is not first
    for no in range(2, KEPT + 2):
        updates.of(replace(RUN, no=no))
    assert updates.of(RUN) is not first  # the oldest has given way


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"type": "ping"}, Ping()),
        ({"token": "t"}, Renew("t")),
        ({"type": "unsubscribe"}, Unsubscribe()),
        ({"type": "subscribe"}, Subscribe(Filter())),
        ({"type": "subscribe", "run": "a"}, Subscribe(Filter(runs=frozenset("a")))),
        (
            {"type": "subscribe", "run": ["a"], "after": 12},
            Subscribe(Filter(runs=frozenset("a")), None, "a", Cursor(offset=12)),
        ),
        (
            {"type": "subscribe", "run": "a", "after": "now"},
            Subscribe(Filter(runs=frozenset("a")), None, "a", Cursor(origin=Origin.NOW)),
        ),
        (
            {"type": "subscribe", "task": "demo.*", "status": ["failed", "retrying"], "user": "ann"},
            Subscribe(
                Filter(
                    tasks=pattern_of(["demo.*"]),
                    statuses=frozenset({"failed", "retrying"}),
                    users=frozenset({"ann"}),
                )
            ),
        ),
        ({"type": "subscribe", "since": "1970-01-01T00:01:00Z"}, Subscribe(Filter(), 60.0)),
    ],
)
def test_what_may_be_said(said: dict[str, Any], meant: object) -> None:
    assert parse(json.dumps(said)) == meant


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("", "bad-json", ""),
        ("[1]", "bad-json", "object"),
        ("[" * 100_000, "bad-json", ""),
        ('{"type":"subscribe"', "bad-json", ""),
        ("{}", "bad-message", "type"),
        ('{"type":"delete"}', "bad-message", "type"),
        ('{"token":5}', "bad-message", "type"),
        ('{"type":"subscribe","runs":["a"]}', "bad-message", "runs"),
        ('{"type":"subscribe","run":5}', "bad-message", "run"),
        ('{"type":"subscribe","task":[]}', "bad-message", "task"),
        ('{"type":"subscribe","user":["' + "x" * 201 + '"]}', "bad-message", "user"),
        ('{"type":"subscribe","status":"done"}', "bad-message", "status"),
        ('{"type":"subscribe","since":"yesterday"}', "bad-message", "since"),
        ('{"type":"subscribe","after":"1"}', "bad-message", "run"),
        ('{"type":"subscribe","run":["a","b"],"after":"1"}', "bad-message", "run"),
        ('{"type":"subscribe","run":"a","after":"x"}', "bad-cursor", "x"),
        ('{"type":"subscribe","run":"a","after":-1}', "bad-cursor", "-1"),
    ],
)
def test_what_may_not(text: str, code: str, named: str) -> None:
    with pytest.raises(Complaint) as caught:
        parse(text)
    assert caught.value.code == code
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("filter", "matches"),
    [
        (Filter(), True),
        (Filter(runs=frozenset({"r1", "r2"})), True),
        (Filter(runs=frozenset({"r2"})), False),
        (Filter(tasks=pattern_of(["other", "demo.*"])), True),
        (Filter(tasks=pattern_of(["demo", "demo.count.x", "count"])), False),
        (Filter(tasks=pattern_of(["*" * 100 + "x"])), False),
        (Filter(statuses=frozenset({"pending"})), True),
        (Filter(statuses=frozenset({"retrying"})), False),
        (Filter(users=frozenset({"ann"})), True),
        (Filter(users=frozenset({"ann"}), runs=frozenset({"r2"})), False),
    ],
)
def test_all_conditions_of_a_filter_must_hold(filter: Filter, matches: bool) -> None:
    assert filter.matches(RUN) is matches
