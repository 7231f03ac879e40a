"""One supervisor from its first step to its last: ground, tree, signals, exit."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import trio

from supervisor import handover, listener, state
from supervisor.child import keep_mark
from supervisor.config import Config
from supervisor.control import OperatorSocket
from supervisor.handover import HandOver
from supervisor.notify import notify
from supervisor.reload import check_migrations
from supervisor.tree import Ground, Tree
from supervisor.zygote_client import Zygote
from taskkit import linux
from taskkit.errors import TaskkitError
from taskkit.settings import Settings, default_state_dir, load_settings
from taskkit.tokens import load_or_create_key
from taskkit.wire.messages import Status, ZygoteReady

logger = logging.getLogger("bulkhead.supervisor")

OnReady = Callable[[Status], None]
OnStopping = Callable[[str], None]


def _resolve(config: Config, ready: ZygoteReady) -> Settings:
    settings = load_settings(config.apply(ready.settings))
    hosts = settings.allowed_hosts if settings.allowed_hosts is not None else ready.allowed_hosts
    listener.check_exposure(settings, hosts)
    return settings


def _place(config: Config, settings: Settings) -> Path:
    return Path(settings.state_dir or default_state_dir(config.settings_module, os.environ)).absolute()


async def _serve(config: Config, on_ready: OnReady | None, on_stopping: OnStopping | None) -> None:
    had_terminal = _has_terminal()
    kept = handover.take()
    if kept is not None:
        keep_mark(kept.mark)
    zygote = Zygote(config, None if kept is None else (kept.zygote, kept.ready))
    async with trio.open_nursery() as zygote_nursery:
        ready: ZygoteReady = await zygote_nursery.start(zygote.run)
        if kept is None:
            check_migrations(ready)
        settings = _resolve(config, ready)
        path = _place(config, settings)
        directory = state.StateDirectory(path)
        if kept is None:
            directory.acquire()
        else:
            directory.keep(kept.lock)
        try:
            load_key = functools.partial(load_or_create_key, Path(settings.key_file or path / state.KEY))
            if kept is None:  # it was looked at before this image began, and the gateway has it
                load_key()
            with contextlib.ExitStack() as stack:
                sock, url = await _listen(settings, path, kept)
                operator = _listen_operator(path, kept)
                stack.enter_context(sock)
                stack.enter_context(operator)
                resolve = functools.partial(_resolve, config)
                ground = Ground(
                    config, ready, settings, directory, sock, url, resolve, operator, load_key, kept
                )
                greet = None if kept is not None else on_ready
                await _live(ground, zygote, greet, on_stopping, had_terminal=had_terminal)
        finally:
            if settings.uds is not None:
                listener.remove_unix(settings.uds)
            directory.release()
        zygote_nursery.cancel_scope.cancel()


async def _listen(settings: Settings, path: Path, kept: HandOver | None) -> tuple[socket.socket, str]:
    if kept is not None:
        return socket.socket(fileno=kept.listener), kept.url
    return await listener.listen(settings, path)


def _listen_operator(path: Path, kept: HandOver | None) -> socket.socket:
    if kept is not None:
        return socket.socket(fileno=kept.operator)
    return listener.listen_seqpacket(path / state.CONTROL_SOCKET)


async def _live(
    ground: Ground,
    zygote: Zygote,
    on_ready: OnReady | None,
    on_stopping: OnStopping | None,
    *,
    had_terminal: bool,
) -> None:
    async with trio.open_nursery() as nursery:
        tree = Tree(ground, zygote, nursery)
        linux.set_not_dumpable()  # from here on, /proc/self is closed to ourselves as well
        try:
            nursery.start_soon(OperatorSocket(ground.operator, os.getuid(), tree.operate).run)
            for watch in (_watch_signals, _watch_upgrades):
                await nursery.start(watch, tree)
            await nursery.start(_watch_hangups, tree, had_terminal)
            handover.hear_signals()
            await _start_unless_stopped(tree)
            if not tree.stop_requested.is_set():
                notify(READY=1, STATUS=f"serving {ground.url}", MAINPID=os.getpid())
                if on_ready is not None:
                    on_ready(tree.status())
                await tree.stop_requested.wait()
            notify(STOPPING=1, STATUS="stopping")
            if on_stopping is not None:
                on_stopping("stopping")
            await tree.stop()
        finally:
            tree.close()
            nursery.cancel_scope.cancel()


async def _watch_upgrades(tree: Tree, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGUSR2) as signals:
        task_status.started()
        async for _ in signals:
            if error := await tree.upgrade():
                logger.error("upgrade: %s", error)


async def _watch_signals(tree: Tree, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            tree.request_stop(now=False)


async def _watch_hangups(tree: Tree, had_terminal: bool, *, task_status: trio.TaskStatus[None]) -> None:
    """Reload at HUP; but the kernel also sends it when the terminal of a foreground tree is closed.

    That may have been while the project was imported, when the signal was ignored.
    """

    def has_lost_it() -> bool:
        return had_terminal and not _has_terminal()

    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        while not has_lost_it():
            await anext(signals)
            if not has_lost_it():
                await tree.reload()  # one that comes meanwhile is remembered
        tree.request_stop(now=False)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal (tty(4): the open fails without one)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError as error:  # not, for example, that no descriptor is left
        return error.errno not in (errno.ENXIO, errno.EIO, errno.ENOENT)
    return True


async def _start_unless_stopped(tree: Tree) -> None:
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await tree.stop_requested.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        await tree.start()
        nursery.cancel_scope.cancel()


def _become_supervisor() -> None:
    for number in (signal.SIGHUP, signal.SIGUSR2):  # until they can be heard, they must not end what begins
        signal.signal(number, signal.SIG_IGN)
    linux.set_subreaper()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if (
        soft != hard
    ):  # five descriptors per runner, and a received one beyond the limit vanishes silently (unix(7))
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def serve(config: Config, *, on_ready: OnReady | None = None, on_stopping: OnStopping | None = None) -> None:
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
        error = _leading_error(group)
        if isinstance(error, OSError):  # it becomes one line at the command line, and where it was matters
            logger.error("the tree has ended: %s", error, exc_info=group)
        raise error from group


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
