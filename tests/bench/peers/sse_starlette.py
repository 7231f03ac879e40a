"""uvicorn + sse-starlette: `pip install sse-starlette uvicorn[standard]`, one worker, a queue per client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.peers.environments import python_of
from tests.bench.peers.servers import APPS, Peer, serving

REQUIREMENTS = ("sse-starlette==3.7.0", "uvicorn[standard]==0.54.0")


@contextmanager
def sse_starlette() -> Iterator[Peer]:
    """Run it. `uvicorn[standard]` brings uvloop and httptools, which uvicorn then takes by itself."""
    python = python_of("sse-starlette", REQUIREMENTS)
    with serving(
        "sse-starlette",
        lambda port, _: [
            *(python, "-m", "uvicorn", "--app-dir", APPS, "starlette_app:app"),
            *("--port", str(port), "--log-level", "warning", "--no-access-log"),
        ],
        stream="/stream/{}",
        publish="/publish/{}",
    ) as peer:
        yield peer
