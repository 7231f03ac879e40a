"""The httpx clients of this process: one per URL, asynchronous ones also per event loop.

Rule: nothing is shared with a forked child. Two processes on one socket would read each other's answers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import anyio.lowlevel
import httpx

from taskkit.errors import GatewayError
from taskkit.settings import is_loopback

#: Followed runs hold a connection each, so their number has no limit here: at a limit of 100, httpx's default, the
#: 101st follower would keep a submission waiting. What is idle is kept for the next call.
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway listens: `base` is an HTTP URL, `uds` the path of its Unix socket or None."""

    base: str
    uds: str | None

    @classmethod
    def parse(cls, url: str, uds: str | None = None) -> Address:
        """Return the address in `http://HOST:PORT` or `unix:/PATH`.

        Raises:
          GatewayError: it is neither. The caller's fault.
        """
        if url.startswith("unix:"):
            return cls("http://localhost", url.removeprefix("unix:"))
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GatewayError(f"{url!r} is no address of a gateway: write http://HOST:PORT or unix:/PATH")
        return cls(url.rstrip("/"), uds)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for an httpx client."""
        # A proxy from the environment must not stand between a client and the gateway of its own machine.
        local = self.uds is not None or is_loopback(urlsplit(self.base).hostname or "")
        return {
            "base_url": self.base,
            "trust_env": not local,
            "follow_redirects": False,
            **({} if self.uds else {"limits": _LIMITS}),
        }


def moved(before: Address, response: httpx.Response) -> Address | None:
    """Return where another node answers this request, if the answer is that one does.

    The token goes along: it is meant for every node that has the key, and this one names the other.
    """
    location = response.headers.get("location", "") if response.status_code == 307 else ""
    base, found, _ = location.partition("/api/v1/")
    if not found or not base.startswith(("http://", "https://")):
        return None
    address = Address.parse(base)
    return None if address == before else address


_lock = threading.Lock()
_clients: dict[Address, httpx.Client] = {}
_async_clients: anyio.lowlevel.RunVar[dict[Address, httpx.AsyncClient]] = anyio.lowlevel.RunVar(
    "bulkhead_clients"
)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held the old one
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: close_clients())  # an interpreter that is told to warn complains of what is left open


def shared(address: Address) -> httpx.Client:
    """Return this process's client of an address. Safe from any thread."""
    with _lock:
        client = _clients.get(address)
        if client is None:
            transport = httpx.HTTPTransport(uds=address.uds, limits=_LIMITS) if address.uds else None
            client = _clients[address] = httpx.Client(transport=transport, **address.options())
        return client


def shared_async(address: Address) -> httpx.AsyncClient:
    """Return this event loop's client of an address."""
    clients = _async_clients.get({})
    client = clients.get(address)
    if client is None:
        transport = httpx.AsyncHTTPTransport(uds=address.uds, limits=_LIMITS) if address.uds else None
        client = clients[address] = httpx.AsyncClient(transport=transport, **address.options())
        _async_clients.set(clients)
    return client


@asynccontextmanager
async def received(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """Give what arrives of a streamed answer, and close it.

    httpx reads through generators within generators. Left in the middle they would go to the garbage collector, of
    which trio complains (ResourceWarning); behind the close each of them comes to its end.
    """
    data = response.aiter_raw()
    try:
        yield data
    finally:
        await response.aclose()
        with contextlib.suppress(httpx.TransportError, httpx.StreamError):
            async for _ in data:
                pass


def close(address: Address) -> None:
    """Close this process's connections to an address; the next call opens anew."""
    with _lock:
        client = _clients.pop(address, None)
    if client is not None:
        client.close()


async def aclose(address: Address) -> None:
    """Close this event loop's connections to an address; the next call opens anew."""
    client = _async_clients.get({}).pop(address, None)
    if client is not None:
        with contextlib.suppress(httpx.TransportError):
            await client.aclose()


def close_clients() -> None:
    """Close every synchronous connection of this process; the next call opens anew."""
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()
