"""Values to JSON: what it can express, what it names, what it never touches."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import decimal
import enum
import json
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from django.utils.functional import lazy

from taskkit.runner.encode import EventRenderer, class_path, failure_of, render


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Odd:
    """Nothing that JSON knows."""


class Rude:
    """Does not even say what it is."""

    def __repr__(self) -> str:
        raise ZeroDivisionError("no repr")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        ([1, 2.5, "é\n", True], '[1,2.5,"é\\n",true]'),
        ({1: "a", 2.5: "b"}, '{"1":"a","2.5":"b"}'),
        (float("nan"), "null"),
        ([float("inf"), -float("inf")], "[null,null]"),
        (2**70, str(2**70)),
        (decimal.Decimal("1.10"), '"1.10"'),
        (dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC), '"2026-01-02T03:04:05Z"'),
        (dt.date(2026, 1, 2), '"2026-01-02"'),
        (uuid.UUID(int=7), f'"{uuid.UUID(int=7)}"'),
        (Colour.RED, '"red"'),
        (Point(1, 2.0), '{"x":1,"y":2.0}'),
        (pathlib.PurePosixPath("/a/b"), '"/a/b"'),
        (lazy(lambda: "translated", str)(), '"translated"'),
        (b"\x00\xff", '"AP8="'),
        ((1, {2}), "[1,[2]]"),
    ],
)
def test_what_json_can_express_is_rendered(value: Any, text: str) -> None:
    assert render(value).decode() == text


@pytest.mark.parametrize("separator", ["\n", "\r", "\u2028", "\u2029", "\x85", "\0"])
def test_the_text_is_one_line_for_readers_of_event_streams(separator: str) -> None:
    rendered = render({separator: separator})
    assert not {b"\n"[0], b"\r"[0], 0} & set(rendered)
    assert json.loads(rendered) == {separator: separator}


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"k": {"deep": v}}])
def test_what_json_cannot_express_is_named_with_its_type(wrap: Any) -> None:
    values: list[Any] = [Odd(), range(3), 1j, ValueError("x"), len, iter([]), open]
    for value in values:
        with pytest.raises(TypeError) as caught:
            render(wrap(value))
        assert type(value).__qualname__ in str(caught.value)
        assert "convert it first" in str(caught.value)


def test_what_cannot_even_be_shown_is_named_by_its_type() -> None:
    with pytest.raises(TypeError, match="Rude"):
        render([Rude()])


@pytest.mark.parametrize("value", [{None: 1}, {True: 1}, {(1, 2): 3}])
def test_keys_that_are_no_text_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="key"):
        render(value)


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    ring: dict[str, Any] = {}
    ring["ring"] = [ring]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, ring, deep):
        with pytest.raises(ValueError, match="contains itself"):
            render(value)


@pytest.mark.parametrize("value", ["\ud800", {"a\udfff": 1}, ["x", "\udc80"]])
def test_lone_surrogates_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match="UTF-8 cannot express"):
        render(value)


def test_an_event_is_the_tasks_object_plus_ours_and_the_task_keeps_its_own() -> None:
    data = {"step": 1, "nested": {"a": [1]}, "_run": "forged"}
    before = copy.deepcopy(data)
    rendered = json.loads(EventRenderer({"_run": "r1", "_attempt": 2}).render(data))
    assert data == before
    assert rendered["step"] == 1
    assert (rendered["_run"], rendered["_attempt"]) == ("r1", 2)
    assert dt.datetime.fromisoformat(rendered["_timestamp"]).tzinfo is not None


@pytest.mark.parametrize("extras", [{}, {"_run": "é\n", "_task_id": {"a": [1]}}])
@pytest.mark.parametrize(
    "data", [{}, {"a": {"b": "}"}}, {1: 2.5}, {"_timestamp": 0}, {"a": 1, "_run": "forged"}]
)
def test_what_is_rendered_ahead_is_as_if_rendered_together(data: Any, extras: dict[str, Any]) -> None:
    rendered = EventRenderer(extras).render(data)
    stamp = json.loads(rendered)["_timestamp"]
    assert rendered == render({**data, **extras, "_timestamp": stamp})


@pytest.mark.parametrize(
    ("data", "expected"), [(None, {}), (5, {"value": 5}), ([1], {"value": [1]}), ("x", {"value": "x"})]
)
def test_what_is_no_object_becomes_one(data: Any, expected: dict[str, Any]) -> None:
    rendered = json.loads(EventRenderer({}).render(data))
    rendered.pop("_timestamp")
    assert rendered == expected


def test_any_mapping_is_an_object() -> None:
    class Mine(Mapping[str, int]):
        def __getitem__(self, key: str) -> int:
            return {"a": 1}[key]

        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    assert json.loads(EventRenderer({}).render(Mine()))["a"] == 1


def _caught(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_failure_has_class_message_and_the_tasks_own_traceback() -> None:
    failure = failure_of(_caught(ValueError("no")))
    assert failure.exception == "builtins.ValueError"
    assert failure.message == "no"
    assert "in _caught" in failure.traceback
    assert failure.traceback.rstrip().endswith("ValueError: no")


def test_a_failure_tells_its_causes_and_notes() -> None:
    error = ValueError("outer")
    error.__cause__ = _caught(KeyError("inner"))
    error.add_note("look here")
    text = failure_of(_caught(error)).traceback
    assert "KeyError: 'inner'" in text
    assert "look here" in text


def test_a_group_of_failures_is_told_with_its_members() -> None:
    group = ExceptionGroup("two", [ValueError("one"), OSError("other")])
    text = failure_of(_caught(group)).traceback
    assert "ValueError: one" in text
    assert "OSError: other" in text


def test_a_failure_whose_message_cannot_be_made_is_told_all_the_same() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("again")

    failure = failure_of(_caught(Broken()))
    assert failure.exception.endswith("Broken")
    assert "__str__ raised RuntimeError" in failure.message


def test_a_failure_with_a_lone_surrogate_is_told_all_the_same() -> None:
    failure = failure_of(_caught(ValueError("a\ud800b")))
    assert failure.message == "a?b"
    failure.traceback.encode()


def test_an_endless_recursion_is_told_briefly() -> None:
    def again() -> None:
        again()

    try:
        again()
    except RecursionError as error:
        failure = failure_of(error)
    assert failure.exception == "builtins.RecursionError"
    assert len(failure.traceback) < 20_000


def test_a_class_is_named_by_its_dotted_path() -> None:
    assert class_path(Point) == f"{__name__}.Point"
