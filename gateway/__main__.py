"""The gateway's entry: `python -m gateway CONTROL_FD SUPERVISOR_PID`.

Everything it needs comes over the control socket: settings, the listening socket, the runners' pipes.
"""

from __future__ import annotations

import enum
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import setproctitle
import trio
from starlette.types import ASGIApp

from gateway import bounds
from gateway.app import build_app
from gateway.auth import Authenticator
from gateway.book import Book
from gateway.bounds import ServeLimits
from gateway.direct import Direct
from gateway.engine import Engine
from gateway.fanout import Hub
from gateway.link import SHARED
from gateway.retention import Retention
from gateway.serve import serve
from gateway.store.protocol import StoreError
from gateway.store.rows import Opened
from gateway.store.sqlite import SqliteStore
from gateway.submission import Catalogue
from gateway.tally import DoorTally
from taskkit import failpoints, linux
from taskkit.channel import Channel
from taskkit.errors import RemoteWireError
from taskkit.settings import LimitSettings, Settings, load_settings
from taskkit.tokens import load_or_create_key
from taskkit.wire.messages import (
    Beat,
    Configure,
    Drain,
    EndStreams,
    Exited,
    Expired,
    GatewayOrder,
    GatewayReady,
    Link,
    Message,
    Park,
    Reconfigure,
    RunnerUp,
    Stopped,
)

logger = logging.getLogger("bulkhead.gateway")

#: Seconds to wait for the store: the gateway of a supervisor that was killed drains for 1.5 s before it lets go.
_OPEN_SECONDS: Final = 6.0

#: Seconds that an orphan drains its pipes.
_ORPHAN_SECONDS: Final = 1.5

#: Seconds for a dead supervisor to be seen as dead.
_REPARENT_SECONDS: Final = 0.3

#: Beats within the time after which the supervisor takes this process for hung; one may be late, or two.
_BEATS: Final = 4

#: Seconds for connections to end after their streams were told to.
_CLOSE_SECONDS: Final = 1.5

#: Milliseconds after which clients come back after a planned restart, at random in between: the next gateway serves
#: within a few hundred.
_PARK_RETRY: Final = (200, 2_000)

#: Seconds for the courier to take the last transitions; what it has not taken waits in the store.
_TELL_SECONDS: Final = 1.0

#: Seconds for which no run begins at a tree's start if others may have taken some over meanwhile: the courier says so
#: within one.
_HOLD_SECONDS: Final = 3.0

#: What the supervisor says.
Orders = GatewayOrder

#: Python's, but for the last: everything is looked through after 350,000 new objects. With the usual 10, ten thousand
#: subscribers who come at once, 33 objects each, brought that about three times, for 90 to 110 ms.
_GC_THRESHOLDS: Final = (700, 10, 50)


class _End(enum.Enum):
    """Why the gateway leaves."""

    #: the tree stops: every runner has ended
    STOP = enum.auto()
    #: another gateway takes over, with the same pipes
    PARK = enum.auto()
    #: the supervisor has died
    ORPHANED = enum.auto()


async def _open(store: SqliteStore) -> Opened:
    deadline = trio.current_time() + _OPEN_SECONDS
    said = ""
    while True:
        try:
            return await store.open()
        except StoreError as error:
            if trio.current_time() > deadline:
                raise
            if str(error) != said:
                said = str(error)
                logger.info("%s; trying again for %.0f s", error, _OPEN_SECONDS)
            await trio.sleep(0.05)


async def _beat(send: Callable[[Message], None], seconds: float) -> None:
    while True:
        await trio.sleep(seconds / _BEATS)
        send(Beat())


async def _obey(channel: Channel[Orders], engine: Engine, nursery: trio.Nursery) -> _End:
    """Carry out the supervisor's orders until it wants the end, or is gone."""
    while True:
        try:
            message, fds = await channel.receive()
        except (trio.EndOfChannel, RemoteWireError):
            return _End.ORPHANED
        if isinstance(message, RunnerUp):
            engine.runner_up(message, fds)
        elif isinstance(message, Exited):
            engine.runner_exited(message)
        elif isinstance(message, Expired):
            engine.expired(message)
        elif isinstance(message, Link):
            nursery.start_soon(engine.courier.run, fds[0])
        elif isinstance(message, Drain):
            engine.drain()
        elif isinstance(message, Reconfigure):
            engine.reconfigure(message)
        elif isinstance(message, Park):
            return _End.PARK
        elif isinstance(message, EndStreams):
            return _End.STOP


