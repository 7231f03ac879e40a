"""The submitter of every contestant: one program, told over its standard input what to submit.

    python -m tests.bench.peers.apps.driver MODULE

A request is a line of JSON, and so is its answer. Standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.project import stamps

#: Seconds until a submission that has not begun is given up.
PATIENCE = 60.0

#: Its multiples, without their whole parts, are spread evenly over 0 to 1.
GOLDEN = 0.618034


def starts(submit: Callable[[str], float | None], path: str, n: int, pause: float) -> list[float]:
    """Submit `n` bodies one after the other; return the seconds from before each call to the body's first act; from the
    moment that `submit` returns, where it does.

    Nothing looks for the body in the meantime: it has the machine for itself for `pause` seconds and up to as many
    again, evenly spread, so that no submission is in step with somebody who polls.

    Raises:
      TimeoutError: a body has not begun.
    """
    begun = []
    for number in range(1, n + 1):
        begun.append(time.time())
        begun[-1] = submit(path) or begun[-1]
        time.sleep(pause * (1 + number * GOLDEN % 1))
        _await(path, number)
    return [started - before for started, before in zip(stamps.read(path), begun, strict=True)]


def bulk(app: Any, path: str, n: int) -> float:
    """Submit `n` bodies as fast as it can be done; return the seconds until the last one has begun.

    Where a module has `ended`, they last until the end of the last one is recorded.

    Raises:
      TimeoutError: not all have begun, or ended.
    """
    before = time.time()
    app.many(path, n)
    _await(path, n)
    last = max(stamps.read(path))
    if hasattr(app, "ended"):
        end = time.monotonic() + PATIENCE
        while (recorded := app.ended()) is None:
            if time.monotonic() > end:
                raise TimeoutError("not all have ended")
            time.sleep(0.01)
        last = max(last, recorded)
    return last - before


def firsts(first: Callable[[], float], path: str, n: int, pause: float) -> list[float]:
    """Submit `n` bodies one after the other; return the seconds from before each until a subscriber has an event."""
    found = []
    for number in range(1, n + 1):
        before = time.time()
        found.append(first() - before)
        time.sleep(pause * (1 + number * GOLDEN % 1))
    return found


def first_event(url: str, path: str, headers: dict[str, str]) -> float:
    """Ask for a stream; return the Unix time of its first event.

    Raises:
      ValueError: it is no stream, or ends without one.
    """
    connection = http.client.HTTPConnection(url.rpartition("/")[2], timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Accept": "text/event-stream", **headers})
        response = connection.getresponse()
        for line in response:
            if line.startswith(b"data:"):
                return time.time()
    raise ValueError(f"no event at {path}, {response.status}")


def _await(path: str, number: int) -> None:
    end = time.monotonic() + PATIENCE
    while stamps.count(path) < number:
        if time.monotonic() > end:
            raise TimeoutError(f"{stamps.count(path)} of {number} have begun")
        time.sleep(0.01)


def serve(app: Any) -> None:
    """Answer requests until there are no more.

    Args:
      app: a module of this folder. `one(path)` has one body stamp the file at this path; `many(path, n)` has so many
        do so, in the way that a user with many would be told to take; `death(path, number, timeout)` has one body die
        of this signal, and returns the Unix time at which its client knows, or None after so many seconds; `first()`
        has one body speak, and returns the Unix time at which a subscriber has heard it; `committed(path)` does as
        `one`, and returns the Unix time of its commit. A module has what its contests need.
    """

    def death(path: str, number: int, timeout: float) -> float | None:
        known = app.death(path, number, timeout)
        return None if known is None else known - stamps.read(path)[-1]

    handlers: dict[str, Callable[..., Any]] = {
        "starts": lambda **given: starts(app.one, **given),
        "commits": lambda **given: starts(app.committed, **given),
        "bulk": lambda **given: bulk(app, **given),
        "death": death,
        "firsts": lambda **given: firsts(app.first, **given),
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(handlers[request.pop("do")](**request)), flush=True)


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]))
