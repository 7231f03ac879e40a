"""What a stream that needs no task asks of its connection, or the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from starlette.types import Receive, Send

if TYPE_CHECKING:
    from gateway.connection import Connection


class Parked(Protocol):
    """A response that has begun and waits for something to say."""

    @property
    def framed(self) -> bool:
        """Whether it is chunked."""

    def board(self, fd: int, wake: Callable[[], None]) -> None:
        """The connection is ready: from here on `fd` is the stream's. `wake` ends that, once, perhaps at once."""

    async def resume(self, receive: Receive, send: Send) -> None:
        """Go on, woken, as the rest of an ASGI application that has begun its response. May park again."""

    def abandon(self) -> None:
        """The connection is over, or about to be: let go of everything. Must not raise."""


class Home(Protocol):
    """Whose connections these are."""

    def watch(self, connection: Connection) -> None:
        """Have `hang_up` called when the client of a parked stream leaves."""

    def forget(self, connection: Connection) -> None:
        """Watch it no longer; nothing when it is not watched."""

    def resume(self, connection: Connection) -> None:
        """Have `run` called in a task."""
