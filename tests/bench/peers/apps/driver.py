"""The submitter of every contestant: one program, told over its standard input what to submit.

A request is a line of JSON, and so is its answer. Standard library only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.project import stamps

#: Seconds until a submission that has not begun is given up.
PATIENCE = 60.0


def starts(submit: Callable[[str], object], path: str, n: int, pause: float) -> list[float]:
    """Submit `n` bodies one after the other; return the seconds from before each call to the body's first act.

    Nothing looks for the body in the meantime: it has the machine for itself for `pause` seconds.

    Raises:
      TimeoutError: a body has not begun.
    """
    begun = []
    for number in range(1, n + 1):
        begun.append(time.time())
        submit(path)
        time.sleep(pause)
        _await(path, number)
    return [started - before for started, before in zip(stamps.read(path), begun, strict=True)]


def bulk(submit_many: Callable[[str, int], object], path: str, n: int) -> float:
    """Submit `n` bodies as fast as it can be done; return the seconds until the last one has begun.

    Raises:
      TimeoutError: not all have begun.
    """
    before = time.time()
    submit_many(path, n)
    _await(path, n)
    return max(stamps.read(path)) - before


def _await(path: str, number: int) -> None:
    end = time.monotonic() + PATIENCE
    while stamps.count(path) < number:
        if time.monotonic() > end:
            raise TimeoutError(f"{stamps.count(path)} of {number} have begun")
        time.sleep(0.01)


def serve(
    submit: Callable[[str], object],
    submit_many: Callable[[str, int], object],
    death: Callable[[str, int, float], float | None],
) -> None:
    """Answer requests until there are no more.

    Args:
      submit: has one body stamp the file at this path.
      submit_many: has so many do so, in the way that a user with many would be told to take.
      death: has one body die of this signal; returns the Unix time at which its client knows, or None after so
        many seconds.
    """

    def heard(path: str, number: int, timeout: float) -> float | None:
        known = death(path, number, timeout)
        return None if known is None else known - stamps.read(path)[-1]

    handlers: dict[str, Callable[..., Any]] = {
        "starts": lambda **given: starts(submit, **given),
        "bulk": lambda **given: bulk(submit_many, **given),
        "death": heard,
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(handlers[request.pop("do")](**request)), flush=True)
