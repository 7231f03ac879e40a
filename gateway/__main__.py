"""The gateway's entry: `python -m gateway CONTROL_FD SUPERVISOR_PID`.

Everything it needs comes over the control socket: settings, the listening socket, the runners' pipes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import setproctitle
import trio

from gateway.app import build_app
from gateway.auth import Authenticator
from gateway.book import Book
from gateway.engine import Engine
from gateway.fanout import Hub
from gateway.serve import ServeLimits, serve
from gateway.store.protocol import StoreError
from gateway.store.rows import Opened
from gateway.store.sqlite import SqliteStore
from gateway.submission import Catalogue
from taskkit import linux
from taskkit.channel import Channel
from taskkit.errors import RemoteWireError
from taskkit.settings import load_settings
from taskkit.tokens import load_or_create_key
from taskkit.wire.messages import (
    Beat,
    Configure,
    Drain,
    EndStreams,
    Exited,
    GatewayOrder,
    GatewayReady,
    Link,
    Message,
    RunnerUp,
    Stopped,
    Unlink,
)

logger = logging.getLogger("bulkhead.gateway")

#: Seconds to wait for the store: the gateway of a supervisor that was killed drains for 1.5 s before it lets go.
_OPEN_SECONDS: Final = 6.0

#: Seconds that an orphan drains its pipes.
_ORPHAN_SECONDS: Final = 1.5

#: Seconds for a dead supervisor to be seen as dead.
_REPARENT_SECONDS: Final = 0.3

#: Seconds between beats.
_BEAT_SECONDS: Final = 1.0

#: Seconds for connections to end after their streams were told to.
_CLOSE_SECONDS: Final = 1.5

#: Seconds for the courier to take the last transitions; what it has not taken waits in the store.
_TELL_SECONDS: Final = 1.0

Orders = Configure | RunnerUp | Exited | Link | Unlink | Drain | EndStreams


@dataclass(slots=True)
class _Life:
    """Why and how the gateway is to end."""

    shutdown: trio.Event
    orphaned: bool = False


async def _open(store: SqliteStore) -> Opened:
    deadline = trio.current_time() + _OPEN_SECONDS
    while True:
        try:
            return await store.open()
        except StoreError as error:
            if trio.current_time() > deadline:
                raise
            logger.info("%s; trying again", error)
            await trio.sleep(0.05)


async def _beat(send: Callable[[Message], None]) -> None:
    while True:
        await trio.sleep(_BEAT_SECONDS)
        send(Beat())


async def _obey(channel: Channel[Orders], engine: Engine, nursery: trio.Nursery) -> bool:
    """Carry out the supervisor's orders; return True when it wants the end, False when it is gone."""
    while True:
        try:
            message, fds = await channel.receive()
        except (trio.EndOfChannel, RemoteWireError):
            return False
        if isinstance(message, RunnerUp):
            engine.runner_up(message, fds)
        elif isinstance(message, Exited):
            engine.book.runner_exited(message.runner, message.cause)
            engine.wake()
        elif isinstance(message, Link):
            nursery.start_soon(engine.courier.run, fds[0])
        elif isinstance(message, Drain):
            engine.drain()
        elif isinstance(message, EndStreams):
            return True


async def _main(control: socket.socket, supervisor: int) -> None:
    channel: Channel[Orders] = Channel(control, GatewayOrder)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        nursery.start_soon(_beat, channel.send)
        first, fds = await channel.receive()
        assert isinstance(first, Configure)
        await _live(channel, first, socket.socket(fileno=fds[0]), supervisor)
        nursery.cancel_scope.cancel()


async def _end_tasks(supervisor: int, mark: str) -> None:
    """Kill what tasks have started when the supervisor, who would do so, has died.

    `supervisor` is its pidfd. The kernel takes the runners along, but not their children. Nothing is done when only
    the control socket has ended.
    """
    with trio.move_on_after(_REPARENT_SECONDS):  # the kernel closes a dying process's sockets first
        await trio.lowlevel.wait_readable(supervisor)
        killed = await trio.to_thread.run_sync(linux.kill_tree, mark)
        logger.warning("the supervisor has died; ended %d process(es) of its tree", len(killed))


async def _live(
    channel: Channel[Orders], configure: Configure, listener: socket.socket, supervisor: int
) -> None:
    settings = load_settings(configure.settings)
    directory = Path(configure.state_dir)
    store = SqliteStore(directory, boot_id=configure.boot_id)
    opened = await _open(store)
    hub = Hub()
    engine = Engine(
        store=store,
        book=Book(settings, opened, configure.adopting, time.time()),
        hub=hub,
        catalogue=Catalogue(configure.catalogue),
        settings=settings,
        url=configure.url,
        versions=configure.versions,
        blobs=directory / "blobs",
        control=channel.send,
    )
    key = load_or_create_key(Path(configure.key_file))
    app = build_app(engine, Authenticator(key, configure.allowed_hosts, settings.cors_origins))
    shutdown = trio.Event()
    async with trio.open_nursery() as serving, trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await engine.flush()  # what was lost with the last supervisor is on disk before anybody can ask
        await serving.start(
            lambda task_status: serve(
                app,
                [listener],
                limits=ServeLimits(connections=settings.limits.connections),
                shutdown=shutdown,
                grace=_CLOSE_SECONDS,
                state={},
                task_status=task_status,
            )
        )
        channel.send(GatewayReady())
        wanted = await _obey(channel, engine, nursery)
        if not wanted:
            await _end_tasks(supervisor, configure.tree_mark)
        await _leave(engine, hub, shutdown, listener, orphaned=not wanted)
        if wanted:
            channel.send(Stopped())
        nursery.cancel_scope.cancel()
    await store.close()
    engine.close()


async def _leave(
    engine: Engine, hub: Hub, shutdown: trio.Event, listener: socket.socket, *, orphaned: bool
) -> None:
    if orphaned:
        # Whoever starts the next supervisor must be able to bind at once.
        shutdown.set()
        listener.close()
        await engine.until_quiet(_ORPHAN_SECONDS)
        hub.end_streams()
    else:
        await engine.flush()
        hub.end_streams()
        shutdown.set()
        with trio.move_on_after(_TELL_SECONDS):
            while engine.book.untold and engine.courier.up:
                await engine.round_over()  # each confirmation makes a round
        await engine.flush()


def main(argv: list[str]) -> int:
    """Run the gateway until its supervisor ends it or dies; return the exit code."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    setproctitle.setproctitle("bulkhead: gateway")
    linux.set_comm("bh:gateway")
    # The terminal's ^C is the supervisor's, and so is TERM: an orphan hears of its parent's death by the end of
    # its control socket and must not die of the signal before it has drained.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    linux.set_not_dumpable()
    control = socket.socket(fileno=int(argv[1]))
    supervisor = os.pidfd_open(int(argv[2]))
    if os.getppid() != int(argv[2]):
        return 0  # it died while this process began
    trio.run(_main, control, supervisor)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
