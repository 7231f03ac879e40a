"""Notices when clients hang up from whom nobody reads.

One descriptor to wait for, whatever the number of clients: none of them takes a task. Bytes that a client sends
meanwhile stay where they are, in the kernel, and stop it when that is full.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import trio

#: Hang-ups told in one go: each closes a connection, in some 20 µs.
TURN: Final = 256


class Hangups:
    """The sockets that are watched; a context manager. One task runs `run`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._notices: dict[int, Callable[[], None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._epoll.close()

    def watch(self, fd: int, notice: Callable[[], None]) -> None:
        """Have `notice` called, once, when the client of `fd` has closed its side; soon if it has already."""
        self._notices[fd] = notice
        self._epoll.register(fd, select.EPOLLRDHUP)  # with errors, which are always told

    def forget(self, fd: int) -> None:
        """Tell no longer; to be called before `fd` is closed. Nothing when it is not watched."""
        if self._notices.pop(fd, None) is not None:
            with contextlib.suppress(OSError, ValueError):  # closed by now, or all of this is
                self._epoll.unregister(fd)

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0, TURN):
                notice = self._notices.get(fd)
                self.forget(fd)
                if notice is not None:
                    notice()
