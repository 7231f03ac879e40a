"""The runner's end of the orders socket: what the gateway wants, with or without an event loop."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Set
from types import FrameType
from typing import Final

import anyio

from taskkit import linux, seqpacket
from taskkit.errors import RemoteWireError, RunCancelled, SoftTimeout, StallTimeout
from taskkit.runner.emitter import Emitter
from taskkit.runner.inbox import Mail
from taskkit.wire.codec import unpack
from taskkit.wire.messages import Cancel, Create, Input, Order, Retire, Start, TakeBack

#: Announces input on the orders socket while a synchronous task runs. SIGIO is what the kernel uses for this, and
#: ordinary programs leave it alone.
_ORDER_SIGNAL = signal.SIGIO

#: What is raised in a synchronous task that is asked to stop for these reasons; for any other it is RunCancelled.
_ASKED: Final = {
    "soft_timeout": (SoftTimeout, "the attempt exceeded its soft_timeout"),
    "stall_timeout": (StallTimeout, "the attempt sent no event for its stall_timeout"),
}

#: Orders to start that are recognised when they are repeated. A new gateway repeats what is open: as many as a shared
#: process has at most.
_REMEMBERED: Final = 100_000


class Orders:
    """Receives orders, oldest first.

    An order to start an attempt that was ordered before is dropped: a new gateway repeats what the old one may not
    have sent. A cancellation is remembered until its attempt starts.

    Args:
      give_back: says that the attempt with this token will not begin here.
    """

    def __init__(self, sock: socket.socket, give_back: Callable[[str], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._waiting: deque[Start | Create] = deque()
        self._seen: dict[str, None] = {}
        self._cancelled: dict[str, str] = {}  # reasons by token
        self._taken_back: deque[str] = deque()
        self._mail: dict[str, Mail] = {}
        self._give_back = give_back
        self._armed = False
        self.retired = False
        self.closed = False

    def _pump(self) -> None:
        """Take in everything that has arrived."""
        while not self.closed:
            try:
                received = seqpacket.receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, RemoteWireError):
                self.closed = True
                return
            if received is None:
                self.closed = True
                return
            payload, fds = received
            seqpacket.close_all(fds)
            with contextlib.suppress(RemoteWireError):  # a gateway newer than this runner: not for us
                self._sort(unpack(payload, Order))

    def _sort(self, order: Order) -> None:
        if isinstance(order, Start):
            if order.token not in self._seen:
                self._seen[order.token] = None
                self._waiting.append(order)
                self._mail[order.token] = Mail(self._look_again, cancelled=order.token in self._cancelled)
                if len(self._seen) > _REMEMBERED:
                    del self._seen[next(iter(self._seen))]
        elif isinstance(order, Create):
            self._waiting.append(order)
        elif isinstance(order, Cancel):
            self._cancelled[order.token] = order.reason
            if order.token in self._mail:
                self._mail[order.token].cancelled = True
        elif isinstance(order, Input):
            if order.token in self._mail:  # or its attempt has ended
                self._mail[order.token].deliver(order)
        elif isinstance(order, TakeBack):
            self._take_back(set(order.tokens))
        elif isinstance(order, Retire):
            self.retired = True

    def _take_back(self, tokens: set[str]) -> None:
        kept: deque[Start | Create] = deque()
        for order in self._waiting:
            if isinstance(order, Start) and order.token in tokens:
                self._taken_back.append(order.token)
                self.forget(order.token)
            else:
                kept.append(order)
        self._waiting = kept

    def answer(self) -> None:
        """Say what was taken back. Not in the middle of another frame."""
        while self._taken_back:
            self._give_back(self._taken_back.popleft())

    def is_cancelled(self, token: str) -> bool:
        """Whether the attempt is to stop, as far as has been received."""
        return token in self._cancelled

    def mail(self, token: str) -> Mail:
        """Return what an attempt that was ordered, and has not ended, is told."""
        return self._mail[token]

    def forget(self, token: str) -> None:
        """An attempt has ended."""
        self._mail.pop(token, None)

    def cancelled(self, tokens: Set[str]) -> Set[str]:
        """Return those of `tokens` whose attempts are to stop; it takes no longer for many that are not."""
        return tokens & self._cancelled.keys()

    def next_nowait(self) -> Start | Create | None:
        """Return the next order that has arrived, or None."""
        self._pump()
        self.answer()
        return self._waiting.popleft() if self._waiting else None

    def next(self) -> Start | Create | None:
        """Wait for the next order; None when the runner is to leave (retired, or nobody is left to give orders)."""
        while True:
            order = self.next_nowait()
            if order is not None:
                return order
            if self.retired or self.closed:
                return None
            select.select([self._sock], [], [])

    async def wait(self) -> None:
        """Wait until something arrives, under any event loop."""
        await anyio.wait_readable(self._sock)
        self._pump()
        self.answer()

    @contextlib.contextmanager
    def interrupting(self, token: str, emitter: Emitter) -> Iterator[None]:
        """Raise RunCancelled in the main thread as soon as the attempt `token` is cancelled.

        Asked to stop for another reason in `_ASKED`, the task may catch what is raised and go on; then it can still
        be cancelled.
        The kernel signals the socket's input, so no thread of ours runs beside user code. In the middle of an
        emit, the exception waits for its end.
        """

        raised = set[str]()
        news = busy = False

        def look(number: int = 0, frame: FrameType | None = None) -> None:
            # A signal may come in the middle of a look. A second one inside it would sort newer orders before those
            # in hand, or raise over them and lose them: it only has the first look again.
            nonlocal news, busy
            news = True
            if busy:
                return
            found: BaseException | None = None
            while news:
                busy, news = True, False
                try:
                    found = take_in() or found
                finally:
                    busy = False
            if found is not None:
                raise found

        def take_in() -> BaseException | None:
            self._pump()
            reason = self._cancelled.get(token)
            asked = reason is not None and reason not in raised
            if not (self._taken_back or asked) or emitter.defer(_raise_order_signal):
                return None
            self.answer()
            if reason is None or not asked:
                return None
            raised.add(reason)
            if reason in _ASKED:
                kind, message = _ASKED[reason]
                return kind(message)
            signal.signal(_ORDER_SIGNAL, signal.SIG_IGN)  # once: cleaning up must not be interrupted
            return RunCancelled()

        signal.signal(_ORDER_SIGNAL, look)
        try:
            linux.signal_on_input(self._sock.fileno(), _ORDER_SIGNAL)
            self._armed = True
            look()  # what came before the signal was armed
            yield
        finally:
            self._armed = False
            signal.signal(_ORDER_SIGNAL, signal.SIG_IGN)

    def _look_again(self) -> None:
        """Have the main thread look at what has arrived, from any thread."""
        main = threading.main_thread().ident
        if self._armed and main is not None:
            signal.pthread_kill(main, _ORDER_SIGNAL)


def _raise_order_signal() -> None:
    signal.raise_signal(_ORDER_SIGNAL)
