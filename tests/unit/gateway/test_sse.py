"""Bytes of a stream."""

from __future__ import annotations

import json
import random

import pytest

from gateway import sse
from gateway.sse import Cursor, Origin
from taskkit.identifiers import MAX_CURSOR


def test_an_event_is_id_event_data_and_a_blank_line() -> None:
    assert sse.event_bytes(7, "progress", b'{"a":1}') == b'id: 7\nevent: progress\ndata: {"a":1}\n\n'


def test_an_event_without_offset_leaves_the_cursor_alone() -> None:
    assert sse.event_bytes(None, "x", b"1") == b"event: x\ndata: 1\n\n"


def test_a_name_cannot_forge_an_event() -> None:
    block = sse.event_bytes(1, "a\r\n\r\nevent: b\0", b"1")
    assert block.count(b"\n\n") == 1
    assert b"\r" not in block
    assert b"\0" not in block


def test_a_position_is_a_number() -> None:
    assert sse.parse_position("17", {}) == Cursor(offset=17)
    assert sse.parse_position(None, {"after": "latest"}).origin is Origin.LATEST
    for text in ("e1-3", "3.4"):
        with pytest.raises(ValueError, match="of a stream of one run"):
            sse.parse_position(text, {})


def test_what_leaves_the_cursor_alone_has_no_id() -> None:
    assert sse.event_bytes(None, "stream.lag", b"{}") == b"event: stream.lag\ndata: {}\n\n"
    assert sse.ndjson_line(None, "stream.lag", b"{}") == b'{"type":"stream.lag","data":{}}\n'
    assert sse.id_block("e1-3") == b"id: e1-3\n\n"
    assert sse.lag_data(3, "r") == b'{"skipped":3,"_run":"r"}'


@pytest.mark.parametrize("data", [b"a\nb", b"a\rb", b"a\r\nb"])
def test_data_is_split_at_every_line_break(data: bytes) -> None:
    assert sse.event_bytes(1, "x", data) == b"id: 1\nevent: x\ndata: a\ndata: b\n\n"


def test_other_separators_are_no_line_breaks() -> None:
    data = '"\u2028\u0085\x0b"'.encode()
    assert sse.event_bytes(1, "x", data) == b"id: 1\nevent: x\ndata: " + data + b"\n\n"


def test_any_data_stays_one_event(rng: random.Random) -> None:
    for _ in range(300):
        data = bytes(rng.choice(b'ab\r\n:"{}\0 ') for _ in range(rng.randrange(40)))
        block = sse.event_bytes(3, "x", data)
        assert block.endswith(b"\n\n")
        assert b"\n\n" not in block[:-2]
        assert all(line.startswith(b"data: ") for line in block.split(b"\n")[2:-2])


def test_control_blocks() -> None:
    assert sse.comment("hi\nthere") == b": hithere\n\n"
    assert sse.comment() == sse.HEARTBEAT == b":\n\n"
    assert sse.retry(1500) == b"retry: 1500\n\n"
    assert sse.reset_event(5, "trimmed") == (
        b'id: 4\nevent: stream.reset\ndata: {"from":5,"reason":"trimmed"}\n\n'
    )
    assert sse.reset_event(1, "ahead").startswith(b"id: 0\n")


def test_ndjson_is_one_line_of_json_whatever_comes() -> None:
    line = sse.ndjson_line(3, 'a"\n\u2028', b'{"x":\r\n1}')
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"id": "3", "type": 'a"\n\u2028', "data": {"x": 1}}
    assert json.loads(sse.ndjson_line("3.4", "log", b"")) == {"id": "3.4", "type": "log", "data": None}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"value":"hi"}', b"hi\n"),
        (b'{"value":"a\\nb\\n","_run":"x"}', b"a\nb\n"),
        (b'{"value":3}', b""),
        (b'{"other":"value"}', b""),
        (b'["value"]', b""),
        (b'{"value"', b""),
    ],
)
def test_text_is_what_was_said_as_text(data: bytes, text: bytes) -> None:
    assert sse.plain_text(data) == text


