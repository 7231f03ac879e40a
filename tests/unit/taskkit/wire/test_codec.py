"""Messages packed, unpacked and refused."""

from __future__ import annotations

import random
import types
import typing
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskkit.errors import LocalWireError, RemoteWireError, UnexpectedMessage
from taskkit.wire import codec, messages
from taskkit.wire.framing import Frame, read_frames
from taskkit.wire.messages import (
    FRAME_KINDS,
    Event,
    Finished,
    Hello,
    Message,
    Progress,
    Start,
    Started,
    Submit,
)

MESSAGES = sorted(Message.__subclasses__(), key=lambda cls: cls.__name__)
UNIONS = {
    name: typing.get_args(value)
    for name, value in vars(messages).items()
    if isinstance(value, types.UnionType)
}

#: There are a hundred kinds of messages and links: 3,000 examples together, and half a second for each hundred.
few = settings(max_examples=30)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
integers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=False)
plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | integers | floats | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
SIMPLE = {
    str: texts,
    int: st.integers(-(2**63), 2**63 - 1),
    float: floats,
    bool: st.booleans(),
    bytes: st.binary(max_size=40),
    type(None): st.none(),
    Any: plain,
}


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values of a field."""
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(texts, values_of(arguments[1]), max_size=3)
    if origin is types.UnionType:
        return st.one_of(*map(values_of, arguments))
    assert issubclass(annotation, msgspec.Struct), f"no strategy for {annotation}"
    return instances_of(annotation)


def instances_of(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Return a strategy for instances of a struct, made from its annotations."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: values_of(hints[field.name]) for field in msgspec.structs.fields(cls)}
    return st.builds(cls, **fields)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_message_comes_back_as_it_was(cls: type[Message]) -> None:
    @few
    @given(instances_of(cls))
    def check(message: Message) -> None:
        assert codec.unpack(codec.pack(message), cls) == message

    check()


@pytest.mark.parametrize("union", UNIONS, ids=str)
def test_a_link_accepts_its_own_messages_and_no_other(union: str) -> None:
    members = UNIONS[union]
    expected: Any = getattr(messages, union)

    @given(st.one_of(*map(instances_of, MESSAGES)))
    def check(message: Message) -> None:
        if type(message) in members:
            assert codec.unpack(codec.pack(message), expected) == message
            return
        with pytest.raises(UnexpectedMessage):
            codec.unpack(codec.pack(message), expected)

    check()


def test_every_message_travels_on_some_link() -> None:
    assert {cls for members in UNIONS.values() for cls in members} == set(MESSAGES)


def test_frame_kinds_are_for_ever() -> None:
    assert {cls.__name__: kind for cls, kind in FRAME_KINDS.items()} == {
        "Hello": 1,
        "Started": 2,
        "Event": 3,
        "Progress": 4,
        "Finished": 5,
        "Created": 6,
        "GivenBack": 7,
    }
    assert set(FRAME_KINDS) == set(UNIONS["RunnerMessage"])


@pytest.mark.parametrize("cls", FRAME_KINDS, ids=lambda cls: cls.__name__)
def test_runner_messages_survive_their_frame(cls: type[Any]) -> None:
    @given(instances_of(cls), st.integers(1, 2**40))
    def check(message: Any, seq: int) -> None:
        (frame,) = read_frames(codec.pack_runner_frame(message, seq))
        assert frame.seq == seq
        assert codec.unpack_runner_frame(frame) == message

    check()


@pytest.mark.parametrize("cls", [Event, Progress], ids=lambda cls: cls.__name__)
def test_the_hot_path_writes_the_bytes_of_msgpack(cls: type[Any]) -> None:
    @given(instances_of(cls))
    def check(message: Any) -> None:
        plain = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)), use_bin_type=True)
        assert codec.pack(message) == plain

    check()


def test_a_frame_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UnexpectedMessage, match="77"):
        codec.unpack_runner_frame(Frame(77, 1, b"\x80"))


def test_a_kind_that_lies_about_its_body_is_refused() -> None:
    body = codec.pack(Hello(runner="r", pid=1))
    with pytest.raises(UnexpectedMessage):
        codec.unpack_runner_frame(Frame(FRAME_KINDS[Started], 1, body))


def test_a_frame_above_the_limit_is_ours_to_avoid() -> None:
    message = Event(token="t", type="x", data=bytes(2000))
    with pytest.raises(LocalWireError):
        codec.pack_runner_frame(message, 1, limit=1024)


def start(value: Any) -> Submit:
    """Return a message with `value` in it."""
    return Submit(id="r", task="a.b", args=[value])


def nested(depth: int) -> Any:
    """Return a list in a list in a list …"""
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, -(2**63)])
def test_integers_of_64_bits_pass(value: int) -> None:
    assert codec.unpack(codec.pack(start(value)), Submit).args == [value]


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**30])
def test_integers_beyond_64_bits_are_ours_to_avoid(value: int) -> None:
    with pytest.raises(LocalWireError, match="Submit"):
        codec.pack(start(value))


@pytest.mark.parametrize("value", [object(), len, "\ud800", {"x": object()}], ids=repr)
def test_what_is_no_plain_data_is_ours_to_avoid(value: Any) -> None:
    with pytest.raises(LocalWireError, match="Submit"):
        codec.pack(start(value))


@pytest.mark.parametrize("depth", [2000, 100_000])
def test_too_deep_data_is_ours_to_avoid(depth: int) -> None:
    with pytest.raises(LocalWireError, match="Submit"):
        codec.pack(start(nested(depth)))


LINKS: list[Any] = [*(getattr(messages, name) for name in UNIONS), Start, Finished]


def refused(data: bytes) -> None:
    """Every link takes `data` for a message, or refuses it with the one error that says whose fault it is."""
    for link in LINKS:
        try:
            codec.unpack(data, link)
        except RemoteWireError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90" * 2,
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xa4\xff\xfe\xfd\xfc",
        b"\xd6\xff\x00\x00\x00\x01",
        b"\xd4\x05\x00",
        msgpack.packb({"message": "Hello", "runner": 7, "pid": "x"}),
        msgpack.packb({"message": "Nope"}),
        msgpack.packb({"message": None}),
        msgpack.packb({1: 2}),
        msgpack.packb([1, 2, 3]),
        msgpack.packb({"message": "Hello", "runner": "r", "pid": 2**64 - 1}),
    ],
    ids=lambda data: data[:8].hex(),
)
def test_known_nastiness_is_theirs(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("data", [b"\x81\x90\x00", b"\x81\x80\x00", b"\x91\x81\x91\x00\x00"], ids=bytes.hex)
def test_a_map_key_that_cannot_be_one_is_theirs(data: bytes) -> None:
    refused(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_theirs(data: bytes) -> None:
    refused(data)


def test_damaged_messages_are_a_message_or_theirs(rng: random.Random) -> None:
    whole = [
        codec.pack(start({"deep": [1, 2.5, None, True, "text", {"k": b"bytes"}]})),
        codec.pack(Finished(token="t", ending="raised", failure=messages.TaskFailure(exception="E"))),
        codec.pack(messages.Forked(ask=1, index=2, pid=3)),
    ]
    for _ in range(3000):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            if rng.random() < 0.3:
                data[at:at] = rng.randbytes(rng.randrange(1, 4))
            elif rng.random() < 0.2 and len(data) > 1:
                del data[at]
            else:
                data[at] = rng.randrange(256)
        refused(bytes(data))
