"""hypercorn's own ASGI `send`, on trio: what the same bytes cost when each goes to each subscriber by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.peers.environments import python_of
from tests.bench.peers.servers import APPS, Peer, serving

REQUIREMENTS = ("hypercorn[trio]==0.18.0",)


@contextmanager
def hypercorn_asgi() -> Iterator[Peer]:
    """Run it: one worker, hypercorn's defaults."""
    python = python_of("hypercorn", REQUIREMENTS)
    with serving(
        "hypercorn ASGI send",
        lambda port, _: [
            *(python, "-m", "hypercorn", "--worker-class", "trio", "--bind", f"127.0.0.1:{port}"),
            *("--log-level", "warning", "trio_app:app"),
        ],
        stream="/stream/{}",
        publish="/publish/{}",
        env={"PYTHONPATH": str(APPS)},
    ) as peer:
        yield peer
