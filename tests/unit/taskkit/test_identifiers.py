"""Names and ids as they leave the process."""

from __future__ import annotations

import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskkit.identifiers import (
    MAX_EVENT_NAME,
    check_event_name,
    is_task_name,
    new_run_id,
    new_token,
    parse_run_id,
)


def test_a_run_id_is_a_uuid7_of_now() -> None:
    before = time.time_ns() // 1_000_000
    found = uuid.UUID(new_run_id())
    after = time.time_ns() // 1_000_000
    assert found.version == 7
    assert found.variant == uuid.RFC_4122
    assert before <= found.int >> 80 <= after


def test_run_ids_sort_by_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(1_700_000_000_000, 1_700_000_000_500))
    monkeypatch.setattr("taskkit.identifiers.time.time_ns", lambda: next(moments) * 1_000_000)
    ids = [new_run_id() for _ in range(500)]
    assert ids == sorted(ids)


def test_run_ids_of_one_millisecond_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskkit.identifiers.time.time_ns", lambda: 1_700_000_000_000_000_000)
    assert len({new_run_id() for _ in range(2000)}) == 2000


def test_every_random_bit_keeps_version_and_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (0, 2**80 - 1):
        monkeypatch.setattr("taskkit.identifiers.secrets.randbits", lambda _, bits=bits: bits)
        found = uuid.UUID(new_run_id())
        assert (found.version, found.variant) == (7, uuid.RFC_4122)


def test_parse_run_id_gives_the_canonical_form() -> None:
    run = new_run_id()
    assert parse_run_id(run) == run
    assert parse_run_id(run.upper()) == run


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x" * 36,
        "0" * 32,
        "{00000000-0000-0000-0000-00000000000}",
        "00000000-0000-0000-0000-0000000000000",
        "00000000-0000-0000-0000-00000000000\n",
        "00000000-0000-0000-0000-00000000000\u0661"[:35] + "\u00b2",
    ],
)
def test_what_is_no_uuid_is_no_run_id(text: str) -> None:
    assert parse_run_id(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "----" + "a" * 32,
        "aaaaaaaa-aaaa-aaaa-aaaa-aaaa_aaa_aaa",
        "urn:" + "a" * 32,
        "+1234567-aaaa-aaaa-aaaa-aaaaaaaaaaaa",
        "\u0661" * 8 + "-aaaa-aaaa-aaaa-aaaaaaaaaaaa",
    ],
)
def test_what_only_python_reads_as_a_uuid_is_no_run_id(text: str) -> None:
    assert len(text) == 36
    assert parse_run_id(text) is None


def test_tokens_are_16_characters_that_never_repeat() -> None:
    tokens = {new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert {len(token) for token in tokens} == {16}


@pytest.mark.parametrize(
    "name", ["demo.count", "demo.ExampleTask", "a.b.c.d", "_x._y", "proj.t2", "app.größe"]
)
def test_task_names(name: str) -> None:
    assert is_task_name(name)


@pytest.mark.parametrize(
    "name", ["", "demo", ".x", "demo.", "demo..x", "demo.1x", "demo.a b", "demo.x\n", "a/b.c", "a.b-c"]
)
def test_no_task_names(name: str) -> None:
    assert not is_task_name(name)


@pytest.mark.parametrize(
    "name", ["progress", "complete", "error", "running", "run", "stream", "Open", "ereignis-größe", " a b "]
)
def test_event_names(name: str) -> None:
    assert check_event_name(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "non-empty"),
        (None, "non-empty"),
        (7, "non-empty"),
        (b"x", "non-empty"),
        ("a\nb", "CR, LF or NUL"),
        ("a\rb", "CR, LF or NUL"),
        ("a\0b", "CR, LF or NUL"),
        ("run.x", "reserved"),
        ("run.progress", "reserved"),
        ("stream.end", "reserved"),
        ("open", "reserved"),
        ("x" * (MAX_EVENT_NAME + 1), "at most"),
        ("ü" * (MAX_EVENT_NAME // 2 + 1), "at most"),
    ],
)
def test_refused_event_names_say_why(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_event_name(name)


def test_an_event_name_must_have_a_spelling_in_utf8() -> None:
    with pytest.raises(ValueError):
        check_event_name("\ud800")


@given(st.text())
def test_an_accepted_event_name_can_never_break_its_line(name: str) -> None:
    try:
        accepted = check_event_name(name)
    except ValueError:
        return
    line = f"event: {accepted}\n".encode("utf-8", "surrogatepass")
    assert len(line.replace(b"\r", b"\n").splitlines()) == 1 or not {b"\n", b"\r"} & {line[7:-1]}
    assert not set("\r\n\0") & set(accepted)
