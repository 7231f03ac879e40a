"""What a signature becomes, how arguments become its types."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import pathlib
import uuid
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jsonschema
import msgspec
import pytest
from msgspec import Meta

from taskkit.errors import InvalidArguments
from taskkit.schema import NO_PARAMETERS, Parameters, parameters_of

if TYPE_CHECKING:
    from somewhere import Unknown


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Opaque:
    """JSON cannot express it."""


def plain(a: int, b: str = "x", *, c: float | None = None) -> None:
    """A bit of everything."""


def typed(
    when: datetime.datetime,
    id: uuid.UUID,
    price: decimal.Decimal,
    where: pathlib.Path,
    mode: Literal["fast", "slow"],
    colour: Colour,
    point: Point,
    numbers: list[int],
    table: dict[int, Point],
    span: datetime.timedelta,
) -> None:
    """One parameter per kind of type."""


def loose(a, b: Opaque, c: Unknown, d: Opaque | Point, e: object = 3):  # type: ignore[no-untyped-def]
    """Nothing that could be checked."""


def rest(a: int, /, b: int = 2, *more: int, **options: bool) -> None:
    """Every kind of parameter."""


def accepts(parameters: Parameters, value: Any) -> bool:
    return jsonschema.Draft202012Validator(parameters.schema).is_valid(value)


@pytest.mark.parametrize("function", [plain, typed, loose, rest])
def test_every_schema_is_valid_2020_12_and_json(function: Any) -> None:
    schema = parameters_of(function).schema
    jsonschema.Draft202012Validator.check_schema(schema)
    assert msgspec.json.decode(msgspec.json.encode(schema)) == schema
    assert schema["title"] == function.__name__
    assert schema["type"] == "object"


def test_required_default_and_unknown_are_in_the_schema() -> None:
    parameters = parameters_of(plain)
    assert parameters.positional == ("a", "b")
    assert parameters.schema["required"] == ["a"]
    assert parameters.schema["properties"]["b"] == {"type": "string", "default": "x"}
    assert accepts(parameters, {"a": 1, "c": None})
    assert not accepts(parameters, {})
    assert not accepts(parameters, {"a": "1"})
    assert not accepts(parameters, {"a": 1, "d": 1})


def test_json_values_become_the_annotated_types() -> None:
    given = {
        "when": "2026-01-02T03:04:05Z",
        "id": "0190b5a4-0000-7000-8000-000000000000",
        "price": "12.50",
        "where": "/srv/data",
        "mode": "fast",
        "colour": "blue",
        "point": {"x": 1},
        "numbers": [1, 2],
        "table": {"7": {"x": 1, "y": 2}},
        "span": "PT90S",
    }
    parameters = parameters_of(typed)
    assert accepts(parameters, given)
    args, kwargs = parameters.bind([], given)
    assert args == []
    assert kwargs == {
        "when": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        "id": uuid.UUID("0190b5a4-0000-7000-8000-000000000000"),
        "price": decimal.Decimal("12.50"),
        "where": pathlib.Path("/srv/data"),
        "mode": "fast",
        "colour": Colour.BLUE,
        "point": Point(1, 0),
        "numbers": [1, 2],
        "table": {7: Point(1, 2)},
        "span": datetime.timedelta(seconds=90),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("when", "yesterday"),
        ("id", "1"),
        ("price", "much"),
        ("where", 1),
        ("mode", "medium"),
        ("colour", "green"),
        ("point", {"y": 1}),
        ("numbers", [1, "2"]),
        ("table", {"a": {"x": 1}}),
        ("span", "long"),
    ],
)
def test_a_wrong_value_is_named_by_its_parameter(name: str, value: Any) -> None:
    parameters = parameters_of(typed)
    with pytest.raises(InvalidArguments) as caught:
        parameters.bind([], {name: value})
    assert caught.value.errors.pop(name) not in ("", "is required")
    assert set(caught.value.errors.values()) == {"is required"}


def test_the_place_inside_a_value_is_named() -> None:
    def numbers(values: list[int]) -> None: ...

    with pytest.raises(InvalidArguments) as caught:
        parameters_of(numbers).bind([[1, "2"]], {})
    assert caught.value.errors == {"values": "Expected `int`, got `str` - at `values[1]`"}


def test_every_wrong_argument_is_told_at_once() -> None:
    with pytest.raises(InvalidArguments) as caught:
        parameters_of(plain).bind([], {"b": 1, "d": 2})
    assert caught.value.errors == {
        "a": "is required",
        "b": "Expected `str`, got `int`",
        "d": "is no parameter of this task",
    }
    assert "a: is required" in str(caught.value)


def test_arguments_by_position_stay_by_position() -> None:
    assert parameters_of(plain).bind([1, "y"], {"c": 2}) == ([1, "y"], {"c": 2.0})
    assert parameters_of(plain).bind([1], {"b": "y"}) == ([1], {"b": "y"})


def test_too_many_by_position_or_twice_is_refused() -> None:
    with pytest.raises(InvalidArguments) as caught:
        parameters_of(plain).bind([1, "y", 2.0], {"a": 1})
    assert caught.value.errors == {
        "args": "at most 2 by position, 3 were given",
        "a": "was given twice, by position as well as by name",
    }


def test_what_json_cannot_express_takes_any_value() -> None:
    parameters = parameters_of(loose)
    for value in (None, 1, "x", [1], {"a": 1}):
        given = {"a": value, "b": value, "c": value, "d": value, "e": value}
        assert accepts(parameters, given)
        assert parameters.bind([], given) == ([], given)


def test_positional_only_and_open_ended_parameters() -> None:
    parameters = parameters_of(rest)
    assert parameters.positional == ("a", "b")
    assert parameters.schema["additionalProperties"] == {"type": "boolean"}
    assert parameters.bind([], {"a": 1}) == ([1], {})
    assert parameters.bind([1], {"b": 5}) == ([1], {"b": 5})
    assert parameters.bind([1, 2, 3, 4], {"fast": True}) == ([1, 2, 3, 4], {"fast": True})
    assert parameters.bind([], {"a": 1, "more": [3, 4]}) == ([1, 2, 3, 4], {})
    assert accepts(parameters, {"a": 1, "more": [3], "fast": True})
    assert not accepts(parameters, {"a": 1, "fast": 1})


def test_open_ended_parameters_are_checked_too() -> None:
    parameters = parameters_of(rest)
    with pytest.raises(InvalidArguments) as caught:
        parameters.bind([1, 2, "x"], {"fast": "yes"})
    assert caught.value.errors == {
        "fast": "Expected `bool`, got `str`",
        "more[0]": "Expected `int`, got `str`",
    }
    with pytest.raises(InvalidArguments) as caught:
        parameters.bind([1], {"more": 3})
    assert caught.value.errors == {"more": "Expected `array`, got `int`"}
    with pytest.raises(InvalidArguments) as caught:
        parameters.bind([1, 2, 3], {"more": [4]})
    assert caught.value.errors == {"more": "was given twice, by position as well as by name"}


def test_constraints_are_in_the_schema_as_well_as_in_the_binding() -> None:
    def limited(n: Annotated[int, Meta(ge=1, description="how many")]) -> None: ...

    parameters = parameters_of(limited)
    assert parameters.schema["properties"]["n"] == {
        "type": "integer",
        "minimum": 1,
        "description": "how many",
    }
    with pytest.raises(InvalidArguments) as caught:
        parameters.bind([0], {})
    assert caught.value.errors == {"n": "Expected `int` >= 1"}


def test_a_default_of_none_allows_null() -> None:
    def implicit(path: str = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013

    assert parameters_of(implicit).bind([None], {}) == ([None], {})
    assert accepts(parameters_of(implicit), {"path": None})


def test_skipped_parameters_do_not_exist() -> None:
    def contextual(context: Any, n: int) -> None: ...

    parameters = parameters_of(contextual, skip=1)
    assert parameters.positional == ("n",)
    assert parameters.bind([3], {}) == ([3], {})
    with pytest.raises(InvalidArguments):
        parameters.bind([], {"context": 1, "n": 3})


def test_a_task_without_parameters_takes_none() -> None:
    assert NO_PARAMETERS.bind([], {}) == ([], {})
    assert NO_PARAMETERS.schema["properties"] == {}
    with pytest.raises(InvalidArguments):
        NO_PARAMETERS.bind([], {"a": 1})


def test_mutable_or_odd_defaults_do_no_harm() -> None:
    def odd(a: list[int] = [1], b: Any = Opaque(), c: pathlib.Path = pathlib.Path("/")) -> None: ...  # noqa: B006, B008

    parameters = parameters_of(odd)
    assert parameters.bind([], {}) == ([], {})
    assert parameters.schema["properties"]["a"]["default"] == [1]
    assert "default" not in parameters.schema["properties"]["b"]
