"""When schedules are due: cron texts, changes of the clock, what is made up for."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskkit.timetable import (
    AT_ONCE,
    MOST_CAUGHT_UP,
    MOST_WAITING,
    PUNCTUAL,
    Timing,
    TimingError,
    ZoneMissing,
    checked,
    decide,
    fate,
)

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone: dt.tzinfo = dt.UTC, fold: int = 0) -> int:
    """Return Unix seconds of a local time."""
    return int(dt.datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp())


def slots(cron: str, tz: str, since: str, count: int) -> list[str]:
    """Return the first slots behind a local time, in UTC."""
    timing, moment = Timing(cron=cron, tz=tz), at(since, ZoneInfo(tz))
    found = []
    for _ in range(count):
        following = timing.after(moment)
        assert following is not None
        moment = following
        found.append(dt.datetime.fromtimestamp(moment, dt.UTC).strftime("%m-%d %H:%M"))
    return found


def check(cron: str | None = None, **given: object) -> Timing:
    wanted = {"every": None, "at": None, "tz": None, "zone": "UTC", "anchor": at("2026-01-01"), **given}
    return checked(cron=cron, **wanted)  # type: ignore[arg-type]


def errors(cron: str | None = None, **given: object) -> dict[str, str]:
    with pytest.raises(TimingError) as caught:
        check(cron, **given)
    return caught.value.errors


# --- cron texts


@pytest.mark.parametrize(
    ("cron", "first"),
    [
        ("0 0 13 * 5", "2026-01-02 00:00"),  # POSIX: the 13th or a Friday; the seed took both
        ("0 0 13 * *", "2026-01-13 00:00"),
        ("0 0 * * 5", "2026-01-02 00:00"),
        ("0 0 */2 * 5", "2026-01-09 00:00"),  # a star in front: Debian's cron wants both
        ("0 0 * * 0", "2026-01-04 00:00"),
        ("0 0 * * 7", "2026-01-04 00:00"),
        ("0 0 * * sun", "2026-01-04 00:00"),
        ("*/15 9-17 * JAN,jul MON-FRI", "2026-01-01 09:00"),
        ("5,10 0-6/3 1 2-4 *", "2026-02-01 00:05"),
        ("0 0 29 2 *", "2028-02-29 00:00"),
        ("0 0 L * *", "2026-01-31 00:00"),
        ("  0   12 * *  * ", "2026-01-01 12:00"),
    ],
)
def test_a_text_means_what_it_means_to_cron(cron: str, first: str) -> None:
    found = check(cron).after(at("2026-01-01"))
    assert found == at(first)


@pytest.mark.parametrize("cron", ["0 0 31 2 *", "0 0 30 feb *", "0 0 31 4,6,9,11 *", "0 0 */31 2 1#2"])
def test_a_date_that_never_comes_is_refused_at_once(cron: str) -> None:
    began = time.thread_time()
    assert "is never due" in errors(cron)["cron"]
    assert time.thread_time() - began < 0.05, "of its own CPU; the seed took 1.8 s"


@pytest.mark.parametrize(
    ("cron", "named", "remedy"),
    [
        ("61 * * * *", "minute '61'", "0-59"),
        ("* 24 * * *", "hour '24'", "0-23"),
        ("* * 0 * *", "day-of-month '0'", "1-31"),
        ("* * * FOO *", "month 'FOO'", "JAN-DEC"),
        ("* * * * 8", "day-of-week '8'", "SUN-SAT"),
        ("5-1 * * * *", "minute '5-1'", "1-5"),
        ("*/0 * * * *", "minute '*/0'", "*/2"),
        ("1,,2 * * * *", "minute '1,,2'", "1,2"),
        ("* * * *", "has 4 fields", "30 3 * * MON-FRI"),
        ("0 * * * * *", "has 6 fields", "every"),
        ("", "has 0 fields", "minute hour"),
        ("@daily", "'@daily'", "'0 0 * * *'"),
        ("1" * 300, "300 characters", "200"),
    ],
)
def test_a_wrong_text_names_the_field_with_a_remedy(cron: str, named: str, remedy: str) -> None:
    complaint = errors(cron)["cron"]
    assert named in complaint
    assert remedy in complaint


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789*/,-#L W@MONJA", max_size=30))
def test_any_text_is_a_timing_or_an_error_of_ours(cron: str) -> None:
    with contextlib.suppress(TimingError):
        assert check(cron).after(at("2026-01-01")) is not None


@pytest.mark.parametrize(
    "tz", ["Mars/Olympus", "Europe", "../../etc/passwd", "/etc/passwd", "x" * 5000, "\0"]
)
def test_a_zone_without_data_is_named_with_the_remedy(tz: str) -> None:
    complaint = errors("0 0 * * *", tz=tz)["tz"]
    assert "Europe/Berlin" in complaint
    assert "tzdata" in complaint
    with pytest.raises(ZoneMissing):
        Timing(cron="0 0 * * *", tz=tz).after(0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "cron"),
        ({"cron": "* * * * *", "every": 5}, "cron"),
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"every": -1}, "every"),
        ({"every": float("nan")}, "every"),
        ({"every": 5, "tz": "UTC"}, "tz"),
        ({"at": -1.0}, "at"),
        ({"at": 1e15}, "at"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, object], named: str) -> None:
    assert list(errors(**given)) == [named]  # type: ignore[arg-type]


# --- the clocks of a time zone


def test_a_fixed_time_that_is_jumped_over_comes_behind_the_gap() -> None:
    """In Berlin, 2026-03-29 has no 02:30: at 03:00 summer time, 01:00 UTC."""
    assert slots("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00", 3) == [
        *("03-28 01:30", "03-29 01:00", "03-30 00:30"),
    ]
    assert slots("0,30 2 * * *", "Europe/Berlin", "2026-03-29T00:00", 2) == ["03-29 01:00", "03-30 00:00"]


def test_a_fixed_time_that_comes_twice_is_one_slot() -> None:
    """In Berlin, 2026-10-25 has 02:30 twice: the first, summer time, is 00:30 UTC."""
    assert slots("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", 2) == ["10-25 00:30", "10-26 01:30"]
    timing = Timing(cron="30 2 * * *", tz="Europe/Berlin")
    second_time = at("2026-10-25T02:10", BERLIN, fold=1)
    assert timing.after(second_time) == at("2026-10-26T02:30", BERLIN), "asked within the second 02:00"


def test_with_a_star_real_time_counts() -> None:
    spring = slots("*/30 * * * *", "Europe/Berlin", "2026-03-29T01:00", 3)
    assert spring == ["03-29 00:30", "03-29 01:00", "03-29 01:30"]
    autumn = slots("30 * * * *", "Europe/Berlin", "2026-10-25T01:00", 4)
    assert autumn == ["10-24 23:30", "10-25 00:30", "10-25 01:30", "10-25 02:30"], "02:30 is kept twice"


def test_a_zone_that_changes_by_half_an_hour() -> None:
    assert slots("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", 2) == ["10-03 15:30", "10-04 15:15"]
    assert len(set(slots("*/10 * * * *", "Australia/Lord_Howe", "2026-04-05T00:00", 40))) == 40


ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "Asia/Kathmandu"]
)
CRONS = st.sampled_from(
    [
        *(
            "* * * * *",
            "*/7 * * * *",
            "30 * * * *",
            "0 */3 * * *",
            "30 2 * * *",
            "0,30 1-3 * * *",
            "15 2 * * 0",
        ),
        *("0 0 13 * 5", "0 0 L * *", "59 23 31 12 *", "*/20 2 * * *", "0 3 1 */2 *"),
    ]
)
#: Around both changes of 2026 in all these zones, to the second.
MOMENTS = st.integers(at("2026-02-01"), at("2026-12-01"))


@settings(max_examples=400, deadline=None)
@given(CRONS, ZONES, MOMENTS, st.integers(0, 86_400))
def test_whoever_asks_gets_the_same_slots(cron: str, tz: str, moment: int, later: int) -> None:
    """The next slot from anywhere between two slots is the later one: so trees agree, whenever they look."""
    timing = Timing(cron=cron, tz=tz)
    first = timing.after(moment)
    assert first is not None
    assert first > moment
    between = min(moment + later, first - 1)
    assert timing.after(between) == first
    assert timing.after(first - 0.5) == first


@settings(max_examples=200, deadline=None)
@given(CRONS, ZONES, MOMENTS, st.integers(0, 3 * 86_400), st.integers(1, 10))
def test_what_is_due_is_what_one_by_one_would_have_been(
    cron: str, tz: str, moment: int, width: int, most: int
) -> None:
    timing = Timing(cron=cron, tz=tz)
    first = timing.after(moment)
    assert first is not None
    expected, slot = [], first
    while slot is not None and slot <= first + width:
        expected.append(slot)
        slot = timing.after(slot)
    assert timing.due(first, first + width, most) == expected[-most:]


@given(st.integers(1, 10_000), st.integers(-(10**6), 10**6), st.integers(0, 10**7), st.integers(1, 50))
def test_intervals_are_counted_from_their_anchor(every: int, anchor: int, later: int, most: int) -> None:
    timing = Timing(every=every, anchor=anchor)
    slot = timing.after(anchor + later)
    assert slot is not None
    assert (slot - anchor) % every == 0
    assert anchor + later < slot <= anchor + later + every
    first = anchor + every
    found = timing.due(first, slot, most)
    assert found == [one for one in range(slot - (most - 1) * every, slot + 1, every) if one >= first]


def test_a_year_of_minutes_is_not_walked_through() -> None:
    began = time.thread_time()
    found = Timing(cron="* * * * *", tz="Europe/Berlin").due(at("2025-01-01"), at("2026-01-01"), 100)
    assert len(found) == 100
    assert found[-1] == at("2026-01-01")
    assert time.thread_time() - began < 0.5


def test_a_single_moment_is_due_once() -> None:
    timing = check(at=at("2026-05-01"))
    assert timing.after(at("2026-01-01")) == at("2026-05-01")
    assert timing.after(at("2026-05-01")) is None
    assert timing.due(at("2026-05-01"), at("2027-01-01"), 5) == [at("2026-05-01")]


# --- what is to be done

MINUTELY = Timing(cron="* * * * *")


def test_what_is_not_due_waits() -> None:
    assert decide(MINUTELY, 600, 599.9, "latest") is None


def test_what_is_due_is_kept() -> None:
    for catchup in ("latest", "all", "none"):
        decision = decide(MINUTELY, 600, 600.2, catchup)
        assert decision is not None
        assert decision == ([600], 660)


def test_of_what_was_missed_the_newest_is_made_up_for() -> None:
    assert decide(MINUTELY, 600, 6030, "latest") == ([6000], 6060)


def test_or_all_of_it_within_a_bound() -> None:
    assert decide(MINUTELY, 600, 750, "all") == ([600, 660, 720], 780)
    kept, following = list[int](), 600
    while (decision := decide(MINUTELY, following, 10**6, "all")) is not None:
        assert len(decision.slots) <= AT_ONCE, "in steps that a slow line can take"
        assert decision.next is not None
        kept, following = [*kept, *decision.slots], decision.next
    assert kept == [10**6 // 60 * 60 - 60 * back for back in reversed(range(MOST_CAUGHT_UP))]


def test_or_nothing_but_what_is_hardly_late() -> None:
    hourly = Timing(cron="0 * * * *")
    assert decide(hourly, 3600, 3600 + PUNCTUAL, "none") == ([3600], 7200)
    assert decide(hourly, 3600, 3601 + PUNCTUAL, "none") == ([], 7200)


def test_a_single_moment_leaves_nothing_to_wait_for() -> None:
    assert decide(Timing(at=50), 50, 70, "latest") == ([50], None)
    assert decide(Timing(at=50), 50, 1000, "none") == ([], None)


@given(
    st.lists(st.integers(0, 10**6), max_size=150, unique=True).map(sorted),
    st.sampled_from(["skip", "queue", "allow"]),
    st.booleans(),
    st.integers(0, 2 * MOST_WAITING),
)
def test_every_slot_has_one_fate(slots: list[int], overlap: str, is_open: bool, waiting: int) -> None:
    found = fate(slots, overlap, is_open=is_open, waiting=waiting)
    assert [*found.submitted, *found.waiting, *found.skipped] == slots
    if overlap == "allow":
        assert found.submitted == slots
        return
    assert len(found.submitted) <= (0 if is_open or waiting else 1), "one at a time, in order"
    if overlap == "skip":
        assert found.waiting == []
    else:
        assert waiting + len(found.waiting) <= max(waiting, MOST_WAITING)
    if slots and not (is_open or waiting):
        assert found.submitted == slots[:1]
