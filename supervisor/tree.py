"""The tree: who hears of whose death, what starts in which order, what stops in which order.

Start: zygote → state lock, sockets → gateway → courier → runners → READY.
Stop: claim nothing new → ask runs to stop → TERM → KILL their groups → drain every pipe → end the streams →
courier → zygote → listener.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from supervisor import listener, state
from supervisor.child import Child, tree_mark
from supervisor.config import Config
from supervisor.courier_client import Courier
from supervisor.endings import NO_GATEWAY, STALLED, STOPPING, Endings
from supervisor.gateway_client import Gateway, Report
from supervisor.handover import HandOver
from supervisor.notify import notify
from supervisor.pools import Pools, pools_of
from supervisor.reload import Parts, Reload
from supervisor.runners import Runner, Runners, spawn_role
from supervisor.strays import Strays
from supervisor.upgrade import Upgrade
from supervisor.zygote_client import Zygote
from supervisor.zygote_keeper import ZygoteKeeper
from taskkit import linux
from taskkit.lifecycle import ProcessState
from taskkit.settings import Settings, dump_settings
from taskkit.wire.messages import (
    Assigned,
    ChildStatus,
    Configure,
    Deadline,
    Disarm,
    Drained,
    EndStreams,
    Fork,
    Greeted,
    Kill,
    Notes,
    Operation,
    Reconfigured,
    RunnerSpec,
    Stalled,
    Status,
    ZygoteReady,
)

#: Names that always reach the gateway: a loopback address cannot be rebound by a stranger's DNS.
LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")

#: Migrations that are named in a note.
_NAMED: Final = 5

#: Seconds for the gateway to commit what dead runners left in their pipes, at most 256 KiB each.
_DRAIN_SECONDS: Final = 10.0

#: Seconds for the gateway to end its streams, commit, and tell the courier.
_END_SECONDS: Final = 6.0


@dataclass(frozen=True, slots=True)
class Ground:
    """What a tree stands on, made before it and let go after it."""

    config: Config
    ready: ZygoteReady
    settings: Settings
    directory: state.StateDirectory
    listener: socket.socket
    url: str
    resolve: Callable[[ZygoteReady], Settings]
    operator: socket.socket
    load_key: Callable[[], object]
    kept: HandOver | None = None


class Tree:
    """One supervisor's processes. Everything happens in trio's main thread.

    Args:
      zygote: it is ready; its nursery outlives this one.
    """

    def __init__(self, ground: Ground, zygote: Zygote, nursery: trio.Nursery) -> None:
        self._ground = ground
        self._nursery = nursery
        self._settings = ground.settings
        longest = self._settings.limits.restart_delay_seconds
        self._state = ProcessState.STARTING
        self._started_at = trio.current_time()
        self._changed = trio.Event()
        self.stop_requested = trio.Event()
        self._stop_now = trio.Event()
        if ground.kept is not None:
            self._poke = socket.socket(fileno=ground.kept.poke)
        else:
            self._poke = listener.bind_poke(ground.directory.path / state.POKE_SOCKET)
        self._runners = Runners(
            ground.config, ground.settings, ground.directory.path, nursery, self._runner_up, self._runner_died
        )
        self._zygote = ZygoteKeeper(ground.config, zygote, ground.ready, nursery, self._wake, longest)
        self._pools = Pools(
            pools_of(ground.settings), self._runners, nursery, fork=self._fork, on_made=self._wake
        )
        self._endings = Endings(self._runners, nursery, on_expired=lambda told: self._gateway.send(told))
        self._gateway = Gateway(
            limits=self._settings.limits,
            configure=self._configuration,
            listener=ground.listener,
            runners=lambda: self._runners.all.values(),
            on_message=self._gateway_says,
            on_up=self._gateway_up,
            on_down=self._gateway_down,
        )
        self._courier = Courier(
            make=self._make_courier,
            to_gateway=lambda message, fds: self._gateway.send(message, fds),
            gateway_is_up=lambda: self._gateway.up,
            longest_delay=longest,
        )
        self._reload = Reload(
            Parts(self._zygote, self._runners, self._pools, self._gateway, self._courier),
            resolve=ground.resolve,
            settings=self._settings,
            on_settings=self._use,
        )
        self._upgrade = Upgrade(pause=self._pause, hold=self._hold, check=ground.load_key)
        self._stalled = ""
        self._gateway_notes: list[str] = []
        self._changing = trio.Lock()  # a reload and an upgrade would wait for each other
        self._finished = trio.Event()  # what an upgrade leaves to do
        self._strays = Strays(self._known_pids, lambda: self._zygote.births)

    def _use(self, settings: Settings) -> None:
        self._settings = settings

    def _wake(self) -> None:
        self._changed.set()
        self._pools.look()

    # --- runners -------------------------------------------------------------------------------------------

    def _known_pids(self) -> set[int]:
        known = self._gateway.pids | self._zygote.pids | self._courier.pids | self._upgrade.pids
        return known | {runner.child.pid for runner in self._runners.all.values()}

    async def _fork(self, specs: Sequence[RunnerSpec]) -> None:
        await self._runners.fork(self._zygote.fork, specs)

    def _runner_up(self, runner: Runner) -> None:
        self._gateway.send(runner.announcement(adopted=False), runner.ends.near)

    def _runner_died(self, runner: Runner) -> None:
        assert runner.exited is not None
        self._endings.disarm(runner.spec.id)
        self._gateway.send(runner.exited)
        self._strays.look()
        if (
            not self._gateway.up
        ):  # nobody will say for a while, and forks without an end are worse than a pause
            self._judge(runner)
        self._wake()

    def _judge(self, runner: Runner) -> None:
        """Whether a dead runner had work is known when everything that the gateway had to say of it has come."""
        idle = not (runner.used or runner.ordered or runner.outdated or runner.judged)
        runner.judged = True
        if self._state is ProcessState.RUNNING and idle:
            self._pools.died_idle(runner)

    # --- gateway and courier -------------------------------------------------------------------------------

    def _configuration(self, adopting: list[str]) -> Configure:
        settings, path = self._settings, self._ground.directory.path
        hosts = self._zygote.ready.allowed_hosts if settings.allowed_hosts is None else settings.allowed_hosts
        return Configure(
            settings=dump_settings(settings),
            catalogue=self._zygote.ready.catalogue,
            state_dir=str(path),
            url=self._ground.url,
            boot_id=linux.boot_id(),
            key_file=settings.key_file or str(path / state.KEY),
            allowed_hosts=[*hosts, *LOOPBACK_NAMES],
            versions=self._zygote.ready.versions,
            adopting=adopting,
            tree_mark=tree_mark(),
        )

    def _gateway_up(self) -> None:
        self._endings.resume(NO_GATEWAY)
        self._courier.link()

    def _gateway_down(self) -> None:
        self._endings.pause(NO_GATEWAY)
        self._stalled = ""  # the next gateway finds out by itself
        self._endings.resume(STALLED)
        self._wake()

    def _gateway_says(self, message: Report) -> None:
        if isinstance(message, Drained):
            runner = self._runners.drained(message.runner)
            if runner is not None:
                self._judge(runner)
            self._wake()
        elif isinstance(message, Greeted):
            self._greeted(message.runner)
        elif isinstance(message, Assigned):
            self._assigned(message)
        elif isinstance(message, Deadline):
            self._endings.arm(message)
        elif isinstance(message, Disarm):
            self._endings.disarm(message.runner, message.token)
        elif isinstance(message, Stalled):
            self._stalled = message.error
            (self._endings.pause if message.error else self._endings.resume)(STALLED)
            self._wake()
        elif isinstance(message, Notes):
            self._gateway_notes = message.notes
        elif isinstance(message, Reconfigured):
            self._reload.answered(message)
        elif isinstance(message, Kill):
            self._endings.end(message.runner, message.kind, 0.0, message.detail)

    def _greeted(self, id: str) -> None:
        runner = self._runners.all.get(id)
        if runner is not None:
            runner.greeted()
            self._wake()

    def _assigned(self, message: Assigned) -> None:
        runner = self._runners.all.get(message.runner)
        if runner is None:
            return
        runner.used = True
        if message.last and not runner.retired:
            runner.retire()
        self._wake()

    async def _make_courier(self, control: int, faults: int) -> Child:
        fds = (control, self._poke.fileno(), faults)
        path = str(self._ground.directory.path)
        if all(pool.start == "spawn" for pool in self._settings.all_pools.values()):
            return spawn_role(self._ground.config, "courier", Fork(ask=0, courier=True, state_dir=path), fds)
        ((pid, pidfd),) = await self._zygote.fork((), fds, courier=True, state_dir=path)
        return Child("courier", pid, pidfd, group=True)

    # --- start and stop ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; return when the tree is READY.

        Raises:
          SupervisorError: the gateway does not come up.
        """
        if self._ground.kept is not None:
            self._keep(self._ground.kept)
        await self._nursery.start(self._gateway.run)
        self._state = ProcessState.RUNNING
        self._nursery.start_soon(self._strays.run)
        self._nursery.start_soon(self._endings.run)
        self._nursery.start_soon(self._zygote.run)
        self._nursery.start_soon(self._courier.run)
        await self._nursery.start(self._pools.run)
        if self._ground.kept is None:
            self._finished.set()
        else:
            self._nursery.start_soon(self._finish_upgrade)

    # --- another version of this program ---------------------------------------------------------------------

    def _hold(self) -> HandOver | None:
        """Return everything for another image of this program; None while something is on its way."""
        zygote, gateway, courier = self._zygote.hold(), self._gateway.hold(), self._courier.hold()
        busy = self._reload.is_running or self._courier.is_starting or self._zygote.births
        if zygote is None or gateway is None or busy or self.stop_requested.is_set():
            return None
        return HandOver(
            mark=tree_mark(),
            lock=self._ground.directory.lock,
            listener=self._ground.listener.fileno(),
            url=self._ground.url,
            poke=self._poke.fileno(),
            operator=self._ground.operator.fileno(),
            ready=self._zygote.ready,
            zygote=zygote,
            gateway=gateway,
            courier=courier,
            runners=[runner.hold() for runner in self._runners.all.values()],
            deadlines=self._endings.held(),
            stalled=self._endings.stalled,
            notes=self._gateway_notes,
        )

    def _keep(self, kept: HandOver) -> None:
        """Go on where the image before stopped."""
        self._gateway.keep(kept.gateway)
        self._runners.keep(kept.runners)
        self._endings.keep(kept.deadlines, stalled=kept.stalled)
        self._gateway_notes = kept.notes
        if kept.courier is not None:
            self._courier.keep(kept.courier)

    def _pause(self, paused: bool) -> None:
        if self._state is ProcessState.RUNNING:  # a tree that stops has stopped its pools for good
            self._pools.stop(paused)

    async def _finish_upgrade(self) -> None:
        """Exchange what is still of the old version: the code that was imported, then the gateway."""
        if not await self.reload():
            await self._gateway.restart()
        self._finished.set()

    async def upgrade(self) -> str:
        """Become the installed version of this program; return why not. If it succeeds, nobody is left to return."""
        if self._state is not ProcessState.RUNNING or self.stop_requested.is_set():
            return f"the tree is {self._state.value}"
        async with self._changing:
            return await self._upgrade.run()

    def request_stop(self, *, now: bool) -> None:
        """Begin to stop; a second request, or `now`, waits for nobody."""
        if now or self.stop_requested.is_set():
            self._stop_now.set()
            self._wake()
        self.stop_requested.set()

    async def stop(self) -> None:
        """Stop everything in order; each step is bounded."""
        self._state = ProcessState.STOPPING
        self._zygote.stopping = True
        self._pools.stop()
        self._endings.pause(STOPPING)
        self._gateway.drain(self._settings.limits.stop_grace_seconds)
        await self._until(self._settings.limits.stop_grace_seconds, self._all_dead, unless_now=True)
        await self._end_runners()
        await self._until(_DRAIN_SECONDS, self._is_drained)
        self._gateway.stopping = True
        self._gateway.send(EndStreams())
        if self._gateway.child is not None:
            with trio.move_on_after(_END_SECONDS):
                await self._gateway.child.wait()
        await self._courier.stop(2.0)

    async def _end_runners(self) -> None:
        """TERM what has not left in its grace, then KILL; without grace, or in a hurry, KILL at once."""
        grace = 0.0 if self._stop_now.is_set() else self._settings.limits.kill_grace_seconds
        for id in list(self._runners.all):
            self._endings.end(id, "stopped", grace)
        await self._until(grace, self._all_dead, unless_now=True)
        for id in list(self._runners.all):
            self._endings.end(id, "stopped", 0.0)
        await self._until(5.0, self._all_dead)

    async def _until(
        self, seconds: float, condition: Callable[[], bool], *, unless_now: bool = False
    ) -> None:
        with trio.move_on_after(seconds):
            while not condition() and not (unless_now and self._stop_now.is_set()):
                self._changed = trio.Event()
                await self._changed.wait()

    def _is_drained(self) -> bool:
        # What a store does not take is not lost by leaving: these runs are accounted for at the next start.
        return not self._runners.all or not self._gateway.up or bool(self._stalled)

    def _all_dead(self) -> bool:
        # A fork under way becomes a runner that has to be sent home as well.
        return not self._zygote.births and all(r.exited is not None for r in self._runners.all.values())

    def close(self) -> None:
        """Let go of every descriptor; all processes have ended."""
        self._poke.close()
        self._gateway.close()
        self._runners.close()

    # --- what the operator sees ----------------------------------------------------------------------------

    async def operate(self, operation: Operation) -> Status:
        """Carry out an operation of the command line; return the status after it."""
        error = ""
        if operation.name == "stop":
            self.request_stop(now=operation.now)
        elif operation.name == "reload":
            error = await self.reload()
        elif operation.name == "upgrade":
            error = await self.upgrade()
        elif operation.name == "upgraded":
            await self._finished.wait()
            error = self._reload.failure
        elif operation.name == "restart-gateway":
            error = (
                "" if await self._gateway.restart() else "no gateway has taken the place of the one that was"
            )
        elif operation.name != "status":
            error = f"this supervisor knows no operation {operation.name[:40]!r}"
        return msgspec.structs.replace(self.status(), error=error)

    async def reload(self) -> str:
        """Exchange the project's code; return what went wrong, or ""."""
        if self._state is not ProcessState.RUNNING or self.stop_requested.is_set():
            return f"the tree is {self._state.value}"
        async with self._changing:
            notify(
                RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000, STATUS="reloading the project's code"
            )
            failure = await self._reload.run()
            notify(READY=1, STATUS=f"serving {self._ground.url}")
            return failure

    def status(self) -> Status:
        """Return the tree as it is now."""
        ready = self._zygote.ready
        return Status(
            pid=os.getpid(),
            state=self._state.value,
            url=self._ground.url,
            state_dir=str(self._ground.directory.path),
            settings_module=self._ground.config.settings_module,
            uptime=trio.current_time() - self._started_at,
            children=list(self._children()),
            versions=ready.versions,
            notes=list(self._notes(ready)),
        )

    def _notes(self, ready: ZygoteReady) -> Iterator[str]:
        if ready.database_error:
            yield f"database: {ready.database_error}"
        if ready.pending:
            some = ", ".join(ready.pending[:_NAMED]) + (" …" if len(ready.pending) > _NAMED else "")
            yield f"database: migrations were not applied at the last start or reload: {some}; `manage.py migrate`"
        if self._stalled:
            yield f"{self._stalled}; tasks wait, and go on by themselves when it can be"
        if self._reload.is_running:
            yield "reload: the project's code is being loaded"
        if self._reload.failure:
            yield f"reload: {self._reload.failure}"
        if self._reload.note:
            yield f"settings: {self._reload.note}"
        yield from self._pools.notes()
        yield from self._gateway_notes

    def _children(self) -> Iterator[ChildStatus]:
        gateway, courier, zygote = self._gateway, self._courier, self._zygote
        if gateway.child is not None:
            yield _status_of("gateway", "gateway", gateway.child, gateway.policy.restarts, gateway.last_exit)
        yield _status_of("zygote", "zygote", zygote.child, zygote.restarts, zygote.last_exit)
        if courier.child is not None:
            yield _status_of("courier", "courier", courier.child, courier.policy.restarts, courier.last_exit)
        for runner in self._runners.all.values():
            yield _status_of(runner.spec.id, f"{runner.spec.role} ({runner.spec.pool})", runner.child)


def _status_of(name: str, kind: str, child: Child, restarts: int = 0, last: str = "") -> ChildStatus:
    age = trio.current_time() - child.started_at
    return ChildStatus(
        name=name, kind=kind, state=child.state.value, pid=child.pid, restarts=restarts, age=age, last=last
    )
