"""Several runs submitted together: a group, side by side; a chain, one after the other.

Nothing of it is a thing of its own: a group is its runs, a chain are runs each of which comes `after` the one before.
So each has its stream, its result, its retries, and what has been submitted goes on whoever dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from django.db import transaction

from taskkit import outbox
from taskkit.current import Speaker
from taskkit.outbox import RunHandle
from taskkit.stream_task import StreamTask


@dataclass(frozen=True, slots=True)
class Step:
    """A submission that is still to be made: see `step`."""

    task: str | Callable[..., Any] | StreamTask
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def having(self, **options: Any) -> Step:
        """Return the same with options of `taskkit.submit`: `step(render, 7).having(pool="heavy", timeout=60)`."""
        return replace(self, options={**self.options, **options})


def step(task: str | Callable[..., Any] | StreamTask, /, *args: Any, **kwargs: Any) -> Step:
    """Return the submission of a task with these arguments, for `group` and `chain`."""
    return Step(task, args, kwargs)


def group(
    steps: Iterable[Step],
    *,
    parent: Speaker | None = None,
    after: Iterable[Any] = (),
    using: str | None = None,
    **options: Any,
) -> list[RunHandle]:
    """Submit several runs, all or none of them; return them in their order.

    What shall happen when all have succeeded comes after them: `submit(report, after=group(…))`. A common tag shows
    them on one stream: `group(…, tags=["import-7"])`, `GET /api/v1/events?tag=import-7`.

    Args:
      parent: the run whose children they are: `current_run()`.
      after: runs that all of them come after.
      using: alias of the database; default: where submissions go.
      options: of `taskkit.submit`, for those that do not have them themselves.

    Raises:
      as `taskkit.submit`; nothing was submitted.
    """
    send = outbox.submit if parent is None else parent.submit
    before = list(after)
    alias = using or outbox.alias_of(None)
    with transaction.atomic(using=alias):
        return [
            send(
                one.task, one.args, one.kwargs, **{"using": alias, "after": before, **options, **one.options}
            )
            for one in steps
        ]


def chain(
    *steps: Step | Iterable[Step],
    parent: Speaker | None = None,
    after: Iterable[Any] = (),
    using: str | None = None,
    **options: Any,
) -> list[RunHandle]:
    """Submit runs that come one after the other, all or none of them; return them in their order.

    Each begins when the one before has succeeded, whose result is in `current_run().after`. Several steps in a list go
    side by side: `chain(step(fetch), [step(resize, 1), step(resize, 2)], step(publish))`.

    Args, raises: as `group`.
    """
    alias = using or outbox.alias_of(None)
    made: list[RunHandle] = []
    before = list(after)
    with transaction.atomic(using=alias):
        for one in steps:
            many = [one] if isinstance(one, Step) else one
            before = group(many, parent=parent, after=before, using=alias, **options)
            made += before
    return made
