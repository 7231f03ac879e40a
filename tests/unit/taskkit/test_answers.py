"""Views' answers as JSON has them: text, JSON, bytes; whole, cut, in chunks."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from django.http import HttpResponse

pytestmark = pytest.mark.usefixtures("django_project")


def response(content: bytes, content_type: str) -> HttpResponse:
    from django.http import HttpResponse

    return HttpResponse(content, content_type=content_type)


@pytest.mark.parametrize(
    ("content", "content_type", "shown"),
    [
        (b'{"a": [1, null]}', "application/json", {"response": {"a": [1, None]}}),
        (b'{"a": 1}', "application/vnd.api+json", {"response": {"a": 1}}),
        (b'{"a": NaN}', "application/json", {"response": '{"a": NaN}'}),
        (b"{", "application/json", {"response": "{"}),
        (b"[" * 100_000, "application/json", {"response": "[" * 100_000}),
        ("é".encode("latin-1"), "text/plain; charset=latin-1", {"response": "é"}),
        ("é".encode("latin-1"), "text/plain; charset=utf-8", {"response": "6Q==", "encoding": "base64"}),
        (b"x", "text/plain; charset=no-such", {"response": "x"}),
        (b"zz", "text/plain; charset=hex", {"response": "zz"}),
        (b"zz", "text/plain; charset=undefined", {"response": "zz"}),
        (b"", "", {"response": ""}),
    ],
)
def test_a_body_is_told_as_what_it_is(content: bytes, content_type: str, shown: dict[str, object]) -> None:
    from taskkit.async_request import answers

    kept = answers.Kept(1_000_000)
    kept.add(content)
    document = answers.shown(response(content, content_type), kept, endpoint="/")
    assert {name: document[name] for name in ("response", "encoding") if name in document} == shown


@given(text=st.text(max_size=40), limit=st.integers(0, 40), cuts=st.lists(st.integers(1, 7), min_size=1))
def test_chunks_and_a_cut_never_break_a_character(text: str, limit: int, cuts: list[int]) -> None:
    from taskkit.async_request import answers

    data = text.encode()
    answer = response(b"", "text/plain")
    said, kept = answers.spoken(answer), answers.Kept(limit)
    told = ""
    position = 0
    while position < len(data):
        size = cuts[position % len(cuts)]
        chunk = data[position : position + size]
        kept.add(chunk)
        told += "".join(event["text"] for event in said(chunk))
        position += size
    told += "".join(event["text"] for event in said(b"", final=True))
    assert told == text
    document = answers.shown(answer, kept, endpoint="/")
    assert text.startswith(document["response"])
    assert document.get("truncated", False) is (len(data) > limit)


def test_large_chunks_of_bytes_are_told_in_pieces() -> None:
    from taskkit.async_request import answers

    data = bytes(range(256)) * 3_000
    pieces = list(answers.spoken(response(b"", "image/png"))(data))
    assert len(pieces) == 3
    assert b"".join(base64.b64decode(piece["base64"]) for piece in pieces) == data
