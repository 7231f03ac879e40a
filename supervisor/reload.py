"""Exchanges the project's code under a tree that serves.

A new zygote is READY before the old one leaves, busy runners finish on the code they began with, and no stream
notices. Whatever does not fit (a broken import, a missing migration, a wrong setting) leaves everything as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from supervisor.courier_client import Courier
from supervisor.gateway_client import Gateway
from supervisor.pools import Pools, pools_of
from supervisor.runners import Runners
from supervisor.zygote_keeper import ZygoteKeeper
from taskkit import failpoints
from taskkit.errors import NeverReady, SettingsError
from taskkit.settings import Settings
from taskkit.wire.messages import Reconfigure, Reconfigured, ZygoteReady

logger = logging.getLogger("bulkhead.supervisor")

#: Seconds for a gateway to say that no run goes to the old code any more; it takes a round of a few milliseconds.
_ANSWER_SECONDS: Final = 5.0

#: Seconds to wait for a gateway at all, and for the pools to be full of runners of the new code.
_GATEWAY_SECONDS: Final = 30.0
_POOL_SECONDS: Final = 30.0

#: Seconds for the courier to finish what it has at hand.
_COURIER_SECONDS: Final = 5.0

#: Settings that sockets, lock and tokens of a living tree stand on.
_FIXED: Final = ("state_dir", "bind", "uds", "key_file")


def check_migrations(ready: ZygoteReady) -> None:
    """Refuse a database that lacks tables of ours.

    Raises:
      NeverReady: it does; the message has the remedy.
    """
    if ready.unapplied:
        raise NeverReady(
            f"the database lacks migrations: {', '.join(ready.unapplied)}; run `python manage.py migrate` (with the "
            f"settings {ready.settings_module}), then try again"
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """What a reload touches of a tree."""

    zygote: ZygoteKeeper
    runners: Runners
    pools: Pools
    gateway: Gateway
    courier: Courier


class Reload:
    """One tree's reloads; the caller makes them one at a time.

    Args:
      resolve: returns the settings of a project under the flags that the tree was started with.
      settings: those in force.
      on_settings: told synchronously of settings that come into force.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        resolve: Callable[[ZygoteReady], Settings],
        settings: Settings,
        on_settings: Callable[[Settings], None],
    ) -> None:
        self._parts = parts
        self._resolve = resolve
        self._settings = settings
        self._on_settings = on_settings
        self._asks = 0
        self._answer = trio.Event()
        self.is_running = False
        self._switched = False
        self.failure = ""
        self.note = ""

    def answered(self, message: Reconfigured) -> None:
        """The gateway gives no run to the old code any more."""
        if message.ask == self._asks:
            self._answer.set()

    async def run(self) -> str:
        """Reload; return what went wrong, or "" when the next run is performed by the new code."""
        self.is_running, self._switched = True, False
        try:
            await self._run()
        except (NeverReady, SettingsError, OSError) as error:
            outcome = "the new code serves all the same" if self._switched else "the code before serves on"
            self.failure = f"{error}; {outcome}"
            logger.error("reload: %s", self.failure)
        else:
            self.failure = ""
            logger.info("reload: the new code serves")
        finally:
            self.is_running = False
        return self.failure

    async def _run(self) -> None:
        parts, accepted = self._parts, list[Settings]()
        hosts = parts.zygote.ready.allowed_hosts

        def accept(ready: ZygoteReady) -> None:
            check_migrations(ready)
            accepted.append(self._resolve(ready))

        await parts.zygote.reload(accept)
        self._switched = True
        failpoints.hit("reload.switched")
        settings = self._keep_fixed(accepted[0])
        changed = settings != self._settings or hosts != parts.zygote.ready.allowed_hosts
        if changed:
            self._settings = settings
            self._on_settings(settings)
            parts.runners.settings = settings
            parts.pools.use(pools_of(settings))
        retire = parts.runners.outdate()
        parts.pools.look()
        await self._reconfigure(retire)
        if changed:  # rare, and it holds the settings in many places: streams come back by their ids
            await parts.gateway.restart()
        await parts.courier.replace(_COURIER_SECONDS)
        with trio.move_on_after(_POOL_SECONDS):
            await parts.pools.until_full()

    def _keep_fixed(self, settings: Settings) -> Settings:
        kept = {name: getattr(self._settings, name) for name in _FIXED}
        changed = [name.upper() for name in _FIXED if getattr(settings, name) != kept[name]]
        self.note = f"{', '.join(changed)}: changed, and in force after `bulkhead restart`" if changed else ""
        return settings.replace(**kept)

    async def _reconfigure(self, retire: list[str]) -> None:
        """Have the gateway, this one or another that comes meanwhile, use runners of the new code only."""
        gateway, ready = self._parts.gateway, self._parts.zygote.ready
        with trio.move_on_after(_GATEWAY_SECONDS):
            while True:
                await gateway.until_up()
                self._asks += 1
                self._answer = trio.Event()
                gateway.send(
                    Reconfigure(
                        ask=self._asks, catalogue=ready.catalogue, versions=ready.versions, retire=retire
                    )
                )
                with trio.move_on_after(_ANSWER_SECONDS):
                    await self._answer.wait()
                    return
