"""The decorator that says when a task is to be run.

It only notes: `taskkit.schedules` turns what is noted into rows when a tree starts. Imports no Django.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

from msgspec import Struct

from taskkit.timetable import CATCH_UPS, OVERLAPS, CatchUp, Overlap, TimingError, checked

_T = TypeVar("_T")

#: What a schedule may be called beside its task's name.
NAME: Final = re.compile(r"[\w.-]{1,100}")

_ATTRIBUTE: Final = "bulkhead_schedules"


class Noted(Struct, frozen=True, kw_only=True):
    """One `@schedule`, as it was written; `every` in seconds."""

    name: str
    cron: str | None
    every: float | None
    tz: str | None
    overlap: str
    catchup: str
    args: list[Any]
    kwargs: dict[str, Any]


#: Decorated functions by (module, name): a reloaded module replaces its own.
_functions: dict[tuple[str, str], Callable[..., Any]] = {}


def functions() -> list[Callable[..., Any]]:
    """Return every function that `@schedule` was on so far in this process."""
    return list(_functions.values())


def noted_on(function: Any) -> list[Noted]:
    """Return what was noted on a function, in the order in which it is written."""
    return list(reversed(getattr(function, _ATTRIBUTE, [])))


def schedule(
    *,
    cron: str | None = None,
    every: float | timedelta | None = None,
    tz: str | None = None,
    overlap: Overlap = "skip",
    catchup: CatchUp = "latest",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str = "",
) -> Callable[[_T], _T]:
    """Have a task run by the clock: above or below `@task`, once or several times.

    Args:
      cron: five fields, as Debian's cron reads them: `"30 3 * * MON-FRI"`.
      every: seconds from one run to the next, instead of `cron`.
      tz: time zone of `cron`; by default the project's TIME_ZONE.
      overlap: while an earlier run has not ended, the next is left out ("skip"), waits ("queue"), or not ("allow").
      catchup: of what was due while no tree was there, the newest is made up for ("latest"), the newest hundred
        ("all"), or nothing ("none").
      args, kwargs: what the task is called with.
      name: needed to tell several schedules of one task apart.

    Raises:
      TypeError: it is on something else than a function.
      ValueError: something is wrong; the message says what.
    """
    seconds = every.total_seconds() if isinstance(every, timedelta) else every

    def note(decorated: _T) -> _T:
        function = getattr(decorated, "func", decorated)  # of a Task object of Django's own interface
        if not inspect.isfunction(function):
            raise TypeError(
                f"@schedule is for functions, not {decorated!r}; for a model task, schedule a function that makes a "
                "row and submits it"
            )
        where = f"@schedule on {function.__module__}.{function.__qualname__}"
        _check(where, cron, seconds, tz, overlap, catchup, name)
        noted = Noted(
            name=name,
            cron=cron,
            every=seconds,
            tz=tz,
            overlap=overlap,
            catchup=catchup,
            args=list(args),
            kwargs=dict(kwargs or {}),
        )
        vars(function).setdefault(_ATTRIBUTE, []).append(noted)
        _functions[function.__module__, function.__qualname__] = function
        return decorated

    return note


def _check(
    where: str, cron: Any, every: float | None, tz: str | None, overlap: str, catchup: str, name: str
) -> None:
    if not isinstance(cron, str | None):
        raise ValueError(f"{where}: cron = {cron!r}: write text, or every= for seconds")
    for option, value, known in (("overlap", overlap, OVERLAPS), ("catchup", catchup, CATCH_UPS)):
        if value not in known:
            raise ValueError(f"{where}: {option} = {value!r}: write {' or '.join(map(repr, known))}")
    if name and not NAME.fullmatch(name):
        raise ValueError(f"{where}: name = {name!r}: write up to 100 letters, digits, dots, hyphens")
    try:
        checked(cron=cron, every=every, at=None, tz=tz, zone="UTC", anchor=time.time())
    except TimingError as error:
        raise ValueError(f"{where}: {error}") from None
