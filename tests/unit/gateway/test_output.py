"""Output bytes to lines: every cut, what user code forges, what is too much."""

from __future__ import annotations

import json
import random

import pytest

from gateway.output import MAX_LINE, Line, OutputParser

RATE = 1_000_000


def _feed(*pieces: bytes, rate: int = RATE) -> dict[str, list[Line]]:
    parser = OutputParser(rate)
    found: dict[str, list[Line]] = {}
    for number, piece in enumerate(pieces):
        for token, lines in parser.receive(piece, number / 1000).items():
            found.setdefault(token, []).extend(lines)
    return found


LOG = json.dumps({"level": "INFO", "logger": "a.b", "text": "first\nsecond"}).encode()

SAMPLE = (
    b"\x1eBtok\x1f\n"
    b"\x1eotok\x1fprinted\n"
    b"from a C library\n"
    b"\x1eetok\x1fon stderr \xc3\xa9\n"
    b"\x1eltok\x1f" + LOG + b"\n"
    b"half a line\n"
    b"\x1eEtok\x1f\n"
    b"after the end\n"
)
EXPECTED = {
    "tok": [
        Line("stdout", "printed"),
        Line("output", "from a C library"),
        Line("stderr", "on stderr é"),
        Line("logging", "first\nsecond", "INFO", "a.b"),
        Line("output", "half a line"),
    ],
    "": [Line("output", "after the end")],
}


def test_lines_of_every_kind_belong_to_their_attempt() -> None:
    assert _feed(SAMPLE) == EXPECTED


@pytest.mark.parametrize("cut", range(1, len(SAMPLE)))
def test_no_cut_in_two_makes_a_difference(cut: int) -> None:
    assert _feed(SAMPLE[:cut], SAMPLE[cut:]) == EXPECTED


def test_byte_by_byte_makes_no_difference() -> None:
    assert _feed(*(SAMPLE[i : i + 1] for i in range(len(SAMPLE)))) == EXPECTED


def test_random_cuts_of_long_lines_make_no_difference(rng: random.Random) -> None:
    lines = [b"\x1eotok\x1f" + "é".encode() * rng.randint(0, 8_192) for _ in range(12)]
    lines += [b"x" * rng.randint(0, 3 * MAX_LINE) for _ in range(12)]
    data = b"\n".join([b"\x1eBtok\x1f", *rng.sample(lines, len(lines)), b""])
    expected = _feed(data)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(data)), rng.randint(1, 60)))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert _feed(*pieces) == expected


def test_a_line_without_an_end_is_given_out_in_pieces_and_never_kept_whole() -> None:
    parser = OutputParser(RATE)
    parser.receive(b"\x1eBtok\x1f\n", 0.0)
    given = 0
    for _ in range(300):
        given += sum(len(line.text) for line in parser.receive(b"y" * 1000, 0.0).get("tok", []))
        assert len(parser._rest) <= MAX_LINE
    assert given + len(parser._rest) == 300_000


def test_a_log_record_of_the_longest_text_python_sends_stays_a_record() -> None:
    """capture cuts a text at 8,192 characters; each may take six bytes in JSON."""
    text = "\x1b" * 8_192
    body = json.dumps({"level": "INFO", "logger": "x", "text": text}).encode()
    record = b"\x1eltok\x1f" + body + b"\n"
    found = _feed(record[:40_000], record[40_000:])
    assert found == {"tok": [Line("logging", text, "INFO", "x")]}


@pytest.mark.parametrize(
    "record",
    [
        b"\x1e",
        b"\x1eo",
        b"\x1f",
        b"\x1eotok",
        b"\x1ez\x1f",
        b"\x1e\x1f\x1f",
        b"\x1eo\xff\xfe\x1fx",
        b"\x1el\x1f{",
        b"\x1el\x1f[]",
        b'\x1el\x1f{"level": 5}',
        b"\x1el\x1f\xff",
        b"\x1eB\xff\x1f",
        b"\x1eE" + b"t" * 40_000 + b"\x1f",
    ],
)
def test_forged_records_are_text_or_nothing_and_never_an_error(record: bytes) -> None:
    found = _feed(b"\x1eBtok\x1f\n" + record + b"\n\x1eotok\x1fstill here\n")
    assert Line("stdout", "still here") in found["tok"]


def test_a_forged_begin_gives_plain_lines_away_but_not_marked_ones() -> None:
    found = _feed(b"\x1eBmine\x1f\n\x1eBother\x1f\nplain\n\x1eomine\x1fmarked\n")
    assert found == {"other": [Line("output", "plain")], "mine": [Line("stdout", "marked")]}


def test_forged_end_markers_are_not_collected() -> None:
    parser = OutputParser(10)
    parser.receive(b"".join(b"\x1eEt%d\x1f\n" % i for i in range(5_000)), 0.0)
    assert len(parser.ended) < 100


def test_what_would_break_a_stream_is_shown_as_a_sign() -> None:
    found = _feed(b"\x1eot\x1fa\rb\0c\r\n\x1eot\x1f\xff\n")
    assert [line.text for line in found["t"]] == ["a␍b␀c", "�"]


def test_too_many_lines_are_dropped_with_a_count() -> None:
    parser = OutputParser(10)
    many = b"".join(b"\x1eot\x1f%d\n" % i for i in range(25))
    first = parser.receive(many, 100.0)["t"]
    assert [line.text for line in first] == [str(i) for i in range(10)]
    assert parser.receive(b"", 100.01) == {}  # still no room
    told = parser.receive(b"", 100.2)["t"]
    assert [line.text for line in told] == ["… 15 lines dropped: more than 10 a second"]
    assert parser.receive(b"", 101.0) == {}  # told once


def test_the_allowance_fills_up_to_one_second_and_no_further() -> None:
    parser = OutputParser(10)
    parser.receive(b"", 0.0)
    many = b"".join(b"\x1eot\x1f%d\n" % i for i in range(25))
    assert len(parser.receive(many, 3600.0)["t"]) == 10


def test_an_attempts_end_brings_its_count_out() -> None:
    parser = OutputParser(3)
    lines = b"".join(b"\x1eot\x1f%d\n" % i for i in range(9))
    found = parser.receive(b"\x1eBt\x1f\n" + lines + b"\x1eEt\x1f\n", 0.0)["t"]
    assert [line.text for line in found] == ["0", "1", "2", "… 6 lines dropped: more than 3 a second"]
    assert parser.ended == set()
    assert parser.receive(b"", 9.0) == {}


def test_the_sum_of_kept_and_dropped_is_what_was_printed(rng: random.Random) -> None:
    parser = OutputParser(50)
    kept = dropped = printed = 0
    now = 0.0
    for _ in range(300):
        now += rng.random() / 20
        number = rng.randint(0, 20)
        printed += number
        for line in parser.receive(b"\x1eot\x1fx\n" * number, now).get("t", []):
            if line.stream == "output":
                dropped += int(line.text.split()[1])
            else:
                kept += 1
    for line in parser.receive(b"\x1eEt\x1f\n", now + 10.0).get("t", []):
        dropped += int(line.text.split()[1])
    assert kept + dropped == printed
    assert dropped
