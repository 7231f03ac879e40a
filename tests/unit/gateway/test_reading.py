"""Bodies that would keep the parser, and so everybody, busy are refused before it begins."""

from __future__ import annotations

import json

import pytest

from gateway.reading import MAX_EXTREME, SMALL_BYTES, Refusal, parse_object
from tests.unit.gateway.fakes import StubEngine, client_of

#: Takes a parser of doubles 50 µs.
SLOW = b"17976931348623157081e289"


def body_of(number: bytes, count: int) -> bytes:
    return b'{"x":[' + b",".join([number] * count) + b"]}"


@pytest.mark.parametrize("number", [SLOW, b"7e-324", b"-1.7976931348623157E+308"])
def test_numbers_that_take_long_to_parse_are_few(number: bytes) -> None:
    with pytest.raises(Refusal, match="send them as text") as caught:
        parse_object(body_of(number, 40_000))
    assert caught.value.code == "bad-json"
    assert len(parse_object(body_of(number, MAX_EXTREME))["x"]) == MAX_EXTREME


def test_they_are_found_wherever_a_piece_ends() -> None:
    for shift in range(30):
        body = (
            body_of(b" " * (SMALL_BYTES - 30 + shift) + b"1", 1)[:-2]
            + b","
            + body_of(SLOW, MAX_EXTREME + 1)[6:]
        )
        with pytest.raises(Refusal):
            parse_object(body)


@pytest.mark.parametrize("value", [0.1234567890123456789, 1e99, "1e289", 10**40, {"a1e289": [True, None]}])
def test_other_numbers_may_be_many(value: object) -> None:
    body = json.dumps({"x": [value] * 3_000}).encode()
    assert parse_object(body) == json.loads(body)


async def test_what_is_small_by_nature_is_bounded() -> None:
    async with client_of(StubEngine()) as client:
        answer = await client.post("/api/v1/tickets", json={"tasks": ["x" * 100] * 1_000})
    assert (answer.status_code, answer.json()["max_bytes"]) == (413, SMALL_BYTES)
