"""Contestants that take turns, so that all meet the same weather on the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Sample = TypeVar("Sample")


def interleave(rounds: int, contestants: Mapping[str, Callable[[], Sample]]) -> dict[str, list[Sample]]:
    """Have each contestant measure once a round; return its samples in the order of the rounds.

    Who begins moves on by one each round: what a neighbour leaves behind meets everybody.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contestants[name]())
    return samples