@pytest.mark.parametrize(
    ("header", "query", "cursor"),
    [
        (None, {}, Cursor()),
        ("", {}, Cursor()),
        ("12", {"after": "3"}, Cursor(offset=12)),
        ("", {"after": "3"}, Cursor(offset=3)),
        (None, {"after": "0"}, Cursor()),
        (None, {"last_event_id": "4"}, Cursor(offset=4)),
        (None, {"lastEventId": "5"}, Cursor(offset=5)),
        (None, {"after": "6.7"}, Cursor(offset=6, line=7)),
        ("007", {}, Cursor(offset=7)),
        ("0.0", {}, Cursor(line=0)),
        ("9" * 18, {}, Cursor(offset=10**18 - 1)),
        (None, {"after": "e2-6"}, Cursor(offset=6, epoch=2)),
        ("e10-6.7", {}, Cursor(offset=6, line=7, epoch=10)),
        (None, {"after": "latest"}, Cursor(origin=Origin.LATEST)),
        (None, {"after": "now"}, Cursor(origin=Origin.NOW)),
    ],
)
def test_cursors_of_a_request(header: str | None, query: dict[str, str], cursor: Cursor) -> None:
    assert sse.parse_cursor(header, query) == cursor


@pytest.mark.parametrize(
    "text",
    [
        *("x", "-1", "1.", ".1", "1.2.3", "\uff19", "1" * 19, "0" * 200, "latest", " 1"),
        *("1 ", "+1", "1e3", "0x1", "1\n", "1\0", "\u0663", "\xb2", "1_0", "1" * (MAX_CURSOR + 1)),
        *("e-1", "e0-1", "e1", "e1-", "E1-1", "e1-x", "1-1", "e01-1", "e1-1-1", "e1-1.", "e1111111111-1"),
    ],
)
def test_malformed_last_event_id(text: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        sse.parse_cursor(text, {})


def test_any_text_is_a_cursor_or_malformed(rng: random.Random) -> None:
    for _ in range(5000):
        text = "".join(rng.choices("0123456789.e-+ \n\0\u0663", k=rng.randrange(1, 24)))
        try:
            cursor = sse.parse_cursor(text, {})
        except ValueError:
            continue
        assert 0 <= cursor.offset < 10**18
        assert cursor.line is None or 0 <= cursor.line < 10**18


def test_an_empty_parameter_is_malformed() -> None:
    with pytest.raises(ValueError, match="malformed"):
        sse.parse_cursor(None, {"after": ""})


def test_cursors_resolve_against_the_newest_event() -> None:
    assert Cursor(offset=4).resolve(9) == 4
    assert Cursor(origin=Origin.LATEST).resolve(9) == 8
    assert Cursor(origin=Origin.LATEST).resolve(0) == 0
    assert Cursor(origin=Origin.NOW).resolve(9) == 9


def test_ids_tell_the_epoch_only_when_there_is_one() -> None:
    assert [sse.event_id(0, 7), sse.event_id(0, 7, 3)] == ["7", "7.3"]
    assert [sse.event_id(2, 7), sse.event_id(2, 7, 3)] == ["e2-7", "e2-7.3"]
    assert sse.reset_event(5, "epoch", 1) == (
        b'id: e1-4\nevent: stream.reset\ndata: {"from":5,"reason":"epoch"}\n\n'
    )


def test_every_id_is_read_back(rng: random.Random) -> None:
    for _ in range(1000):
        epoch, offset = rng.choice([0, 0, 1, 7, 10**8]), rng.randrange(10**6)
        line = rng.choice([None, rng.randrange(10**6)])
        cursor = sse.parse_cursor(sse.event_id(epoch, offset, line), {})
        assert cursor == Cursor(offset=offset, line=line, epoch=epoch)


def test_a_cursor_means_something_in_its_own_epoch_only() -> None:
    assert Cursor(offset=4, epoch=1).is_of(1)
    assert not Cursor(offset=4, epoch=1).is_of(2)
    assert not Cursor(offset=4).is_of(1)
    assert not Cursor(offset=0, line=3).is_of(1)
    assert Cursor().is_of(1), "in front of everything"
    assert Cursor(origin=Origin.NOW).is_of(1)
    assert Cursor(origin=Origin.LATEST).is_of(1)
