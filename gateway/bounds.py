"""What a server's connections share, first of all their bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from starlette.types import ASGIApp

if TYPE_CHECKING:
    from gateway import plain

#: The short way of some plain requests.
Direct: TypeAlias = "Callable[[plain.Request], ASGIApp | None]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    """Bounds of the server; sizes in bytes, times in seconds.

    Attributes:
      connections: at once; what comes beyond gets 503. Also never more than three quarters of
        RLIMIT_NOFILE, so that the store and the runners' pipes keep descriptors to work with.
      write_seconds: a write that makes no progress for so long ends its connection with RST.
      accepts_per_second: new connections; more wait in the backlog. A second's worth may come at once.
      headers_seconds: for a request's head to arrive complete, on a new connection or after an answer.
        Longer than hypercorn's 5, so that a client polling every 10 s keeps its connection.
      body_seconds: between two pieces of a request's body, while the application waits for them.
      header_bytes: of a request's head; more is answered 431.
      message_bytes: of a WebSocket message from a client; more ends its connection with 1009.
      send_buffer: SO_SNDBUF of a connection. The kernel doubles it, and it bounds what a client that does not
        read can make us hold; 128 KiB fill 10 Mbit/s at 100 ms round trip.

    The backlog is that of whoever listens: pass sockets with `listen(1024)` or more. hypercorn's 100
    overflows when all clients of a gateway come back at once (some 2,000 are accepted per second and core).
    """

    connections: int = 10_000
    accepts_per_second: int = 200
    write_seconds: float = 10.0
    headers_seconds: float = 15.0
    body_seconds: float = 30.0
    header_bytes: int = 16 * 1024
    message_bytes: int = 64 * 1024
    send_buffer: int = 128 * 1024


@dataclass(frozen=True, slots=True)
class Service:
    """What all connections of a server have in common.

    Attributes:
      app: called once per request; what it raises is logged and ends the connection.
      context: its `terminated` tells that connections are not to be kept alive any more.
      state: goes into every request's `scope["state"]`, beside `peer`.
      fast: whether requests that are plain go past the parser (gateway.plain).
      direct: returns the application for a plain request that need not go through `app`, else None.
    """

    app: ASGIApp
    config: Config
    context: WorkerContext
    limits: ServeLimits
    state: Mapping[str, Any]
    fast: bool = True
    direct: Direct | None = None
