"""Samples to the figures that are printed.

Percentiles are nearest-rank: each printed value was measured, none is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """What one quantity came to.

    Attributes:
      name: what was measured, from where to where.
      unit: of every number.
      samples: one per repetition, in their order.
      goal: what the figure is compared with by the reader, in words.
    """

    name: str
    unit: str
    samples: tuple[float, ...]
    goal: str = ""

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
            "goal": self.goal,
        }


def figure(name: str, unit: str, samples: Sequence[float], goal: str = "") -> Figure:
    """Return a figure of at least one sample.

    Raises:
      ValueError: there is none: a benchmark that measured nothing must not print as one that did.
    """
    if not samples:
        raise ValueError(f"nothing was measured: {name}")
    return Figure(name, unit, tuple(samples), goal)


def ratio(name: str, slow: Sequence[float], fast: Sequence[float]) -> Figure:
    """Return how many times `slow` each `fast` took, pair by pair in the order of measurement."""
    return figure(name, "x", [a / b for a, b in zip(slow, fast, strict=True)])


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as lines of text, one each, under a heading."""
    width = max(len(one.name) for one in figures)
    lines = [f"{'':<{width}} {'n':>6} {'p50':>10} {'p95':>10} {'p99':>10}   min..max"]
    for one in figures:
        shown = [f"{_short(one.percentile(share)):>10}" for share in (0.50, 0.95, 0.99)]
        spread = f"{_short(min(one.samples))}..{_short(max(one.samples))} {one.unit}"
        goal = f"   goal: {one.goal}" if one.goal else ""
        lines.append(f"{one.name:<{width}} {len(one.samples):>6} {' '.join(shown)}   {spread}{goal}")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
