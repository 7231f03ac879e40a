"""The sans-I/O half of the client: decoding a stream, resuming it, giving up."""

from __future__ import annotations

import random

import pytest

from taskkit import following
from taskkit.credentials import Credentials
from taskkit.errors import GatewayError
from taskkit.following import EventDecoder, Following, Pauses, StreamEvent, parse_retry_after, refusal

STREAM = (
    b"\xef\xbb\xbfretry: 1500\r\n: hello\r\n\r\n"
    b'id: 1\nevent: progress\ndata: {"step": 1}\n\n'
    b"id: 2\rdata: two\rdata: lines\r\r"
    b"id:3\r\nevent:gr\xc3\xbc\xc3\x9fe\r\ndata:  leading space\r\n\r\n"
    b"data: keeps the id\n\n"
    b"id: 4\nevent: no data is no event\n\n"
    b'id: 5\nevent: stream.end\ndata: {"status":"SUCCESSFUL"}\n\n'
    b"id: 6\nevent: cut\ndata: never dispatched\n"
)
EVENTS = [
    StreamEvent("1", "progress", {"step": 1}),
    StreamEvent("2", "message", "two\nlines"),
    StreamEvent("3", "grüße", " leading space"),
    StreamEvent("3", "message", "keeps the id"),
    StreamEvent("5", "stream.end", {"status": "SUCCESSFUL"}),
]


def decode(*parts: bytes) -> tuple[list[StreamEvent], EventDecoder]:
    decoder = EventDecoder()
    return [event for part in parts for event in decoder.receive_data(part)], decoder


def test_whole_stream() -> None:
    events, decoder = decode(STREAM)
    assert events == EVENTS
    assert decoder.last_id == "5"
    assert decoder.retry == 1.5


def test_every_single_cut_gives_the_same_events() -> None:
    for cut in range(len(STREAM) + 1):
        assert decode(STREAM[:cut], STREAM[cut:])[0] == EVENTS, cut


def test_byte_by_byte_gives_the_same_events() -> None:
    assert decode(*(STREAM[i : i + 1] for i in range(len(STREAM))))[0] == EVENTS


def test_two_hundred_random_cuts_give_the_same_events() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        cuts = sorted(chance.sample(range(len(STREAM)), 12))
        parts = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
        assert decode(*parts)[0] == EVENTS, f"seed {seed}"


def test_garbage_never_raises_anything_but_gateway_error() -> None:
    for seed in range(300):
        chance = random.Random(seed)
        alphabet = b"\r\n:\0 idataeventretry0\xff\xef\xbb\xbf"
        garbage = bytes(chance.choice(alphabet) for _ in range(chance.randrange(400)))
        whole, _ = decode(garbage)
        cut = chance.randrange(len(garbage) + 1)
        assert decode(garbage[:cut], garbage[cut:])[0] == whole, f"seed {seed}"


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"])
def test_each_line_end_counts_once(line_end: bytes) -> None:
    data = line_end.join((b"data: a", b"data:", b"data: b", b"", b""))
    assert decode(data)[0] == [StreamEvent("", "message", "a\n\nb")]


def test_an_id_with_nul_is_ignored() -> None:
    events, decoder = decode(b"id: 1\ndata: x\n\nid: 2\0\ndata: y\n\n")
    assert [event.id for event in events] == ["1", "1"]
    assert decoder.last_id == "1"


def test_the_id_of_an_unfinished_block_is_no_cursor() -> None:
    assert decode(b"id: 1\ndata: x\n\nid: 2\ndata: y\n")[1].last_id == "1"


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"soon", "\u0661".encode()])
def test_a_retry_that_is_not_ascii_digits_is_ignored(value: bytes) -> None:
    assert decode(b"retry: " + value + b"\n\n")[1].retry is None


def test_an_absurd_retry_is_bounded() -> None:
    assert decode(b"retry: 99999999999999999999\n\n")[1].retry == following.LONGEST_RETRY


def test_an_endless_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MAX_BLOCK", 1000)
    with pytest.raises(GatewayError, match="1000 bytes"):
        decode(*(b"x" * 100 for _ in range(11)))
    with pytest.raises(GatewayError, match="1000 bytes"):
        decode(*(b"data: " + b"x" * 90 + b"\n" for _ in range(13)))


def test_many_small_blocks_are_not_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "MAX_BLOCK", 1000)
    assert len(decode(*(b"data: " + b"x" * 90 + b"\n\n" for _ in range(50)))[0]) == 50


def begin(after: str = "", patience: float = 10.0) -> Following:
    return Following("r", after, patience=patience, now=0.0)


def head(kind: str = "text/event-stream", **headers: str) -> dict[str, str]:
    return {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}


def sent(it: Following) -> dict[str, str]:
    """Return the headers of the next request."""
    headers: dict[str, str] = it.request({"Authorization": "Bearer t"})["headers"]
    return headers


def test_resumes_after_the_last_complete_event() -> None:
    it = begin()
    assert "Last-Event-ID" not in sent(it)
    assert it.answered(200, head("text/event-stream; charset=utf-8"), 0.0)
    it.receive_data(b"id: 7\ndata: x\n\nid: 8\ndata: cut", 0.0)
    assert sent(it)["Last-Event-ID"] == "7"
    assert it.answered(200, head(), 0.0)
    assert it.receive_data(b"id: 8\ndata: whole\n\n", 0.0) == [StreamEvent("8", "message", "whole")]


