"""Samples to the figures that are printed.

Percentiles are nearest-rank: each printed value was measured, none is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure is to reach.

    Attributes:
      limit: in the figure's unit.
      share: the percentile that is held against it, 0 to 1.
      least: whether the figure is to be at least, not at most so large.
    """

    limit: float
    share: float = 0.5
    least: bool = False

    def __str__(self) -> str:
        return f"p{self.share * 100:.0f} {'≥' if self.least else '≤'} {self.limit:,g}"

    def miss(self, figure: Figure) -> float:
        """Return by which part of the limit a figure misses it: 0.25 is a quarter; 0 and below: reached."""
        value = figure.percentile(self.share)
        return (self.limit - value if self.least else value - self.limit) / self.limit


def at_most(limit: float, share: float = 0.5) -> Goal:
    """Return the goal that the percentile `share` does not exceed `limit`."""
    return Goal(limit, share)


def at_least(limit: float, share: float = 0.5) -> Goal:
    """Return the goal that the percentile `share` reaches `limit`."""
    return Goal(limit, share, least=True)


@dataclass(frozen=True, slots=True)
class Figure:
    """What one quantity came to.

    Attributes:
      name: what was measured, from where to where.
      unit: of every number.
      samples: one per repetition, in their order.
      goals: what it is to reach; none: it is colour.
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    goals: tuple[Goal, ...] = ()

    def percentile(self, share: float) -> float:
        """Return the smallest sample that at least `share` (0 to 1) of all do not exceed."""
        ordered = sorted(self.samples)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def summary(self) -> dict[str, Any]:
        """Return the figure as JSON shows it."""
        return {
            "name": self.name,
            "unit": self.unit,
            "n": len(self.samples),
            "p50": self.percentile(0.50),
            "p95": self.percentile(0.95),
            "p99": self.percentile(0.99),
            "min": min(self.samples),
            "max": max(self.samples),
            "goals": [
                {"goal": str(goal), "reached": goal.miss(self) <= 0, "miss": round(goal.miss(self), 3)}
                for goal in self.goals
            ],
            "samples": list(self.samples),
        }


def figure(name: str, unit: str, samples: Sequence[float], *goals: Goal) -> Figure:
    """Return a figure of at least one sample.

    Raises:
      ValueError: there is none: a benchmark that measured nothing must not print as one that did.
    """
    if not samples:
        raise ValueError(f"nothing was measured: {name}")
    return Figure(name, unit, tuple(samples), goals)


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], *goals: Goal) -> Figure:
    """Return `ours` in parts of `theirs`, pair by pair in the order of measurement."""
    return figure(name, "x", [a / b for a, b in zip(ours, theirs, strict=True)], *goals)


def median(samples: Sequence[float]) -> float:
    """Return the nearest-rank median, which is one of the samples."""
    return figure("median", "", samples).percentile(0.5)


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as lines of text, one each, under a heading."""
    width = max(len(one.name) for one in figures)
    lines = [f"{'':<{width}} {'n':>6} {'p50':>10} {'p95':>10} {'p99':>10}   min..max"]
    for one in figures:
        shown = [f"{_short(one.percentile(share)):>10}" for share in (0.50, 0.95, 0.99)]
        spread = f"{_short(min(one.samples))}..{_short(max(one.samples))} {one.unit}"
        goals = "".join(f"   {goal}: {_judged(goal, one)}" for goal in one.goals)
        lines.append(f"{one.name:<{width}} {len(one.samples):>6} {' '.join(shown)}   {spread}{goals}")
    return "\n".join(lines)


def _judged(goal: Goal, one: Figure) -> str:
    miss = goal.miss(one)
    return "reached" if miss <= 0 else f"missed by {miss:.0%}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
