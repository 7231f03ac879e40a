"""The servers that peers lean on, each a private one for as long as it is needed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.peers.contestants import process
from tests.bench.peers.environments import debian
from tests.faults import Postgres

#: Seconds until a server takes connections.
PATIENCE = 20.0


def free_port() -> int:
    """Return a port of the loopback that nobody has at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """Have a Redis with the settings that it comes with; give its URL."""
    port = free_port()
    command = [debian("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with process(command, {}, folder / "redis.log"):
        await_port(port)
        yield f"redis://127.0.0.1:{port}/0"


def await_port(port: int) -> None:
    """Wait until somebody listens.

    Raises:
      TimeoutError: nobody does.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise TimeoutError(f"nobody listens on port {port}") from None
            time.sleep(0.02)


@contextmanager
def postgres() -> Iterator[str]:
    """Have a PostgreSQL that waits for the disk, as it does by default; give its address for libpq."""
    debian("postgres")
    with Postgres("fsync=on") as server:
        yield f"host={server.folder} dbname=bulkhead user=bulkhead"
