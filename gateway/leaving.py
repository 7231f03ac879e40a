"""Notices that a client has left, without ever cancelling a send.

hypercorn tells it through `receive()` only: after a disconnect `send()` silently does nothing. It also posts
`http.disconnect` within an application's own final send, and a scope cancelled inside that send leaves the
socket open for ever. So what is cancelled here is waiting, never sending.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from starlette.types import Receive


class Client:
    """The other end of a response. `gone`: nobody reads any more; `dismissed`: we want no more of it."""

    def __init__(self) -> None:
        self.gone = False
        self.dismissed = False
        self._waiting: trio.CancelScope | None = None

    async def watch(self, receive: Receive) -> None:
        """Read until the client leaves; what is left of a body is dropped."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._stop_waiting()

    def dismiss(self) -> None:
        """End the response soon, in its order."""
        self.dismissed = True
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    async def wait(self, condition: Callable[[], Awaitable[object]], deadline: float) -> None:
        """Await `condition` until it holds, the client leaves or is dismissed, or `deadline` (trio's clock) is over."""
        with trio.CancelScope(deadline=deadline) as self._waiting:
            if not (self.gone or self.dismissed):
                await condition()
        self._waiting = None


@asynccontextmanager
async def watched(receive: Receive) -> AsyncIterator[Client]:
    """Watch a client while the body runs. The last send of a response belongs behind this block.

    An exception of the body leaves as itself, not in a group: the handlers of problems look at its class.
    """
    client = Client()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.watch, receive)
        try:
            yield client
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
