"""A wall clock is believed as long as it moves like time."""

from __future__ import annotations

import random

from gateway.ages import HOLD, TOLERANCE, AgeClock

DAY = 86_400.0


def test_a_clock_that_moves_like_time_is_believed() -> None:
    clock = AgeClock("boot")
    for day in range(400):
        drift = day * 20.0  # slewed by NTP
        assert clock.look(1e9 + day * DAY + drift, 50.0 + day * DAY)


def test_a_jump_ahead_is_not_believed_for_a_day() -> None:
    clock = AgeClock("boot")
    assert clock.look(1e9, 0.0)
    assert not clock.look(2e9, 30.0)
    assert clock.held
    assert not clock.look(2e9 + HOLD - 60, 30.0 + HOLD - 60)
    assert clock.look(2e9 + HOLD, 30.0 + HOLD)
    assert not clock.held
    assert clock.look(2e9 + HOLD + 30, 60.0 + HOLD)


def test_a_clock_that_goes_back_to_what_it_was_is_believed_at_once() -> None:
    clock = AgeClock("boot")
    assert clock.look(1e9, 0.0)
    assert not clock.look(2e9, 30.0)
    assert clock.look(1e9 + 60, 60.0)
    assert not clock.held


def test_a_jump_back_makes_everything_younger_and_is_believed() -> None:
    clock = AgeClock("boot")
    assert clock.look(1e9, 0.0)
    assert clock.look(5e8, 30.0)
    assert clock.look(5e8 + 30, 60.0)


def test_a_new_life_remembers_what_was_believed() -> None:
    first = AgeClock("boot")
    assert first.look(1e9, 1000.0)
    second = AgeClock("boot", first.note())
    assert not second.look(2e9, 1030.0)
    third = AgeClock("boot", second.note())
    assert not third.look(2e9 + 60, 1090.0), "a restart does not make a wrong clock right"
    assert third.look(1e9 + 120, 1120.0)


def test_a_machine_that_was_off_for_long_waits_a_day() -> None:
    first = AgeClock("boot-1")
    assert first.look(1e9, 1000.0)
    assert AgeClock("boot-2", first.note()).look(1e9 + HOLD, 20.0)
    clock = AgeClock("boot-2", first.note())
    assert not clock.look(1e9 + 40 * DAY, 20.0)
    assert clock.look(1e9 + 41 * DAY, 20.0 + DAY)


def test_a_note_that_cannot_be_read_is_none() -> None:
    for text in ("", "x", "{}", '{"wall":"x"}', "[1]"):
        assert AgeClock("boot", text).look(1e9, 0.0)


def test_no_sequence_of_jumps_makes_anything_older_than_a_day_too_much(rng: random.Random) -> None:
    """Between two looks that may act the clock has moved no further than time has, or HOLD has passed."""
    for _ in range(200):
        clock, wall, counted = AgeClock("boot"), 1e9, 0.0
        assert clock.look(wall, counted)
        believed = wall, counted
        held_for = 0.0
        for _ in range(40):
            step = rng.choice([1.0, 30.0, 3600.0, DAY / 2])
            counted += step
            wall += step + rng.choice([0.0] * 6 + [1e4, 1e8, -1e4, -1e8])
            held_for = held_for + step if clock.held else 0.0
            if clock.look(wall, counted):
                ahead = (wall - believed[0]) - (counted - believed[1])
                assert ahead <= TOLERANCE or held_for >= HOLD
                believed = wall, counted
