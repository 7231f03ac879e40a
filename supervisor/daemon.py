"""The tree: what is started in which order, who hears of whose death, what stops in which order.

Start: zygote → state lock, sockets → gateway → courier → runners → READY.
Stop: claim nothing new → ask runs to stop → TERM → KILL their groups → drain every pipe → end the streams → listener →
courier → zygote.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from supervisor import listener, state
from supervisor.child import Child
from supervisor.config import Config
from supervisor.control import OperatorSocket
from supervisor.courier_client import Courier
from supervisor.deadlines import DeadlineLedger, Due
from supervisor.gateway_client import Gateway, Report
from supervisor.notify import notify
from supervisor.policy import RestartPolicy
from supervisor.pool import PoolCount, wanted
from supervisor.runners import INTAKE, Runner, Runners, spawn_role
from supervisor.strays import Strays
from supervisor.zygote_client import ForkError, Zygote
from taskkit import linux
from taskkit.errors import NeverReady, TaskkitError
from taskkit.lifecycle import ProcessEvent, ProcessState
from taskkit.settings import PoolSettings, Settings, default_state_dir, dump_settings, load_settings
from taskkit.tokens import load_or_create_key
from taskkit.wire.messages import (
    Assigned,
    ChildStatus,
    Configure,
    Deadline,
    Disarm,
    Drain,
    Drained,
    EndStreams,
    Fork,
    Kill,
    Operation,
    Status,
    Unlink,
    ZygoteReady,
)

logger = logging.getLogger("bulkhead.supervisor")

#: Names that always reach the gateway: a loopback address cannot be rebound by a stranger's DNS.
LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")

#: Seconds for the gateway to commit what dead runners left in their pipes, at most 256 KiB each.
_DRAIN_SECONDS: Final = 10.0

#: Seconds for the gateway to end its streams and commit.
_END_SECONDS: Final = 5.0


@dataclass
class Pool:
    """One pool's runners to be."""

    name: str
    settings: PoolSettings
    policy: RestartPolicy
    births: int = 0
    failing: bool = False


