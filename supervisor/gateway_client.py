"""The supervisor's side of the gateway: start it, give it every descriptor again, start the next when it dies."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable
from typing import Final

import trio

from supervisor.child import Child, spawn
from supervisor.hearing import hear
from supervisor.policy import RestartPolicy
from supervisor.runners import Runner
from taskkit import linux
from taskkit.channel import Channel
from taskkit.errors import NeverReady, RestartIntensityExceeded
from taskkit.lifecycle import ProcessEvent
from taskkit.wire.messages import (
    Assigned,
    Beat,
    Configure,
    Deadline,
    Disarm,
    Drain,
    Drained,
    GatewayMessage,
    GatewayReady,
    Greeted,
    Kill,
    Message,
    Stopped,
)

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds until a new gateway has to serve: it waits at most 3 s for the lock of one that drains.
READY_SECONDS: Final = 20.0

#: Seconds without a beat after which a gateway hangs. It beats once a second from its main loop, whatever the store
#: or the clients do.
BEAT_SECONDS: Final = 10.0

#: Starts of the very first gateway before its failure is taken for a boot error, which no restart mends.
_BOOT_ATTEMPTS: Final = 3

Report = GatewayReady | Drained | Deadline | Disarm | Kill | Greeted | Assigned | Stopped | Beat


def _nothing() -> None:
    """The gateway's first readiness has been announced."""


class Gateway:
    """The gateway of this tree, one process after the other.

    Args:
      configure: makes the first message.
      listener: the socket it serves.
      runners: every runner that is not drained, oldest first.
      on_message, on_up, on_down: told synchronously.
    """

    def __init__(
        self,
        *,
        configure: Callable[[list[str]], Configure],
        listener: socket.socket,
        runners: Callable[[], Iterable[Runner]],
        on_message: Callable[[Report], None],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
    ) -> None:
        self._configure = configure
        self._listener = listener
        self._runners = runners
        self._on_message = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._channel: Channel[Report] | None = None
        self._announce: Callable[[], None] = _nothing
        self.policy = RestartPolicy()
        self.child: Child | None = None
        self.up = False
        self.stopping = False
        self.last_exit = ""
        self._draining: Drain | None = None

    def drain(self, grace: float) -> None:
        """Have this gateway, and any that follows it, claim nothing more and ask runs to stop."""
        self._draining = Drain(grace=grace)
        self.send(self._draining)

    def send(self, message: Message, fds: Iterable[int] = ()) -> None:
        """Send to the present gateway; without one the message is dropped, as the next is told everything anew."""
        if self._channel is not None:
            self._channel.send(message, list(fds))

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep a gateway alive; `started` when the first one serves. Returns when it leaves while stopping.

        Raises:
          RestartIntensityExceeded: it dies too often.
        """
        self._announce = task_status.started
        while True:
            await self._one()
            if self.stopping:
                return
            delay = self.policy.died(trio.current_time())
            if self._announce is not _nothing and self.policy.restarts >= _BOOT_ATTEMPTS:
                raise NeverReady(
                    f"the gateway does not come up: {self.policy.restarts} times it left with {self.last_exit}; "
                    "its log is above"
                )
            if delay is None:
                raise RestartIntensityExceeded(
                    f"the gateway died {self.policy.restarts} times within {self.policy.period:.0f} s "
                    f"(last: {self.last_exit}); its log is above"
                )
            logger.error("the gateway died (%s); starting another in %.1f s", self.last_exit, delay)
            await trio.sleep(delay)

    async def _one(self) -> None:
        ours, theirs = linux.seqpacket_pair()
        with theirs:
            self.child = child = spawn(
                "gateway",
                "gateway",
                [str(theirs.fileno()), str(os.getpid())],
                [theirs.fileno()],
                session=False,
            )
        channel: Channel[Report] = Channel(ours, GatewayMessage)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            nursery.start_soon(channel.run)
            try:
                self._introduce(channel)
                await self._listen(channel, child)
            finally:
                self.up = False
                self._channel = None
                self._on_down()
                # Two readers on one pipe corrupt it: the next gateway may only start when this one is gone.
                with trio.CancelScope(shield=True):
                    self.last_exit = str(await child.end(5.0 if self.stopping else 0.0))
                channel.close()
                nursery.cancel_scope.cancel()

    def _introduce(self, channel: Channel[Report]) -> None:
        """Say everything that a new gateway has to know; nothing else may be said before."""
        self._channel = channel
        runners = list(self._runners())
        self.send(self._configure([runner.spec.id for runner in runners]), [self._listener.fileno()])
        for runner in runners:
            self.send(runner.announcement(adopted=True), runner.ends.near)
            if runner.exited is not None:
                self.send(runner.exited)
        if self._draining is not None:
            self.send(self._draining)

    async def _listen(self, channel: Channel[Report], child: Child) -> None:
        limit = READY_SECONDS
        while (message := await hear(channel, child, limit)) is not None:
            if isinstance(message, GatewayReady):
                limit = BEAT_SECONDS
                child.happen(ProcessEvent.READY)
                self.policy.ready(trio.current_time())
                self.up = True
                self._on_up()
                announce, self._announce = self._announce, _nothing
                announce()
            elif not isinstance(message, Beat):
                self._on_message(message)
