"""The supervisor's side of the gateway: start it, give it every descriptor again, start the next when it dies."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import trio

from supervisor import firstborn, handover
from supervisor.child import Child, spawn
from supervisor.handover import HeldPeer
from supervisor.hearing import hear
from supervisor.policy import RestartPolicy
from supervisor.runners import Runner
from taskkit import linux
from taskkit.channel import Channel
from taskkit.errors import NeverReady, RestartIntensityExceeded
from taskkit.settings import LimitSettings
from taskkit.wire.messages import (
    Beat,
    Configure,
    Drain,
    GatewayMessage,
    GatewayReady,
    Message,
    Park,
)

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds until a new gateway has to serve: it waits at most 3 s for the lock of one that drains.
READY_SECONDS: Final = 20.0

#: Seconds for a gateway to leave when another one is to take its place: it waits 2 s for requests under way, and for
#: the disk.
PARK_SECONDS: Final = 5.0

#: Seconds until a process is tried again for which there were no descriptors or no memory.
_SPAWN_PAUSE: Final = 0.5

#: Starts of the very first gateway before its failure is taken for a boot error, which no restart mends.
_BOOT_ATTEMPTS: Final = 3

#: What a gateway says.
Report = GatewayMessage


def _nothing() -> None:
    """The gateway's first readiness has been announced."""


@dataclass(frozen=True, slots=True)
class _Process:
    """One gateway process. A `serving` one has been told everything, by the supervisor that was here before."""

    child: Child
    channel: Channel[Report]
    serving: bool = False