def test_a_given_cursor_is_sent_at_once() -> None:
    assert sent(begin("41"))["Last-Event-ID"] == "41"


def test_a_request_carries_token_types_and_what_is_wanted_of_the_output() -> None:
    plain = begin().request({"Authorization": "Bearer t"})
    assert plain["url"] == "/api/v1/runs/r/events"
    assert plain["headers"]["Authorization"] == "Bearer t"
    assert plain["params"] == {}
    it = Following("a/b", types=("month", "year"), output=True, patience=1.0, now=0.0)
    assert it.request({})["url"] == "/api/v1/runs/a%2Fb/events"
    assert it.request({})["params"] == {"types": "month,year,log", "include": "log"}


def test_a_refused_token_is_asked_for_anew_once_per_connection_that_worked() -> None:
    it, credentials = begin(), Credentials(lambda: "t")
    assert not it.is_refusal(401, credentials)
    assert it.is_refusal(401, credentials), "the new one was refused as well"
    it.answered(200, head(), 0.0)
    assert not it.is_refusal(401, credentials)
    assert it.is_refusal(403, credentials), "another token of the same source may do no more"


@pytest.mark.parametrize(
    ("type", "data", "lines"),
    [
        ("log", {"text": "one"}, ["one"]),
        ("log", {"text": "one\ntwo\n"}, ["one", "two"]),
        ("log", {"text": ""}, [""]),
        ("progress", {"value": "yielded"}, ["yielded"]),
        ("progress", {"value": 1, "text": "no line"}, []),
        ("progress", "no object", []),
    ],
)
def test_what_counts_as_printed(type: str, data: object, lines: list[str]) -> None:
    assert following.printed(StreamEvent("1", type, data)) == lines


def test_nothing_follows_stream_end() -> None:
    it = begin()
    it.answered(200, head(), 0.0)
    events = it.receive_data(b"event: stream.end\ndata: {}\n\ndata: more\n\n", 0.0)
    assert [event.type for event in events] == ["stream.end"]
    assert it.ended


def test_204_is_the_end() -> None:
    it = begin("9")
    assert not it.answered(204, {}, 0.0)
    assert it.ended


@pytest.mark.parametrize(("status", "final"), [(401, True), (404, True), (400, True), (200, True)])
@pytest.mark.parametrize("kind", ["application/problem+json", "text/html"])
def test_other_answers_are_refusals(status: int, final: bool, kind: str) -> None:
    it = begin()
    assert not it.answered(status, head(kind), 0.0)
    assert not it.ended
    assert it.is_refusal(status, Credentials("t")) is final


@pytest.mark.parametrize("status", sorted(following.TRY_AGAIN))
def test_overload_is_tried_again_not_before_retry_after(status: int) -> None:
    it = begin()
    assert not it.answered(status, head("application/problem+json", retry_after="7"), 0.0)
    assert not it.is_refusal(status, Credentials("t"))
    assert it.pause(1.0) >= 7


def test_a_busy_gateway_is_not_an_event_of_the_run() -> None:
    it = begin()
    it.answered(200, head(), 0.0)
    assert it.receive_data(b"retry: 5000\nevent: stream.busy\ndata: {}\n\n", 0.0) == []
    assert it.pause(0.0) >= 5


def test_a_clean_end_waits_as_long_as_the_gateway_asked() -> None:
    it = begin()
    it.answered(200, head(), 0.0)
    it.receive_data(b"retry: 2500\n\n", 0.0)
    sent(it)
    assert it.pause(0.0) >= 2.5


def test_a_broken_connection_is_tried_again_soon() -> None:
    it = begin()
    it.answered(200, head(), 0.0)
    it.receive_data(b"retry: 2500\n\n", 0.0)
    it.lost = True
    assert it.pause(0.0) <= following.FIRST_PAUSE


def test_gives_up_when_patience_ends() -> None:
    it = begin(patience=10)
    it.pause(9.9)
    with pytest.raises(GatewayError, match="did not come back"):
        it.pause(10.0)


def test_a_sign_of_life_renews_patience() -> None:
    it = begin(patience=10)
    it.answered(200, head(), 9.0)
    it.pause(18.0)
    it.receive_data(b":\n", 18.5)
    it.pause(28.0)


def test_pauses_grow_to_a_cap_and_never_vanish() -> None:
    low, high = Pauses(1e9, 0.0, lambda: 0.0), Pauses(1e9, 0.0, lambda: 0.999)
    lows = [low.next(0.0) or 0 for _ in range(20)]
    highs = [high.next(0.0) or 0 for _ in range(20)]
    assert lows[0] == following.FIRST_PAUSE / 2
    assert lows == sorted(lows)
    assert max(highs) <= following.LONGEST_PAUSE
    low.alive(0.0)
    assert low.next(0.0) == following.FIRST_PAUSE / 2


def test_retry_after_is_seconds_or_nothing() -> None:
    assert [parse_retry_after(t) for t in (None, "", "3", "Fri, 31 Dec 1999 23:59:59 GMT")] == [0, 0, 3, 0]
    assert parse_retry_after("999999") == following.LONGEST_RETRY


def test_a_refusal_carries_the_problem_and_names_the_fields() -> None:
    error = refusal(422, b'{"title":"T","detail":"bad","errors":{"n":"must be a number"}}', "http://x/")
    assert str(error) == "bad; n: must be a number"
    assert error.problem["status"] == 422
    assert "502" in str(refusal(502, b"<html>", "http://x/"))
