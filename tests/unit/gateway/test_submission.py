"""What may become a run."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from gateway.fields import parse_time
from gateway.submission import (
    Catalogue,
    Submission,
    body_digest,
    parse_submission,
    row_submission,
)
from taskkit.errors import InvalidArguments, TaskkitError, UnknownTask
from taskkit.identifiers import new_run_id
from taskkit.settings import LimitSettings, PoolSettings
from taskkit.wire.messages import Row, TaskInfo
from tests.unit.gateway.fakes import COUNT, EXAMPLE

POOLS = {"default": PoolSettings(timeout=30.0), "big": PoolSettings()}
CATALOGUE = Catalogue([EXAMPLE, COUNT])


def parse(body: dict[str, Any]) -> Submission:
    return parse_submission(body, CATALOGUE, LimitSettings(body_bytes=5000), subject="me", pools=POOLS)


def errors_of(**body: Any) -> dict[str, str]:
    with pytest.raises(InvalidArguments) as caught:
        parse({"task": "demo.count", "kwargs": {"n": 1}, **body})
    return caught.value.errors


def test_the_catalogue_knows_names_and_paths() -> None:
    assert CATALOGUE.find("demo.count") is CATALOGUE.find("demo.tasks.count") is COUNT
    assert CATALOGUE.all() == [EXAMPLE, COUNT]
    with pytest.raises(UnknownTask):
        CATALOGUE.find("demo.Count")


def test_an_unknown_task_is_no_hint_at_others() -> None:
    """The catalogue does not know whose token asks; a guess could name what the token does not reach."""
    with pytest.raises(UnknownTask, match=r"'demo\.coutn'; GET /api/v1/tasks lists them"):
        CATALOGUE.find("demo.coutn")


def test_the_detail_says_what_is_wrong_with_what() -> None:
    with pytest.raises(InvalidArguments, match=r"^demo\.count: m: .+") as caught:
        parse({"task": "demo.count", "kwargs": {"n": 1, "m": 2}})
    assert list(caught.value.errors) == ["m"]


def test_defaults_come_from_the_task_and_its_pool() -> None:
    made = parse({"task": "demo.count", "args": [3]})
    assert (made.args, made.kwargs, made.row) == (b"[3]", b"{}", None)
    assert (made.pool, made.priority, made.timeout, made.max_attempts) == ("default", 0, 30.0, 1)
    assert (made.run_after, made.metadata, made.tags, made.subject, made.origin) == (
        None,
        b"{}",
        (),
        "me",
        "http",
    )
    assert parse({"task": "demo.ExampleTask", "fields": {"message": "x"}}).timeout == 7.0


def test_everything_can_be_said() -> None:
    id = new_run_id()
    made = parse(
        {
            "task": "demo.tasks.count",
            "kwargs": {"n": 3, "delay": None, "when": "2026-01-01T00:00:00Z", "mode": "fast", "items": [1]},
            "pool": "big",
            "priority": -100,
            "run_after": "2026-01-01T00:00:00Z",
            "timeout": 0.5,
            "max_attempts": 3,
            "metadata": {"a": 1},
            "tags": ["x", "x", "y"],
            "id": id.upper(),
        }
    )
    assert (made.id, made.pool, made.priority, made.timeout, made.max_attempts) == (id, "big", -100, 0.5, 3)
    assert (made.run_after, made.metadata, made.tags) == (1767225600.0, b'{"a":1}', ("x", "y"))


def test_null_is_as_good_as_absent() -> None:
    names = (
        "pool",
        "priority",
        "run_after",
        "timeout",
        "max_attempts",
        "metadata",
        "tags",
        "id",
        "args",
        "fields",
    )
    made = parse({"task": "demo.count", "kwargs": {"n": 1}} | dict.fromkeys(names))
    assert made.pool == "default"


def test_metadata_of_the_task_is_kept() -> None:
    made = parse({"task": "demo.ExampleTask", "fields": {"message": "x"}, "metadata": {"b": 2}})
    assert msgspec.json.decode(made.metadata) == {"team": "a", "b": 2}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("colour", 1, "no field"),
        ("pool", "huge", "there are big, default"),
        ("pool", 3, "name of a pool"),
        ("priority", 101, "-100 to 100"),
        ("priority", True, "-100 to 100"),
        ("priority", 1.0, "-100 to 100"),
        ("run_after", "2026-01-01T00:00:00+02:00", "UTC"),
        ("run_after", "2026-13-01T00:00:00Z", "RFC 3339"),
        ("run_after", 60, "RFC 3339"),
        ("timeout", 0, "above 0"),
        ("timeout", float("inf"), "above 0"),
        ("timeout", "1", "above 0"),
        ("max_attempts", 0, "1 to 100"),
        ("max_attempts", 101, "1 to 100"),
        ("metadata", [], "object"),
        ("metadata", {"a": "x" * 16384}, "16384 are allowed"),
        ("metadata", {"a": 2**64}, "64 bits"),
        ("tags", ["x"] * 21, "at most 20"),
        ("tags", ["x" * 101], "1 to 100"),
        ("tags", "x", "list"),
        ("id", "x", "UUIDv7"),
        ("id", "8f14e45f-ceea-467f-a8ab-0123456789ab", "UUIDv7"),
        ("args", {}, "list"),
        ("kwargs", [], "object"),
        ("fields", {"a": 1}, "function"),
        ("kwargs", {"n": 1, "items": [2**70]}, "64 bits"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, says: str) -> None:
    errors = errors_of(**{field: value})
    assert says in errors[field]


@pytest.mark.parametrize(
    ("kwargs", "name", "says"),
    [
        ({}, "n", "is missing"),
        ({"n": "abc"}, "n", 'must be a whole number, not "abc"'),
        ({"n": True}, "n", "must be a whole number, not true"),
        ({"n": -1}, "n", "minimum"),
        ({"n": 1, "delay": "x"}, "delay", "must be a number or null"),
        ({"n": 1, "m": 2}, "m", "is no parameter; there are n, delay"),
        ({"n": 1, "when": "soon"}, "when", "date-time"),
        ({"n": 1, "mode": "medium"}, "mode", 'one of ["fast","slow"]'),
        ({"n": 1, "items": [1, {}]}, "items[1]", "must be a whole number, not an object"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, Any], name: str, says: str) -> None:
    errors = errors_of(kwargs=kwargs)
    assert list(errors) == [name]
    assert says in errors[name]


def test_all_errors_come_at_once() -> None:
    assert set(errors_of(kwargs={"x": 1}, pool="huge", tags=3)) == {"n", "x", "pool", "tags"}


def test_positional_arguments_count_as_their_names() -> None:
    assert "twice" in errors_of(args=[1])["n"]
    assert "whole number" in errors_of(args=["x"], kwargs={})["n"]
    assert "at most 5 by position" in errors_of(args=[1, 2, 3, 4, 5, 6], kwargs={})["args"]


def test_a_model_task_takes_fields() -> None:
    def errors(**body: Any) -> dict[str, str]:
        with pytest.raises(InvalidArguments) as caught:
            parse({"task": "demo.ExampleTask", **body})
        return caught.value.errors

    assert errors() == {"message": "is missing"}
    assert errors(fields={"message": 3}) == {"message": "must be text, not 3"}
    assert "no parameter" in errors(fields={"message": "x", "id": 3})["id"]
    assert "give `fields`" in errors(fields={"message": "x"}, kwargs={"message": "y"})["kwargs"]
    made = parse({"task": "demo.ExampleTask", "fields": {"message": "x"}})
    assert (made.args, made.kwargs) == (b"[]", b"{}")


def test_messages_are_bounded() -> None:
    errors = errors_of(kwargs={"n": 1, "items": ["x"] * 500})
    assert len(errors) <= 20
    long = errors_of(kwargs={"n": "y" * 4000})
    assert len(long["n"]) < 200


def test_size_and_depth_are_bounded() -> None:
    assert "body_bytes" in errors_of(kwargs={"n": 1, "when": "x" * 6000})["kwargs"]
    deep: Any = 1
    for _ in range(101):
        deep = [deep]
    assert "nested" in errors_of(kwargs={"n": deep})["kwargs"]


def test_no_task() -> None:
    for body in ({}, {"task": 3}, {"task": None}):
        with pytest.raises(InvalidArguments) as caught:
            parse(body)
        assert "task" in caught.value.errors
    with pytest.raises(UnknownTask):
        parse({"task": "nobody"})


def test_any_body_parses_or_is_refused(rng: random.Random) -> None:
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        2**80,
        1.5,
        "",
        "x",
        "demo.count",
        [],
        [1],
        {},
        {"n": 1},
        {"": [[]]},
    ]
    keys = [
        "task",
        "args",
        "kwargs",
        "fields",
        "pool",
        "priority",
        "run_after",
        "timeout",
        "tags",
        "id",
        "zz",
    ]
    for _ in range(1000):
        body = {rng.choice(keys): rng.choice(values) for _ in range(rng.randrange(6))}
        if rng.random() < 0.8:
            body["task"] = rng.choice(["demo.count", "demo.ExampleTask"])
        try:
            made = parse(body)
        except TaskkitError:
            continue
        assert made.task in (COUNT, EXAMPLE)


def test_a_digest_ignores_order_and_id() -> None:
    one = body_digest({"task": "a", "kwargs": {"x": 1, "y": 2}, "id": "1"})
    assert one == body_digest({"kwargs": {"y": 2, "x": 1}, "task": "a", "id": "2"})
    assert one != body_digest({"task": "a", "kwargs": {"x": 1, "y": 3}})


def test_a_row_submits_with_the_options_of_its_task() -> None:
    row = Row(app="demo", model="ExampleTask", pk=3, using="other")
    made = row_submission(EXAMPLE, row, subject="me", pools=POOLS)
    assert (made.row, made.using, made.timeout, made.args) == (row, "other", 7.0, b"[]")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1970-01-01T00:00:01Z", 1.0),
        ("1970-01-01t00:00:01.5z", 1.5),
        ("1970-01-01 00:00:01+00:00", 1.0),
        ("1970-01-01T00:00:01", None),
        ("1970-01-01", None),
        ("1970-02-30T00:00:00Z", None),
    ],
)
def test_times_are_rfc_3339_in_utc(text: str, moment: float | None) -> None:
    assert parse_time(text) == moment


def test_further_arguments_go_to_the_rest() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "rest": {"type": "array", "items": {"type": "integer"}, "default": []},
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    task = TaskInfo(name="x.y", path="x.tasks.y", kind="function", parameters=schema, positional=("a",))

    def parse(*args: Any) -> Submission:
        body = {"task": "x.y", "args": list(args)}
        return parse_submission(body, Catalogue([task]), LimitSettings(), subject="", pools=POOLS)

    assert parse(1, 2, 3).args == b"[1,2,3]"
    with pytest.raises(InvalidArguments) as caught:
        parse(1, 2, "x")
    assert list(caught.value.errors) == ["rest[1]"]


def test_a_row_from_the_outbox_exists_already() -> None:
    body = {"task": "demo.ExampleTask"}
    made = parse_submission(body, CATALOGUE, LimitSettings(), subject="", pools=POOLS, origin="outbox")
    assert (made.row, made.origin) == (None, "outbox")
