"""What a benchmark of fan-out asks of a server, and how ours answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from tests.bench.readers import Target
from tests.bench.trees import RUNNERS
from tests.helpers import Tree, eventually

#: Bytes of an event's text, for everybody.
SIZE = 100

#: A crowd comes at once, with one token.
LIMITS = {"accepts_per_second": 100_000, "streams_per_token": 100_000, "connections": 14_000}

#: Stops a run that nobody waits for.
AT_ONCE = {"grace": 0}


@dataclass(frozen=True, slots=True)
class Channel:
    """A stream, and what makes its speaker begin; that returns at once."""

    target: Target
    begin: Callable[[], None]


class Contestant(Protocol):
    """A server that fans out, running."""

    @property
    def name(self) -> str:
        """What it is called in a figure."""

    def pids(self) -> list[int]:
        """Return the processes that serve."""

    def channel(self, events: int, delay: float) -> AbstractContextManager[Channel]:
        """Have a fresh channel, whose speaker has `events` to say, one every `delay` seconds."""


class Bulkhead:
    """Ours: a channel is a run, its speaker a task. What serves is the gateway, which takes in and stores as well."""

    name = "bulkhead"

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._channels = 0

    def pids(self) -> list[int]:
        """Return the gateway."""
        return [self._tree.child("gateway").pid]

    @contextmanager
    def channel(self, events: int, delay: float, before: int = 0) -> Iterator[Channel]:
        """Have a run that has spoken `before` events of 4,000 characters already."""
        tree = self._tree
        self._channels += 1
        gate = tree.state_dir / f"gate-{self._channels}"
        run = tree.submit("proj.paced", n=events, size=SIZE, delay=delay, before=before, gate=str(gate))
        id = run["id"]
        try:
            eventually(lambda: tree.snapshot(id)["offsets"]["last"] > before, 30.0, "a run that has started")
            yield Channel(
                Target(
                    port=int(tree.url.rpartition(":")[2]),
                    path=f"/api/v1/runs/{id}/events?after=now",
                    headers={"Authorization": f"Bearer {run['token']}"},
                ),
                gate.touch,
            )
        finally:
            tree.http.post(f"/api/v1/runs/{id}/cancel", json=AT_ONCE)
            tree.wait(id, 30.0)


def history_of(target: Target) -> Target:
    """Return a run's stream from its beginning."""
    return replace(target, path=target.path.partition("?")[0])


@contextmanager
def bulkhead() -> Iterator[Bulkhead]:
    """Run a tree with room for a crowd."""
    with Tree(runners=RUNNERS, env={"TASKKIT_LIMITS": json.dumps(LIMITS)}) as tree:
        yield Bulkhead(tree)