class Gateway:
    """The gateway of this tree, one process after the other.

    Args:
      limits: how long one may be silent, how often one may die.
      configure: makes the first message.
      listener: the socket it serves.
      runners: every runner that is not drained, oldest first.
      on_message, on_up, on_down: told synchronously.
    """

    def __init__(
        self,
        *,
        limits: LimitSettings,
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
        self._beat_seconds = limits.gateway_beat_seconds
        self._announce: Callable[[], None] = _nothing
        self._present: _Process | None = None
        self._next: _Process | None = None
        self._parking = False
        self._draining: Drain | None = None
        self._changed = trio.Event()
        self.policy = RestartPolicy(
            intensity=limits.gateway_restarts, longest_delay=limits.restart_delay_seconds
        )
        self.child: Child | None = None
        self.up = False
        self.stopping = False
        self.last_exit = ""
        self._may_pass = False

    @property
    def pids(self) -> set[int]:
        """Of the present process and of one that waits to take over: neither is a stray."""
        waiting = set() if self._next is None else {self._next.child.pid}
        return waiting | firstborn.pids() | (set() if self.child is None else {self.child.pid})

    def drain(self, grace: float) -> None:
        """Have this gateway, and any that follows it, claim nothing more and ask runs to stop."""
        self._draining = Drain(grace=grace)
        self.send(self._draining)

    def send(self, message: Message, fds: Iterable[int] = ()) -> None:
        """Send to the present gateway; without one the message is dropped, as the next is told everything anew."""
        if self._present is not None:
            self._present.channel.send(message, list(fds))

    async def restart(self) -> bool:
        """Put another process in the place of the present one; return whether it serves.

        The next one is there before the present one leaves, so that nobody serves for some 50 ms only; connections
        wait in the listener's backlog meanwhile, and streams are told when to come back. A process that does not
        leave in PARK_SECONDS is killed: its successor takes over as after any death.
        """
        if self._present is None or self.stopping or self._parking:
            return False
        leaving = self._present.child
        try:
            self._next = _spawn()
        except OSError as error:
            logger.error("no gateway to take over: %s", error)
            return False
        self._parking = True
        self.send(Park())
        with trio.move_on_after(PARK_SECONDS):
            await leaving.wait()
        leaving.send_signal(signal.SIGKILL)
        with trio.move_on_after(READY_SECONDS):
            while self.child is leaving:
                await self._changed.wait()
            await self.until_up()
        return self.up and self.child is not leaving

    def hold(self) -> HeldPeer | None:
        """Return the present process for another image of this program; None unless it serves and all is said."""
        if self._present is None or not self.up or self._parking or not self._present.channel.is_calm:
            return None
        return HeldPeer(handover.hold(self._present.child), self._present.channel.descriptor)

    def keep(self, held: HeldPeer) -> None:
        """Go on with the gateway of the image before; call in front of `run`."""
        self._next = _Process(*held.take(GatewayMessage), serving=True)

    async def until_up(self) -> None:
        """Return when one serves; the caller has a deadline."""
        while not self.up:
            await self._changed.wait()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep a gateway alive; `started` when the first one serves. Returns when it leaves while stopping.

        Raises:
          RestartIntensityExceeded: it dies too often.
        """
        self._announce = task_status.started
        while True:
            process = self._next or await self._spawn()
            await self._one(process)
            if self.stopping:
                return
            if self._parking:
                self._parking = False
                logger.info("the gateway has left for its successor (%s)", self.last_exit)
                continue
            delay = self.policy.died(trio.current_time())
            if self._announce is not _nothing and self.policy.restarts >= _BOOT_ATTEMPTS:
                raise self._never_up()
            if delay is None:
                raise RestartIntensityExceeded(
                    f"the gateway died {self.policy.restarts} times within {self.policy.period:.0f} s "
                    f"(last: {self.last_exit}); its log is above"
                )
            logger.error("the gateway died (%s); starting another in %.1f s", self.last_exit, delay)
            await trio.sleep(delay)

    def _never_up(self) -> NeverReady:
        error = NeverReady(
            f"the gateway does not come up: {self.policy.restarts} times it left with {self.last_exit}; "
            "its log is above"
        )
        if self._may_pass:  # no bad configuration, for which a service manager would not try again
            error.exit_code = 1
        return error

    async def _spawn(self) -> _Process:
        """Start a process as soon as the machine has room for one.

        Raises:
          NeverReady: it has none for the very first.
        """
        while True:
            try:
                return _spawn()
            except OSError as error:
                if self._announce is not _nothing:
                    failure = NeverReady(f"the gateway cannot be started: {error}")
                    failure.exit_code = 1  # there may be descriptors, or memory, the next time
                    raise failure from error
                # No death of a gateway: it does not count as one.
                logger.error("no gateway: %s; trying again", error)
                await trio.sleep(_SPAWN_PAUSE)

    async def _one(self, process: _Process) -> None:
        self._next, self._present = None, process
        self.child = child = process.child
        channel = process.channel
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.wait)
            nursery.start_soon(channel.run)
            try:
                if process.serving:
                    self._is_up(child)
                else:
                    self._introduce()
                await self._listen(channel, child)
            finally:
                self.up = False
                self._present = None
                self._on_down()
                # Two readers on one pipe corrupt it: the next gateway may only start when this one is gone.
                with trio.CancelScope(shield=True):
                    left = await child.end(5.0 if self.stopping else 0.0)
                self.last_exit, self._may_pass = str(left), left.may_pass
                channel.close()
                nursery.cancel_scope.cancel()

    def _introduce(self) -> None:
        """Say everything that a new gateway has to know; nothing else may be said before."""
        runners = list(self._runners())
        self.send(self._configure([runner.spec.id for runner in runners]), [self._listener.fileno()])
        for runner in runners:
            self.send(runner.announcement(adopted=True), runner.ends.near)
            if runner.exited is not None:
                self.send(runner.exited)
        if self._draining is not None:
            self.send(self._draining)

    def _is_up(self, child: Child) -> None:
        if not child.ready():
            return
        self.policy.ready(trio.current_time())
        self.up = True
        self._on_up()
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        announce, self._announce = self._announce, _nothing
        announce()

    async def _listen(self, channel: Channel[Report], child: Child) -> None:
        limit = self._beat_seconds if self.up else READY_SECONDS
        while (message := await hear(channel, child, limit)) is not None:
            if isinstance(message, GatewayReady):
                limit = self._beat_seconds
                self._is_up(child)
            elif not isinstance(message, Beat):
                self._on_message(message)

    def close(self) -> None:
        """End a process that waited to take over; the present one has ended."""
        if self._next is not None:
            self._next.channel.close()
            self._next.child.send_signal(signal.SIGKILL)


def _spawn() -> _Process:
    """Start a gateway that waits for its first message."""
    ours, theirs = linux.seqpacket_pair()
    with theirs:
        fd, supervisor = theirs.fileno(), str(os.getpid())
        try:
            if (pid := firstborn.take([supervisor], fd)) is not None:
                child = Child("gateway", pid, os.pidfd_open(pid))
            else:
                child = spawn("gateway", "gateway", [str(fd), supervisor], [fd], session=False)
        except BaseException:
            ours.close()
            raise
    return _Process(child, Channel(ours, GatewayMessage))
