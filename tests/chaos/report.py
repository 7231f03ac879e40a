"""The verdict as people and programs read it. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.checker import Verdict
from tests.chaos.history import Hit

#: Evidence lines per rule in the printed report; the JSON has all.
SHOWN = 8


@dataclass(slots=True)
class Report:
    """Everything about one chaos run.

    Attributes:
      recovery: seconds by kind of kill, sorted.
      remarks: lines that are no violation: exit codes, failed starts, what could not be injected.
    """

    seed: int
    seconds: float
    rate: float
    verdict: Verdict
    hits: Sequence[Hit]
    missed: int
    recovery: Mapping[str, Sequence[float]]
    settled: float
    remarks: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, int]:
        """How many faults took place, by kind."""
        return dict(sorted(Counter(hit.kind for hit in self.hits).items()))

    def as_data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "rate": self.rate,
            "sound": self.verdict.sound,
            "figures": self.verdict.figures,
            "states": self.verdict.states,
            "faults": self.faults,
            "faults_total": len(self.hits),
            "faults_without_victim": self.missed,
            "recovery_seconds": {kind: summary(times) for kind, times in self.recovery.items()},
            "recovery_all": summary(self.all_recoveries),
            "settled_after": round(self.settled, 3),
            "remarks": self.remarks,
            "violations": [{"rule": it.rule, "text": it.text} for it in self.verdict.violations],
        }

    @property
    def all_recoveries(self) -> list[float]:
        """Every recovery, sorted."""
        return sorted(time for times in self.recovery.values() for time in times)

    def as_text(self) -> str:
        """Return the table."""
        lines = [f"chaos: seed {self.seed}, {self.seconds:.0f} s, {self.rate} faults a second", ""]
        lines += _table(self.verdict.figures)
        lines += ["", "runs by state", *_table(self.verdict.states)]
        lines += ["", f"faults: {len(self.hits)} ({self.missed} found no victim)", *_table(self.faults)]
        lines += ["", "recovery: kill to next event at a client, ms    n    p50    p99    max"]
        for kind, times in [*sorted(self.recovery.items()), ("all", self.all_recoveries)]:
            if times:
                p50, p99, most = (round(value * 1000) for value in summary(times).values() if value < 1e6)
                lines.append(f"  {kind:<42} {len(times):>6} {p50:>6} {p99:>6} {most:>6}")
        lines += ["", f"settled {self.settled:.1f} s after the last fault"]
        lines += [f"remark: {remark}" for remark in self.remarks]
        return "\n".join([*lines, "", *self._judgement()])

    def _judgement(self) -> list[str]:
        if self.verdict.sound:
            return [f"SOUND: every promise held (seed {self.seed})"]
        rules = Counter(it.rule for it in self.verdict.violations)
        lines = [
            f"BROKEN: {', '.join(f'{n} x {rule}' for rule, n in rules.most_common())} (seed {self.seed})"
        ]
        for rule in rules:
            texts = [it.text for it in self.verdict.violations if it.rule == rule]
            lines += [f"  {rule}: {text}" for text in texts[:SHOWN]]
            if len(texts) > SHOWN:
                lines.append(f"  {rule}: … and {len(texts) - SHOWN} more")
        return lines


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return p50, p99 and max of sorted times, seconds; empty for none."""
    if not times:
        return {}
    return {"p50": _quantile(times, 0.5), "p99": _quantile(times, 0.99), "max": round(times[-1], 4)}


def _quantile(times: Sequence[float], share: float) -> float:
    return round(times[min(len(times) - 1, math.ceil(share * len(times)) - 1)], 4)


def _table(figures: Mapping[str, int]) -> list[str]:
    return [f"  {name:<28}{value:>9,}" for name, value in figures.items()]