class Tree:
    """One supervisor's processes.

    Made by `serve`; everything happens in trio's main thread.
    """

    def __init__(
        self,
        config: Config,
        ready: ZygoteReady,
        settings: Settings,
        directory: state.StateDirectory,
        zygote: Zygote,
        sock: socket.socket,
        url: str,
        nursery: trio.Nursery,
    ) -> None:
        self.config = config
        self.ready = ready
        self.settings = settings
        self.directory = directory
        self.zygote = zygote
        self.url = url
        self.listener = sock
        self.nursery = nursery
        self.state = ProcessState.STARTING
        self.started_at = trio.current_time()
        self.stop_requested = trio.Event()
        self.stop_now = trio.Event()
        self.zygote_restarts = 0
        self._zygote_up = trio.Event()
        self._zygote_up.set()
        self._changed = trio.Event()
        self._deadlines = DeadlineLedger()
        self._deadlines.pause(trio.current_time())
        self._deadlines_changed = trio.Event()
        self.runners = Runners(config, settings, directory.path, nursery, self._runner_up, self._runner_died)
        self.pools = [
            Pool(name, pool, RestartPolicy(intensity=None)) for name, pool in settings.all_pools.items()
        ]
        if settings.intake_runners:
            forks = any(pool.start == "fork" for pool in settings.all_pools.values())
            intake = PoolSettings(
                runners=settings.intake_runners, runs=1_000, start="fork" if forks else "spawn", nice=0
            )
            self.pools.append(Pool(INTAKE, intake, RestartPolicy(intensity=None)))
        self.gateway = Gateway(
            configure=self._configuration,
            listener=sock,
            runners=lambda: self.runners.all.values(),
            on_message=self._gateway_says,
            on_up=self._gateway_up,
            on_down=self._gateway_down,
        )
        self.poke = listener.bind_poke(directory.path / state.POKE_SOCKET)
        self.courier = Courier(
            make=self._make_courier,
            to_gateway=lambda message, fds: self.gateway.send(message, fds),
            gateway_is_up=lambda: self.gateway.up,
        )
        self.strays = Strays(self._known_pids, lambda: self._births)

    # --- what others ask -----------------------------------------------------------------------------------

    @property
    def _births(self) -> int:
        return self.zygote.births

    def _known_pids(self) -> set[int]:
        known = {runner.child.pid for runner in self.runners.all.values()}
        for child in (self.gateway.child, self.courier.child, self.zygote.child):
            if child is not None:
                known.add(child.pid)
        return known

    def _configuration(self, adopting: list[str]) -> Configure:
        hosts = self.settings.allowed_hosts
        return Configure(
            settings=dump_settings(self.settings),
            catalogue=self.ready.catalogue,
            state_dir=str(self.directory.path),
            url=self.url,
            boot_id=linux.boot_id(),
            key_file=self.settings.key_file or str(self.directory.path / state.KEY),
            allowed_hosts=[*(self.ready.allowed_hosts if hosts is None else hosts), *LOOPBACK_NAMES],
            versions=self.ready.versions,
            adopting=adopting,
        )

    # --- the gateway ---------------------------------------------------------------------------------------

    def _gateway_up(self) -> None:
        self._deadlines.resume(trio.current_time())
        self._deadlines_changed.set()
        self.courier.link()

    def _gateway_down(self) -> None:
        self._deadlines.pause(trio.current_time())
        self._deadlines_changed.set()
        self._wake()

    def _gateway_says(self, message: Report) -> None:
        if isinstance(message, Drained):
            self.runners.drained(message.runner)
            self._wake()
        elif isinstance(message, Assigned):
            runner = self.runners.all.get(message.runner)
            if runner is not None:
                runner.used = True
                runner.retired = runner.retired or message.last
                if runner.retired and runner.exited is None and runner.child.state is ProcessState.RUNNING:
                    runner.child.happen(ProcessEvent.DRAIN)
                self._wake()
        elif isinstance(message, Deadline):
            runner = self.runners.all.get(message.runner)
            if runner is not None and runner.exited is None:
                self._deadlines.arm(message, trio.current_time())
                self._deadlines_changed.set()
        elif isinstance(message, Disarm):
            self._deadlines.disarm(message.runner, message.token)
        elif isinstance(message, Kill):
            self._end_runner(message.runner, message.kind, 0.0, message.detail)

    # --- runners -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()

    def _runner_up(self, runner: Runner) -> None:
        self.gateway.send(runner.announcement(adopted=False), runner.ends.near)

    def _runner_died(self, runner: Runner) -> None:
        assert runner.exited is not None
        self._deadlines.disarm(runner.spec.id)
        self.gateway.send(runner.exited)
        self.strays.look()
        pool = next(pool for pool in self.pools if pool.name == runner.spec.pool)
        if not runner.used and self.state is ProcessState.RUNNING and runner.exited.cause.kind != "operator":
            # Nobody gave it work, so it is not a task's fault: something is wrong with the pool.
            delay = pool.policy.died(trio.current_time()) or 0.0
            logger.warning("runner %s died idle: %s", runner.spec.id, runner.exited.cause.detail)
            self.nursery.start_soon(self._back_off, pool, delay)
        self._wake()

    async def _back_off(self, pool: Pool, delay: float) -> None:
        pool.failing = True
        await trio.sleep(delay)
        pool.failing = False
        self._wake()

    def _end_runner(self, id: str, kind: str, grace: float, detail: str = "") -> None:
        runner = self.runners.all.get(id)
        if runner is None or runner.exited is not None:
            return
        if not runner.ordered:
            runner.ordered, runner.detail = kind, detail
        self.nursery.start_soon(self._end_child, runner.child, grace)

    async def _end_child(self, child: Child, grace: float) -> None:
        if grace > 0:
            child.send_signal(signal.SIGTERM)
            with trio.move_on_after(grace):
                await child.wait()
                return
        child.send_signal(signal.SIGKILL)

    async def _keep_deadlines(self) -> None:
        while True:
            self._deadlines_changed = trio.Event()
            for due in self._deadlines.due(trio.current_time()):
                self._miss(due)
            at = self._deadlines.next()
            with trio.move_on_at(at) if at < math.inf else contextlib.nullcontext():
                await self._deadlines_changed.wait()

    def _miss(self, due: Due) -> None:
        logger.info("runner %s: %s; ending it", due.runner, due.kind)
        self._end_runner(due.runner, due.kind, due.grace)

    async def _keep_pools(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Have every pool as many runners as it should; `started` when they are all there for the first time."""
        announced = False
        while True:
            self._changed = trio.Event()
            missing = 0
            for pool in self.pools:
                count = self._count(pool)
                stopping = self.state is not ProcessState.RUNNING  # a runner that leaves is not replaced
                number = 0 if pool.failing or stopping else wanted(pool.settings, count)
                if number:
                    pool.births += number
                    self.nursery.start_soon(self._make_runners, pool, number)
                missing += number + count.births
            if not missing and not announced:
                announced = True
                task_status.started()
            await self._changed.wait()

    def _count(self, pool: Pool) -> PoolCount:
        living = self.runners.living(pool.name)
        retired = sum(runner.retired for runner in living)
        return PoolCount(fresh=len(living) - retired, retired=retired, births=pool.births)

    async def _make_runners(self, pool: Pool, number: int) -> None:
        specs = [self.runners.spec(pool.name, pool.settings) for _ in range(number)]
        try:
            if pool.settings.start == "spawn":
                for spec in specs:
                    await self.runners.spawn(spec)
            else:
                await self._zygote_up.wait()
                await self.runners.fork(self.zygote, specs)
        except (ForkError, OSError) as error:
            delay = pool.policy.died(trio.current_time()) or 0.0
            logger.warning("pool %s: no new runner (%s); again in %.1f s", pool.name, error, delay)
            self.nursery.start_soon(self._back_off, pool, delay)
        finally:
            pool.births -= number
            self._wake()

    # --- zygote and courier --------------------------------------------------------------------------------

    async def keep_zygote(self) -> None:
        """Wait for the zygote to die, then start another of the same code; runners and streams do not notice."""
        policy = RestartPolicy(intensity=None)
        while True:
            await self.zygote.child.wait()
            if self.state is not ProcessState.RUNNING:
                return
            self._zygote_up = trio.Event()
            delay = policy.died(trio.current_time()) or 0.0
            logger.warning("the zygote died (%s); starting another in %.1f s", self.zygote.child.exit, delay)
            await trio.sleep(delay)
            successor = Zygote(self.config)
            try:
                self.ready = await self.nursery.start(successor.run)
            except (NeverReady, OSError) as error:
                logger.error("no zygote: %s", error)
                self.zygote = successor
                continue
            policy.ready(trio.current_time())
            self.zygote = successor
            self.zygote_restarts += 1
            self._zygote_up.set()
            self._wake()

    async def _make_courier(self, control: int, faults: int) -> Child:
        fds = (control, self.poke.fileno(), faults)
        path = str(self.directory.path)
        if all(pool.start == "spawn" for pool in self.settings.all_pools.values()):
            return spawn_role(self.config, "courier", Fork(ask=0, courier=True, state_dir=path), fds)
        await self._zygote_up.wait()
        ((pid, pidfd),) = await self.zygote.fork((), fds, courier=True, state_dir=path)
        return Child("courier", pid, pidfd, group=True)

    async def _keep_courier(self) -> None:
        while not self.courier.stopping:
            await self.courier.run()
            if not self.courier.stopping:
                self.gateway.send(Unlink())

    # --- start and stop ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; return when the tree is READY."""
        await self.nursery.start(self.gateway.run)
        self.state = ProcessState.RUNNING
        self.nursery.start_soon(self.strays.run)
        self.nursery.start_soon(self._keep_deadlines)
        self.nursery.start_soon(self.keep_zygote)
        self.nursery.start_soon(self._keep_courier)
        await self.nursery.start(self._keep_pools)

    async def stop(self) -> None:
        """Stop everything in order; each step is bounded."""
        self.state = ProcessState.STOPPING
        limits = self.settings.limits
        grace = 0.0 if self.stop_now.is_set() else limits.stop_grace_seconds
        self._deadlines.pause(trio.current_time())
        self.gateway.send(Drain(grace=grace))
        await self._until(grace, self._all_dead, self.stop_now)
        for runner in list(self.runners.all.values()):
            self._end_runner(
                runner.spec.id, "stopped", 0.0 if self.stop_now.is_set() else limits.kill_grace_seconds
            )
        await self._until(limits.kill_grace_seconds + 5.0, self._all_dead)
        await self._until(_DRAIN_SECONDS, lambda: not self.runners.all or not self.gateway.up)
        self.gateway.stopping = True
        self.gateway.send(EndStreams())
        if self.gateway.child is not None:
            with trio.move_on_after(_END_SECONDS):
                await self.gateway.child.wait()
        await self.courier.stop(2.0)

    async def _until(
        self, seconds: float, condition: Callable[[], bool], sooner: trio.Event | None = None
    ) -> None:
        with trio.move_on_after(seconds):
            while not condition() and (sooner is None or not sooner.is_set()):
                self._changed = trio.Event()
                await self._changed.wait()

    def _all_dead(self) -> bool:
        # A fork under way becomes a runner that has to be sent home as well.
        return not self._births and all(r.exited is not None for r in self.runners.all.values())

    def request_stop(self, *, now: bool) -> None:
        """Begin to stop; a second request, or `now`, waits for nobody."""
        if now or self.stop_requested.is_set():
            self.stop_now.set()
            self._wake()
        self.stop_requested.set()

    # --- what the operator sees ----------------------------------------------------------------------------

    def operate(self, operation: Operation) -> Status:
        """Carry out an operation of the command line."""
        if operation.name == "stop":
            self.request_stop(now=operation.now)
        elif operation.name == "restart-gateway" and self.gateway.child is not None:
            self.gateway.child.send_signal(signal.SIGKILL)
        return self.status()

    def status(self) -> Status:
        """Return the tree as it is now."""
        notes = [f"database: {self.ready.database_error}"] if self.ready.database_error else []
        return Status(
            pid=os.getpid(),
            state=self.state.value,
            url=self.url,
            state_dir=str(self.directory.path),
            settings_module=self.config.settings_module,
            uptime=trio.current_time() - self.started_at,
            children=list(self._children()),
            versions=self.ready.versions,
            notes=notes,
        )

    def _children(self) -> Iterator[ChildStatus]:
        infrastructure = (
            ("gateway", self.gateway.child, self.gateway.policy.restarts, self.gateway.last_exit),
            ("zygote", self.zygote.child, self.zygote_restarts, ""),
            ("courier", self.courier.child, self.courier.policy.restarts, self.courier.last_exit),
        )
        for name, child, restarts, last in infrastructure:
            if child is not None:
                yield _status_of(name, name, child, restarts, last)
        for runner in self.runners.all.values():
            yield _status_of(runner.spec.id, f"{runner.spec.role} ({runner.spec.pool})", runner.child, 0, "")


def _status_of(name: str, kind: str, child: Child, restarts: int, last: str) -> ChildStatus:
    return ChildStatus(
        name=name,
        kind=kind,
        state=child.state.value,
        pid=child.pid,
        restarts=restarts,
        age=trio.current_time() - child.started_at,
        last=last,
    )


def _resolve(config: Config, ready: ZygoteReady) -> tuple[Settings, Path]:
    settings = load_settings(config.apply(ready.settings))
    hosts = settings.allowed_hosts if settings.allowed_hosts is not None else ready.allowed_hosts
    listener.check_exposure(settings, hosts)
    path = settings.state_dir or default_state_dir(config.settings_module, os.environ)
    return settings, Path(path).absolute()


def _check_migrations(ready: ZygoteReady) -> None:
    if ready.unapplied:
        raise NeverReady(
            f"the database lacks migrations: {', '.join(ready.unapplied)}; run `python manage.py migrate` (with the "
            f"settings {ready.settings_module}), then start again"
        )


async def _watch_signals(tree: Tree) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            tree.request_stop(now=False)


async def _serve(
    config: Config, on_ready: Callable[[Status], None] | None, on_stopping: Callable[[str], None] | None
) -> None:
    zygote = Zygote(config)
    async with trio.open_nursery() as zygote_nursery:
        ready: ZygoteReady = await zygote_nursery.start(zygote.run)
        _check_migrations(ready)
        settings, path = _resolve(config, ready)
        directory = state.StateDirectory(path)
        directory.acquire()
        try:
            load_or_create_key(Path(settings.key_file or path / state.KEY))
            sock, url = await listener.listen(settings, path)
            with sock:
                await _live(config, ready, settings, directory, zygote, sock, url, on_ready, on_stopping)
        finally:
            if settings.uds is not None:
                listener.remove_unix(settings.uds)
            directory.release()
        zygote_nursery.cancel_scope.cancel()


async def _live(
    config: Config,
    ready: ZygoteReady,
    settings: Settings,
    directory: state.StateDirectory,
    zygote: Zygote,
    sock: socket.socket,
    url: str,
    on_ready: Callable[[Status], None] | None,
    on_stopping: Callable[[str], None] | None,
) -> None:
    operator = listener.listen_seqpacket(directory.path / state.CONTROL_SOCKET)
    async with trio.open_nursery() as nursery:
        tree = Tree(config, ready, settings, directory, zygote, sock, url, nursery)
        linux.set_not_dumpable()  # from here on, /proc/self is closed to ourselves as well
        try:
            nursery.start_soon(OperatorSocket(operator, os.getuid(), tree.operate).run)
            nursery.start_soon(_watch_signals, tree)
            await _start_unless_stopped(tree)
            if not tree.stop_requested.is_set():
                notify(READY=1, STATUS=f"serving {url}", MAINPID=os.getpid())
                if on_ready is not None:
                    on_ready(tree.status())
                await tree.stop_requested.wait()
            notify(STOPPING=1, STATUS="stopping")
            if on_stopping is not None:
                on_stopping("stopping")
            await tree.stop()
        finally:
            operator.close()
            tree.poke.close()
            tree.runners.close()
            nursery.cancel_scope.cancel()


async def _start_unless_stopped(tree: Tree) -> None:
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await tree.stop_requested.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        await tree.start()
        nursery.cancel_scope.cancel()


def _become_supervisor() -> None:
    linux.set_subreaper()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if (
        soft != hard
    ):  # five descriptors per runner, and a received one beyond the limit vanishes silently (unix(7))
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def serve(
    config: Config,
    *,
    on_ready: Callable[[Status], None] | None = None,
    on_stopping: Callable[[str], None] | None = None,
) -> None:
    """Run the tree in this process's main thread until it is stopped by TERM, INT or the operator socket.

    Raises:
      SupervisorError: the tree cannot start or go on; `exit_code` says what to leave with. Everything that was
        started has been ended.
      SettingsError: a setting or flag is wrong.
    """
    _become_supervisor()
    try:
        trio.run(_serve, config, on_ready, on_stopping, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        raise _leading_error(group) from group


def _leading_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error of ours in a group, else the first leaf; the only place that takes groups apart."""
    leaves: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            leaves.append(error)
    ours = [error for error in leaves if isinstance(error, TaskkitError)]
    return (ours or leaves)[0]
