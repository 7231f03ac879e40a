"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.figures import Figure

#: Takes a number of repetitions and returns what was measured; leaves no process behind.
Function = Callable[[int], list[Figure]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry. `repetitions` is its usual number, enough for a p95 that repeats within a few percent."""

    name: str
    summary: str
    repetitions: int
    function: Function


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str, repetitions: int) -> Callable[[Function], Function]:
    """Register a function under `name`; its docstring's first line describes it in the list."""

    def register(function: Function) -> Function:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        BENCHMARKS[name] = Benchmark(name, summary, repetitions, function)
        return function

    return register
