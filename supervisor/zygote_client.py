"""The supervisor's side of one zygote: start it, learn what it found, have it fork."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from supervisor import handover
from supervisor.child import Child, spawn
from supervisor.config import Config
from supervisor.handover import HeldPeer
from taskkit import linux
from taskkit.channel import Channel
from taskkit.errors import NeverReady, RemoteWireError
from taskkit.wire.messages import (
    Fork,
    Forked,
    ForkFailed,
    Retire,
    RunnerSpec,
    ZygoteFailed,
    ZygoteMessage,
    ZygoteReady,
)

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds until the project has to be imported. Large projects take ten; ten times that is a project that hangs.
READY_SECONDS: Final = 120.0

#: Seconds until a fork has to be answered; it takes milliseconds. A zygote that misses it is killed and replaced.
FORK_SECONDS: Final = 5.0

#: Seconds for a zygote that was told to leave.
_LEAVE_SECONDS: Final = 5.0


class ForkError(Exception):
    """The zygote could not fork, or is gone; descriptors are still the caller's."""


@dataclass(slots=True)
class _Pending:
    expected: int
    done: trio.Event
    born: dict[int, tuple[int, int]]  # pid and pidfd by index
    failure: str = ""


class Zygote:
    """A zygote process of one code version."""

    def __init__(self, config: Config, kept: tuple[HeldPeer, ZygoteReady] | None = None) -> None:
        """`kept` is the zygote of the image before, with its first message."""
        self._config = config
        self._kept = kept
        self._asks = 0
        self._pending: dict[int, _Pending] = {}
        self.child: Child
        self.was_spawned = False
        self._channel: Channel[Forked | ForkFailed | ZygoteReady | ZygoteFailed]

    @property
    def births(self) -> int:
        """Forks under way."""
        return len(self._pending)

    async def run(self, *, task_status: trio.TaskStatus[ZygoteReady]) -> None:
        """Start the process; `started` with its first message. Returns when it has died and is reaped.

        Raises:
          NeverReady: the project cannot be imported or does not survive a fork; the message has the whole story.
        """
        ready: ZygoteReady | None = None
        if self._kept is None:
            self._spawn()
        else:
            held, ready = self._kept
            self.child, self._channel = held.take(ZygoteMessage)
        self.was_spawned = True
        failure: NeverReady | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.child.wait)
            nursery.start_soon(self._channel.run)
            try:
                task_status.started(ready or await self._first_message())
                self.child.ready()
                await self._listen()
            except NeverReady as error:
                failure = error
            finally:
                self._fail_pending("the zygote is gone")
                self._channel.close()
                with trio.CancelScope(shield=True):
                    await self.child.end(1.0)
                nursery.cancel_scope.cancel()
        if failure is not None:
            # Out here, because a nursery would wrap it in a group, and whoever catches NeverReady would miss it.
            raise failure

    def _spawn(self) -> None:
        ours, theirs = linux.seqpacket_pair()
        options = {
            "settings_module": self._config.settings_module,
            "path": list(self._config.path),
            "migrate": self._config.demo,
            "supervisor": os.getpid(),
        }
        with theirs:
            arguments = [str(theirs.fileno()), json.dumps(options)]
            try:
                self.child = spawn("zygote", "taskkit.zygote", arguments, [theirs.fileno()], session=True)
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours, ZygoteMessage)

    def hold(self) -> HeldPeer | None:
        """Return it for another image of this program; None while a birth is under way, or when it is dead."""
        if self._pending or self.child.exit is not None or not self._channel.is_calm:
            return None
        return HeldPeer(handover.hold(self.child), self._channel.descriptor)

    async def _first_message(self) -> ZygoteReady:
        try:
            with trio.fail_after(READY_SECONDS):
                message, _ = await self._channel.receive()
        except trio.TooSlowError:
            raise NeverReady(
                f"importing {self._config.settings_module} took longer than {READY_SECONDS:.0f} s"
            ) from None
        except (trio.EndOfChannel, RemoteWireError) as error:
            left = await self.child.wait()
            failure = NeverReady(
                f"the zygote died while it imported the project ({left}); its output is above"
            )
            if os.WIFSIGNALED(
                left.status
            ):  # killed: nobody's configuration, so a service manager may try again
                failure.exit_code = 1
            raise failure from error
        if isinstance(message, ZygoteFailed):
            raise NeverReady(f"{self._config.settings_module}: {message.reason}\n{message.detail}".rstrip())
        if not isinstance(message, ZygoteReady):
            raise NeverReady(f"the zygote began with {type(message).__name__}")
        return message

    async def _listen(self) -> None:
        while True:
            try:
                message, fds = await self._channel.receive()
            except (trio.EndOfChannel, RemoteWireError):
                return
            pending = self._pending.get(getattr(message, "ask", -1))
            if isinstance(message, Forked) and pending is not None and len(fds) == 1:
                pending.born[message.index] = (message.pid, fds[0])
                if len(pending.born) == pending.expected:
                    pending.done.set()
                continue
            for fd in fds:
                os.close(fd)
            if isinstance(message, ForkFailed) and pending is not None:
                pending.failure = message.detail
                pending.done.set()

    async def retire(self) -> None:
        """Have it leave when the forks under way are done; return when it has died."""
        with trio.move_on_after(FORK_SECONDS):
            while self._pending:
                await next(iter(self._pending.values())).done.wait()
                await trio.lowlevel.checkpoint()
        self._channel.send(Retire())
        with trio.move_on_after(_LEAVE_SECONDS):
            await self.child.wait()
            return
        await self.child.end(0.0)

    def _fail_pending(self, reason: str) -> None:
        for pending in self._pending.values():
            pending.failure = reason
            pending.done.set()

    async def fork(
        self, specs: Sequence[RunnerSpec], fds: Sequence[int], *, courier: bool = False, state_dir: str = ""
    ) -> list[tuple[int, int]]:
        """Fork children; return (pid, pidfd) of each, in order; the pidfds are the caller's.

        `fds` are the ends of all children, one after the other; they stay the caller's.

        Raises:
          ForkError: none, or not all, came about. Those that did are strays and will be killed.
        """
        self._asks += 1
        ask = self._asks
        pending = self._pending[ask] = _Pending(1 if courier else len(specs), trio.Event(), {})
        try:
            self._channel.send(Fork(ask=ask, runners=list(specs), courier=courier, state_dir=state_dir), fds)
            if self._channel.broken:  # it has died a moment ago: nobody will answer
                raise ForkError("the zygote is gone")
            with trio.move_on_after(FORK_SECONDS):
                await pending.done.wait()
        finally:
            del self._pending[ask]
            complete = len(pending.born) == pending.expected
            if not complete:
                for _, pidfd in pending.born.values():
                    os.close(pidfd)
        if complete:
            return [pending.born[index] for index in range(pending.expected)]
        if not pending.failure:
            logger.error("the zygote did not fork within %.0f s; it is replaced", FORK_SECONDS)
            self._channel.close()
        raise ForkError(pending.failure or "the zygote did not answer")
