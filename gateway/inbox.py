"""What one application is yet to receive: bounded, but a disconnect always fits."""

from __future__ import annotations

from collections import deque
from typing import Final

import trio
from starlette.types import Message

#: Parts of a request's body, or WebSocket messages, that wait for the application: 8 of at most 64 KiB each are half
#: a megabyte.
INBOX: Final = 8


class Inbox:
    """The ASGI messages of one request or WebSocket.

    hypercorn's memory channel takes the disconnect as its 11th message and so blocks the sender, which may
    be the application itself inside its own final send.
    """

    def __init__(self) -> None:
        self._parts: deque[Message] = deque()
        self._disconnected: Message | None = None
        self._finished = False
        self._changed = trio.lowlevel.ParkingLot()

    async def put(self, message: Message) -> None:
        """Add `message`; wait while the inbox is full, unless the application is through, or its client has left."""
        while len(self._parts) >= INBOX and not (self._finished or self._disconnected):
            await self._changed.park()
        if not (self._finished or self._disconnected):
            self._parts.append(message)
        self._changed.unpark_all()

    def disconnect(self, message: Message) -> None:
        """Have `message` be the last; a second one does nothing."""
        self._disconnected = self._disconnected or message
        self._changed.unpark_all()

    async def receive(self) -> Message:
        """Return the next message; after the last one wait for the disconnect, then return that for ever."""
        if self._parts or self._disconnected is not None:
            # What is there is handed out even under a cancelled scope: Starlette's `is_disconnected` asks so.
            await trio.lowlevel.cancel_shielded_checkpoint()
        while not self._parts and self._disconnected is None:
            await self._changed.park()
        if not self._parts:
            assert self._disconnected is not None
            return self._disconnected
        part = self._parts.popleft()
        self._changed.unpark_all()
        return part

    def finish(self) -> None:
        """Take nothing more: the application has returned."""
        self._finished = True
        self._parts.clear()
        self._changed.unpark_all()
