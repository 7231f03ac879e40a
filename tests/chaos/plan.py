"""Which faults happen when: a whole run, decided by its seed before it begins. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

#: What a process of the tree can be, as victims of a fault.
ROLES: Final = ("supervisor", "gateway", "zygote", "courier", "runner", "busy", "intake")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
      weight: how often it is drawn, compared with the others.
      seconds: shortest and longest; (0, 0) for what happens in a moment.
      victims: roles of the processes it hits, all at the same moment.
    """

    name: str
    weight: float
    seconds: tuple[float, float] = (0.0, 0.0)
    victims: tuple[str, ...] = ()

    @property
    def action(self) -> str:
        """The first word of the name: what is done."""
        return self.name.partition("-")[0]


def _kill(weight: float, *victims: str) -> Kind:
    return Kind(f"kill-{'+'.join(victims)}", weight, victims=victims)


def _stop(weight: float, victim: str) -> Kind:
    return Kind(f"stop-{victim}", weight, (0.1, 12.0), (victim,))


KINDS: Final = (
    _kill(10, "gateway"),
    _kill(5, "zygote"),
    _kill(5, "courier"),
    _kill(6, "runner"),
    _kill(10, "busy"),
    _kill(2, "intake"),
    _kill(1.2, "supervisor"),
    _kill(3, "gateway", "busy"),
    _kill(2, "gateway", "zygote"),
    _kill(2, "courier", "gateway"),
    _kill(2, "zygote", "busy"),
    _kill(1, "courier", "zygote"),
    _kill(0.5, "gateway", "supervisor"),
    _kill(0.5, "supervisor", "busy"),
    _kill(0.5, "supervisor", "zygote"),
    _stop(2, "gateway"),
    _stop(2, "zygote"),
    _stop(2, "courier"),
    _stop(3, "busy"),
    _stop(1, "supervisor"),
    Kind("reload", 1, victims=("supervisor",)),
    Kind("upgrade", 1, victims=("supervisor",)),
    Kind("park-gateway", 1, victims=("gateway",)),
    Kind("full-disk", 1.5, (0.5, 4.0)),
    Kind("full-file", 1.5, (0.5, 3.0), ("gateway",)),
    Kind("full-pipe", 2, (0.5, 4.0), ("gateway",)),
    Kind("descriptors-gateway", 1.5, (0.5, 3.0), ("gateway",)),
    Kind("descriptors-supervisor", 1.5, (0.5, 3.0), ("supervisor",)),
    Kind("garbage-http", 5),
    Kind("garbage-frames", 5),
    Kind("clients-reset", 5),
    Kind("clients-stalled", 2, (1.0, 12.0)),
    Kind("database-locked", 2, (0.5, 4.0)),
    Kind("database-away", 2, (0.5, 4.0)),
    Kind("django-killed", 1),
)

BY_NAME: Final = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a plan.

    Attributes:
      at: seconds after the load has begun.
      seconds: how long it lasts; 0.0 for a moment.
      rank: from 0 to 1, which of several possible victims.
      number: in the order of the plan, from 1.
    """

    number: int
    at: float
    kind: Kind
    seconds: float
    rank: float

    def pick(self, candidates: Sequence[int]) -> int | None:
        """Return the victim among `candidates`, or None when there is none."""
        ordered = sorted(candidates)
        return ordered[min(int(self.rank * len(ordered)), len(ordered) - 1)] if ordered else None


def select(names: Iterable[str]) -> list[Kind]:
    """Return the kinds that are named, each exactly or by its first word.

    Raises:
      ValueError: nothing is called so.
    """
    chosen: list[Kind] = []
    for name in names:
        found = [kind for kind in KINDS if name in (kind.name, kind.action)]
        if not found:
            raise ValueError(f"no fault is called {name!r}; there are {', '.join(BY_NAME)}")
        chosen += [kind for kind in found if kind not in chosen]
    return chosen


def make_plan(seed: int, seconds: float, rate: float, kinds: Sequence[Kind] = KINDS) -> list[Fault]:
    """Return the faults of a run of `seconds`, `rate` a second on average, the same for the same arguments."""
    return list(_draw(random.Random(f"faults {seed}"), seconds, rate, kinds))


def _draw(rng: random.Random, seconds: float, rate: float, kinds: Sequence[Kind]) -> Iterator[Fault]:
    weights = [kind.weight for kind in kinds]
    number, at = 0, rng.expovariate(rate)
    while at < seconds:
        number += 1
        (kind,) = rng.choices(kinds, weights)
        low, high = kind.seconds
        # Short ones are more frequent: the square keeps a stop of 12 s possible, and its mean at a third.
        lasts = low + (high - low) * rng.random() ** 2
        yield Fault(number, at, kind, lasts, rng.random())
        at += rng.expovariate(rate)
