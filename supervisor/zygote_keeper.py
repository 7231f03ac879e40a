"""Keeps a zygote alive: runners, streams, submissions go on while there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from supervisor.child import Child
from supervisor.config import Config
from supervisor.policy import RestartPolicy
from supervisor.zygote_client import Zygote
from taskkit.errors import NeverReady
from taskkit.wire.messages import RunnerSpec, ZygoteReady

logger = logging.getLogger("bulkhead.supervisor")


class ZygoteKeeper:
    """The present zygote, one process after the other.

    Args:
      first: a zygote that is ready, and what it said.
      on_up: told synchronously when another is ready.
    """

    def __init__(
        self,
        config: Config,
        first: Zygote,
        ready: ZygoteReady,
        nursery: trio.Nursery,
        on_up: Callable[[], None],
    ) -> None:
        self._config = config
        self._zygote = first
        self._successor: Zygote | None = None
        self._nursery = nursery
        self._on_up = on_up
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
        """Of the present process and of one that still imports the project: neither is a stray."""
        zygotes = [zygote for zygote in (self._zygote, self._successor) if zygote is not None]
        return {zygote.child.pid for zygote in zygotes if zygote.was_spawned}

    @property
    def births(self) -> int:
        """Forks under way."""
        return self._zygote.births

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
        policy = RestartPolicy(intensity=None)
        while True:
            self.last_exit = str(await self.child.wait())
            if self.stopping:
                return
            self._up = trio.Event()
            delay = policy.died(trio.current_time())
            assert delay is not None, "this policy never gives up"
            logger.warning("the zygote died (%s); starting another in %.1f s", self.last_exit, delay)
            await trio.sleep(delay)
            self._successor = successor = Zygote(self._config)
            try:
                self.ready = await self._nursery.start(successor.run)
            except (NeverReady, OSError) as error:
                logger.error("no zygote: %s", error)
                continue
            finally:
                self._successor = None
                if successor.was_spawned:
                    self._zygote = successor
            policy.ready(trio.current_time())
            self.restarts += 1
            self._up.set()
            self._on_up()
