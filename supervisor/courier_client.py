"""The supervisor's side of the courier: forked, linked to the gateway, replaced when it dies or hangs."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from supervisor import handover
from supervisor.child import Child
from supervisor.handover import HeldPeer
from supervisor.hearing import hear
from supervisor.policy import LONGEST_DELAY, RestartPolicy
from supervisor.zygote_client import ForkError
from taskkit import linux
from taskkit.channel import Channel
from taskkit.wire.messages import Beat, CourierMessage, CourierReady, Link, Message, Stop

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds without a beat after which a courier hangs. A database statement may take long, so ten times its beat and
#: then some.
BEAT_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Process:
    """One courier. A `ready` one has said so to the image before."""

    child: Child
    channel: Channel[CourierReady | Beat]
    faults: int
    ready: bool = False


class Courier:
    """The courier of this tree, one process after the other. Its death disturbs no run and no stream.

    Args:
      make: makes the process: takes (control, faults) descriptors, returns the child.
      to_gateway: sends to the present gateway.
    """

    def __init__(
        self,
        *,
        make: Callable[[int, int], Awaitable[Child]],
        to_gateway: Callable[[Message, list[int]], None],
        gateway_is_up: Callable[[], bool],
        longest_delay: float = LONGEST_DELAY,
    ) -> None:
        self._make = make
        self._to_gateway = to_gateway
        self._gateway_is_up = gateway_is_up
        self._channel: Channel[CourierReady | Beat] | None = None
        # It never gives up: the project's database may be away for days.
        self.policy = RestartPolicy(intensity=None, longest_delay=longest_delay)
        self.child: Child | None = None
        self.stopping = False
        self.last_exit = ""
        self._replacing = False
        self._present: _Process | None = None
        self._kept: _Process | None = None

    @property
    def pids(self) -> set[int]:
        """Of the present process: it is no stray."""
        return set() if self.child is None else {self.child.pid}

    def link(self) -> None:
        """Give gateway and courier a fresh socket to each other; an older one is void."""
        if self._channel is None or not self._gateway_is_up():
            return
        try:
            one, other = linux.seqpacket_pair()
        except OSError as error:  # no descriptor is left: the next courier is linked when there is one
            logger.error("cannot link the courier: %s", error)
            self._channel.close()
            return
        with one, other:
            self._channel.send(Link(), [one.fileno()])
            self._to_gateway(Link(), [other.fileno()])

    async def run(self) -> None:
        """Keep a courier alive until it leaves while stopping."""
        while True:
            try:
                await self._one()
            except (ForkError, OSError) as error:
                self.last_exit = str(error)
            if self.stopping:
                return
            if self._replacing:
                self._replacing = False
                continue
            delay = self.policy.died(trio.current_time())
            assert delay is not None
            logger.warning("the courier is away (%s); starting another in %.1f s", self.last_exit, delay)
            await trio.sleep(delay)

    async def _one(self) -> None:
        process, self._kept = self._kept or await self._spawn(), None
        self._present = process
        self.child = child = process.child
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.wait)
                nursery.start_soon(process.channel.run)
                try:
                    await self._listen(process)
                finally:
                    self._channel = None
                    with trio.CancelScope(shield=True):
                        self.last_exit = str(await child.end(2.0))
                    nursery.cancel_scope.cancel()
        finally:
            self._present = None
            process.channel.close()
            os.close(process.faults)

    async def _spawn(self) -> _Process:
        ours, theirs = linux.seqpacket_pair()
        faults = os.memfd_create("bulkhead-faults", os.MFD_CLOEXEC)
        try:
            with theirs:
                child = await self._make(theirs.fileno(), faults)
        except BaseException:
            ours.close()
            os.close(faults)
            raise
        return _Process(child, Channel(ours, CourierMessage), faults)

    async def _listen(self, process: _Process) -> None:
        if process.ready:
            self._is_up(process)
        while (message := await hear(process.channel, process.child, BEAT_SECONDS)) is not None:
            if isinstance(message, CourierReady):
                self._is_up(process)

    def _is_up(self, process: _Process) -> None:
        if not process.child.ready():
            return
        self.policy.ready(trio.current_time())
        self._channel = process.channel
        self.link()

    @property
    def is_starting(self) -> bool:
        """Whether a process is there, or is being made, that has not said that it turns."""
        return self._present is not None and self._channel is None

    def hold(self) -> HeldPeer | None:
        """Return the present process for another image of this program, if there is one that turns."""
        if self._present is None or self._channel is None or not self._channel.is_calm:
            return None
        return HeldPeer(handover.hold(self._present.child), self._channel.descriptor, self._present.faults)

    def keep(self, held: HeldPeer) -> None:
        """Go on with the courier of the image before; call in front of `run`."""
        self._kept = _Process(*held.take(CourierMessage), held.faults, ready=True)

    async def replace(self, grace: float) -> None:
        """Put another process, of the present zygote's code, in its place; return when the old one has left."""
        if self.child is not None and self.child.exit is None and not self.stopping:
            self._replacing = True
            await self._end(grace)

    async def stop(self, grace: float) -> None:
        """Ask it to finish the message at hand and leave; TERM and KILL follow."""
        self.stopping = True
        await self._end(grace)

    async def _end(self, grace: float) -> None:
        if self._channel is not None:
            self._channel.send(Stop())
        if self.child is not None and self.child.exit is None:
            with trio.move_on_after(grace):
                await self.child.wait()
                return
            await self.child.end(1.0)
