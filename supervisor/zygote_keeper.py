"""Keeps a zygote alive: runners, streams, submissions go on while there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from supervisor.child import Child
from supervisor.config import Config
from supervisor.handover import HeldPeer
from supervisor.policy import LONGEST_DELAY, RestartPolicy
from supervisor.zygote_client import Zygote
from taskkit import failpoints
from taskkit.errors import NeverReady
from taskkit.wire.messages import RunnerSpec, ZygoteReady

logger = logging.getLogger("bulkhead.supervisor")


class ZygoteKeeper:
    """The present zygote, one process after the other.

    Args:
      first: a zygote that is ready, and what it said.
      on_up: told synchronously when another is ready after the death of one.
    """

    def __init__(
        self,
        config: Config,
        first: Zygote,
        ready: ZygoteReady,
        nursery: trio.Nursery,
        on_up: Callable[[], None],
        longest_delay: float = LONGEST_DELAY,
    ) -> None:
        self._config = config
        self._zygote = first
        self._others: list[Zygote] = []  # those that import the project, or leave for one that has
        self._nursery = nursery
        self._on_up = on_up
        self._policy = RestartPolicy(intensity=None, longest_delay=longest_delay)
        self._making = trio.Lock()
        self._up = trio.Event()
        self._up.set()
        self.ready = ready
        self.restarts = 0
        self.last_exit = ""
        self.stopping = False

    @property
    def child(self) -> Child:
        """The present process; it may have died."""
        return self._zygote.child

    @property
    def pids(self) -> set[int]:
        """Of all zygotes that live: none is a stray."""
        known = [zygote for zygote in (self._zygote, *self._others) if zygote.was_spawned]
        return {zygote.child.pid for zygote in known}

    def hold(self) -> HeldPeer | None:
        """Return the present zygote for another image of this program; None while one imports, or one leaves."""
        return None if self._others or not self._up.is_set() else self._zygote.hold()

    @property
    def births(self) -> int:
        """Forks under way."""
        return sum(zygote.births for zygote in (self._zygote, *self._others))

    async def fork(
        self, specs: Sequence[RunnerSpec], fds: Sequence[int], *, courier: bool = False, state_dir: str = ""
    ) -> list[tuple[int, int]]:
        """Wait for a zygote, then see `Zygote.fork`."""
        await self._up.wait()
        return await self._zygote.fork(specs, fds, courier=courier, state_dir=state_dir)

    async def run(self) -> None:
        """Replace the zygote whenever it dies. It is of the same code as long as the files are.

        A project that cannot be imported any more is tried again, later and later: somebody is editing it, and
        runners that exist go on.
        """
        while True:
            watched = self._zygote
            left = str(await watched.child.wait())
            if self.stopping:
                return
            if self._zygote is not watched:
                continue  # it has left for one of newer code
            self.last_exit = left
            if self._up.is_set():  # after a successor that failed, forks wait for the event that is there
                self._up = trio.Event()
            delay = self._policy.died(trio.current_time())
            assert delay is not None, "this policy never gives up"
            logger.warning("the zygote died (%s); starting another in %.1f s", self.last_exit, delay)
            await trio.sleep(delay)
            async with self._making:
                if self._zygote is watched:
                    await self._succeed()

    async def _succeed(self) -> None:
        try:
            zygote, ready = await self._make()
        except (NeverReady, OSError) as error:
            logger.error("no zygote: %s", error)
            return
        self.restarts += 1
        self._use(zygote, ready)
        self._on_up()

    async def _make(self) -> tuple[Zygote, ZygoteReady]:
        zygote = Zygote(self._config)
        self._others.append(zygote)
        try:
            ready: ZygoteReady = await self._nursery.start(zygote.run)
        finally:
            self._others.remove(zygote)
        return zygote, ready

    def _use(self, zygote: Zygote, ready: ZygoteReady) -> None:
        self._zygote, self.ready = zygote, ready
        self._policy.ready(trio.current_time())
        self._up.set()

    async def reload(self, accept: Callable[[ZygoteReady], None]) -> None:
        """Put a zygote of the code as it is now in the place of the present one, which leaves.

        Args:
          accept: looks at what the new one found; it raises when that does not fit.

        Raises:
          NeverReady: the project cannot be imported, or was not accepted; the present zygote goes on.
          SettingsError: its settings are wrong; likewise.
          OSError: there is no room for another process; likewise.
        """
        async with self._making:
            zygote, ready = await self._make()
            try:
                failpoints.hit("reload.ready")
                accept(ready)
            except BaseException:
                self._dismiss(zygote)
                raise
            old = self._zygote
            self._use(zygote, ready)
            self._dismiss(old)

    def _dismiss(self, zygote: Zygote) -> None:
        self._others.append(zygote)
        self._nursery.start_soon(self._await_leaving, zygote)

    async def _await_leaving(self, zygote: Zygote) -> None:
        await zygote.retire()
        self._others.remove(zygote)