async def _main(control: socket.socket, supervisor: int) -> None:
    channel: Channel[Orders] = Channel(control, GatewayOrder)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        try:
            # Without a limit: it may be kept ready for the end of another gateway, as long as that takes.
            first, fds = await channel.receive()
        except trio.EndOfChannel:  # never needed, or the supervisor has died
            nursery.cancel_scope.cancel()
            return
        assert isinstance(first, Configure)
        failpoints.hit("gateway.configured")
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
    store = SqliteStore(directory, boot_id=configure.boot_id, durability=settings.durability)
    opened = await _open(store)
    failpoints.hit("gateway.opened")
    hub = Hub(opened.next_pos - 1, opened.gaps, fast_path=settings.fast_path)
    engine = Engine(
        store=store,
        book=Book(settings, opened, configure.adopting, time.time(), trio.current_time()),
        hub=hub,
        catalogue=Catalogue(configure.catalogue),
        settings=settings,
        url=configure.url,
        versions=configure.versions,
        blobs=directory / "blobs",
        control=channel.send,
    )
    key = load_or_create_key(Path(configure.key_file))
    retention = Retention(store, settings, configure.boot_id)
    if not configure.adopting:
        await retention.inherit()
        if await store.upkeep.noted(SHARED):
            engine.hold(_HOLD_SECONDS)
    door = DoorTally()
    authenticator = Authenticator(
        key,
        configure.allowed_hosts,
        settings.cors_origins,
        desk=engine,
        limits=settings.limits,
        channels=settings.async_request.anonymous,
    )
    app = build_app(engine, authenticator, retention, door)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        nursery.start_soon(hub.broadcast.run)
        nursery.start_soon(_beat, channel.send, settings.limits.gateway_beat_seconds)
        await engine.flush()  # what was lost with the last supervisor is on disk before anybody can ask
        service = _Service(app, listener, settings, door, Direct(engine, authenticator).stream_of)
        await nursery.start(service.run)
        nursery.start_soon(retention.run)
        failpoints.hit("gateway.serving")
        channel.send(GatewayReady())
        end = await _obey(channel, engine, nursery)
        if end is _End.ORPHANED:
            await _end_tasks(supervisor, configure.tree_mark)
        await _leave(engine, hub, service, end)
        nursery.cancel_scope.cancel()
    await store.close()
    engine.close()
    if end is not _End.ORPHANED:
        channel.send(Stopped())


def serve_limits(limits: LimitSettings) -> ServeLimits:
    """Return the bounds of the server that are settings."""
    return ServeLimits(
        connections=limits.connections,
        accepts_per_second=limits.accepts_per_second,
        write_seconds=limits.write_seconds,
        headers_seconds=limits.headers_seconds,
        body_seconds=limits.body_seconds + 1.0,  # the application answers 408 before the connection ends
        header_bytes=limits.header_bytes,
        message_bytes=limits.message_bytes,
        send_buffer=limits.send_buffer_bytes,
    )


class _Service:
    """The HTTP server, with its end."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        settings: Settings,
        door: DoorTally,
        direct: bounds.Direct,
    ) -> None:
        self._app = app
        self._fast = settings.fast_path
        self._direct = direct
        self._door = door
        self._listener = listener
        self._limits = serve_limits(settings.limits)
        self._shutdown = trio.Event()
        self._over = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve; `started` when it accepts, returns when the last connection has ended."""
        await serve(
            self._app,
            [self._listener],
            limits=self._limits,
            shutdown=self._shutdown,
            grace=_CLOSE_SECONDS,
            state={},
            door=self._door,
            fast=self._fast,
            direct=self._direct,
            task_status=task_status,
        )
        self._over.set()

    def stop_accepting(self) -> None:
        """Take no further connection; answers under way are finished."""
        self._shutdown.set()

    def close_listener(self) -> None:
        """Let go of the address."""
        self._listener.close()

    async def over(self) -> None:
        """Return when every connection has ended; they are reset after _CLOSE_SECONDS."""
        with trio.move_on_after(_CLOSE_SECONDS + 0.5):
            await self._over.wait()


async def _leave(engine: Engine, hub: Hub, service: _Service, end: _End) -> None:
    if end is _End.PARK:
        hub.end_streams(farewell=_PARK_RETRY)
        service.stop_accepting()
        await service.over()  # requests under way are still decided and committed
        failpoints.hit("gateway.parked")
    elif end is _End.ORPHANED:
        # Whoever starts the next supervisor must be able to bind at once.
        service.stop_accepting()
        service.close_listener()
        await engine.until_quiet(_ORPHAN_SECONDS)
        hub.end_streams()
        await service.over()
    else:
        await engine.flush()
        hub.end_streams()
        service.stop_accepting()
        with trio.move_on_after(_TELL_SECONDS):
            while engine.book.untold and engine.courier.up and not engine.store_error:
                await engine.round_over()  # each confirmation makes a round
        await service.over()
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
    try:
        supervisor = os.pidfd_open(int(argv[2]))
    except ProcessLookupError:
        return 0
    if os.getppid() != int(argv[2]):
        return 0  # it died while this process began
    # What was imported stays: looking through it for garbage would hold every stream up for 20 ms, again and again. Not
    # even once now, since others wait for a gateway that takes over.
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    code = 0
    try:
        trio.run(_main, control, supervisor)
    except* StoreError as errors:  # the disk was full, for example, for as long as an opening waits
        logger.error("the store cannot be opened: %s", errors.exceptions[0], exc_info=errors)
        code = os.EX_TEMPFAIL
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv))
