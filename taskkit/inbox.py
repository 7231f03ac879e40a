"""What a running task is told by others, by name. Imports no Django."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import anyio

#: Seconds between two looks of a thread that waits. A signal that comes in the microsecond before the thread falls
#: asleep does not wake it (2 of 200,000 here): CPython has looked for signals already, the kernel has delivered it.
_LOOK: Final = 1.0


class Inbox:
    """Messages of one name for one run, oldest first; each is taken once.

    They wait here from the run's beginning, whether anybody asks for them or not. Another attempt of the run has them
    all again.

    Args:
      look: has whoever brings the messages look for them once more; called from any thread that waits.
    """

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        self._look = look
        # Of all queues only this one may be filled by a signal handler while its own thread waits in `get`.
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._waiting: deque[anyio.Event] = deque()

    def put(self, message: dict[str, Any]) -> None:
        """Add a message; the runner does."""
        self._messages.put(message)
        for waiting in self._waiting:
            waiting.set()

    def get(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the next message, and take it. For synchronous tasks, and for threads.

        Args:
          timeout: seconds; 0 looks once, None waits for as long as the run may take.

        Raises:
          TimeoutError: none came in time.
          RuntimeError: an event loop runs in this thread, and would stand still: `await inbox.aget()`.
          RunCancelled: the run is to stop (in the task's main thread).
        """
        if in_event_loop():
            raise RuntimeError("get() would block the event loop, which brings the messages: await aget()")
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _LOOK if end is None else end - time.monotonic()
            try:
                return self._messages.get(left > 0, min(left, _LOOK) if left > 0 else None)
            except queue.Empty:
                if left <= 0:
                    raise TimeoutError(f"no message within {timeout:g} s") from None
            self._look()

    async def aget(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the next message, and take it: see `get`. Cancelled, it takes none."""
        with anyio.fail_after(timeout):
            while True:
                try:
                    return self._messages.get_nowait()
                except queue.Empty:
                    await self._come()

    async def _come(self) -> None:
        event = anyio.Event()
        self._waiting.append(event)
        try:
            await event.wait()
        finally:
            self._waiting.remove(event)


def in_event_loop() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        anyio.get_current_task()
    except RuntimeError:
        return False
    return True
