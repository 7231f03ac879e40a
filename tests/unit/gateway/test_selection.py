"""Types of events: what can be named, what gets through."""

from __future__ import annotations

import pytest

from gateway.selection import MAX_TYPES, check_types, split_types, wants


@pytest.mark.parametrize(
    ("texts", "types"),
    [
        ([], None),
        (["a"], {"a"}),
        (["a,b", "c"], {"a", "b", "c"}),
        ([" a , b "], {"a", "b"}),
        (["run.progress,stream.end"], {"run.progress", "stream.end"}),
        (["ünïcode,two words"], {"ünïcode", "two words"}),
    ],
)
def test_a_comma_list_or_repeated(texts: list[str], types: set[str] | None) -> None:
    assert split_types(texts) == types


@pytest.mark.parametrize("text", ["", "a,", ",", "a,,b", "a\nb", "\0", "x" * 201, "\ud800" * 300])
def test_what_names_no_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names of event types"):
        split_types([text])


def test_too_many_are_refused() -> None:
    check_types(str(n) for n in range(MAX_TYPES))
    with pytest.raises(ValueError, match=f"{MAX_TYPES} types at most, not {MAX_TYPES + 1}"):
        check_types(str(n) for n in range(MAX_TYPES + 1))


def test_the_streams_own_words_always_get_through() -> None:
    assert wants(None, "anything")
    assert wants(frozenset({"a"}), "a")
    assert not wants(frozenset({"a"}), "b")
    assert not wants(frozenset({"a"}), "run.started")
    for own in ("stream.end", "stream.reset", "stream.lag", "stream.busy"):
        assert wants(frozenset(), own)
