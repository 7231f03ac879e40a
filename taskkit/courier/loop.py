"""The courier's loop: one thread, three sockets, a database per alias.

It waits in poll(2) only. Sends never block, and a database that does not answer is left alone for a while, so
the other databases, the questions of the gateway and the beat go on. What blocks it is the database, within the
bounds of `taskkit.courier.reach`, at most once per try.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from django.db import connections, router

from taskkit import seqpacket
from taskkit.conf import get_settings
from taskkit.courier import rows
from taskkit.courier.database import Away, Database
from taskkit.courier.link import Link, LinkBroken
from taskkit.courier.node import NodeIdentity
from taskkit.courier.reach import limit_waiting
from taskkit.errors import RemoteWireError
from taskkit.models import Run
from taskkit.schedules import home
from taskkit.wire import messages
from taskkit.wire.messages import (
    Answer,
    Ask,
    Beat,
    Company,
    CourierReady,
    Disowned,
    Forgotten,
    Locate,
    Located,
    Message,
    ScheduleAnswer,
    ScheduleOrder,
    Stop,
    Transition,
)

_log = logging.getLogger("bulkhead.courier")

#: Seconds between two beats.
BEAT: Final = 1.0

#: Messages read in one turn.
ROUND: Final = 100

#: Transitions, and bytes of them, held in memory for databases that do not answer. Beyond, nothing more is
#: read from the gateway, whose own queue then fills; it never stops reading, so that is no deadlock.
HELD_RUNS: Final = 1000
HELD_BYTES: Final = 32 * 1024 * 1024

_Handler = Callable[[int], None]


def main(control: socket.socket, poke: socket.socket, state_dir: str) -> None:
    """Carry between Django's databases and the gateway until told to stop, or until the supervisor is gone.

    Args:
      control: SEQPACKET socket to the supervisor.
      poke: bound datagram socket that Django processes poke.
      state_dir: directory of this tree; names its node.

    Raises:
      RemoteWireError: the supervisor broke the protocol.
    """
    for alias in connections:
        limit_waiting(alias)
    courier = Courier(control, poke, state_dir)
    try:
        courier.run()
    finally:
        courier.close()


class Courier:
    """The state of the loop.

    Args:
      clock: monotonic seconds.
    """

    def __init__(
        self,
        control: socket.socket,
        poke: socket.socket,
        state_dir: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        poke.setblocking(False)
        self._control = Link(control, messages.CourierOrder)
        self._poke = poke
        self._clock = clock
        self._gateway: Link | None = None
        settings = get_settings()
        self._node = NodeIdentity.of(poke, state_dir, settings.node_url or "")
        self._shared: bool | None = None  # as the gateway was told
        self._databases = {
            alias: Database(alias, self._node, clock, lease=settings.limits.lease_seconds)
            for alias in connections
            if connections[alias].vendor != "unknown"  # Django's dummy engine of a project without databases
        }
        self._beat_at = math.inf  # its first word is that it is ready
        self._stopping = False

    def run(self) -> None:
        """Turn until `Stop` comes or the supervisor is gone.

        Raises:
          RemoteWireError: the supervisor broke the protocol.
        """
        try:
            self._work()
            known = any(database.registered for database in self._databases.values())
            self._control.send(CourierReady(node=self._node.name if known else ""))
            self._beat_at = 0.0
            while not self._stopping:
                self._turn()
        except LinkBroken as error:
            _log.info("the supervisor is gone: %s", error)

    def close(self) -> None:
        """Close links and database connections."""
        self._drop_gateway()
        self._control.close()
        connections.close_all()

    # --- one turn -------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._wait()
        if self._stopping:
            return
        self._work()

    def _beat(self) -> None:
        if self._clock() >= self._beat_at:
            self._beat_at = self._clock() + BEAT
            if not self._control.wants_write:  # the supervisor has beats enough that it has not read
                self._control.send(Beat())

    def _wait(self) -> None:
        poller = select.poll()
        handlers: dict[int, _Handler] = {}
        for fd, mask, handler in self._interests():
            poller.register(fd, mask)
            handlers[fd] = handler
        for fd, mask in poller.poll(1000 * self._pause()):
            if not self._stopping:
                handlers[fd](mask)

    def _interests(self) -> Iterator[tuple[int, int, _Handler]]:
        """Yield what to wait for: the supervisor first, so that an old link is dropped before it is read."""
        yield self._control.sock.fileno(), _mask(self._control, reads=True), self._control_ready
        yield self._poke.fileno(), select.POLLIN, self._poked
        if self._gateway is not None:
            mask = _mask(self._gateway, reads=not (self._gateway.is_congested or self._is_full()))
            if mask:  # without interest, poll would still report a hang-up, at every turn
                yield self._gateway.sock.fileno(), mask, self._gateway_ready

    def _is_full(self) -> bool:
        held = [size for database in self._databases.values() for _, size in database.held.values()]
        return len(held) >= HELD_RUNS or sum(held) >= HELD_BYTES

    def _pause(self) -> float:
        """Return seconds until something is due without anybody saying so."""
        now = self._clock()
        linked = self._gateway is not None
        turns = [database.next_turn(now, linked) for database in self._databases.values()]
        return max(0.0, min([self._beat_at, *turns]) - now)

    # --- what comes in --------------------------------------------------------------------------------------

    def _control_ready(self, mask: int) -> None:
        self._control.flush()
        if not mask & ~select.POLLOUT:
            return
        for message, fds, _ in self._control.receive(ROUND):
            if isinstance(message, messages.Link):
                self._link(fds)
                continue
            seqpacket.close_all(fds)
            if isinstance(message, Stop):
                self._stopping = True
                return
            self._drop_gateway()

    def _link(self, fds: list[int]) -> None:
        if len(fds) != 1:
            count = len(fds)
            seqpacket.close_all(fds)
            raise RemoteWireError(f"Link came with {count} descriptors")
        self._drop_gateway()
        self._gateway = Link(socket.socket(fileno=fds[0]), messages.GatewayToCourier)
        self._shared = None
        for database in self._databases.values():
            database.send_anew()

    def _drop_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None

    def _poked(self, mask: int) -> None:
        for _ in range(ROUND):
            try:
                self._poke.recv(16)
            except OSError:  # EAGAIN: all read; anything else: polling finds the rows a second later
                break
        for database in self._databases.values():
            database.look_soon()

    def _gateway_ready(self, mask: int) -> None:
        link = self._gateway
        if link is None:  # dropped by an order in the same turn
            return
        try:
            link.flush()
            if mask & ~select.POLLOUT:
                for message, fds, size in link.receive(ROUND):
                    seqpacket.close_all(fds)
                    self._take(message, size)
        except (LinkBroken, RemoteWireError) as error:
            self._lose_gateway(error)

    def _lose_gateway(self, error: Exception) -> None:
        level = logging.ERROR if isinstance(error, RemoteWireError) else logging.INFO
        _log.log(level, "the link to the gateway is dropped, until the next one comes: %s", error)
        self._drop_gateway()

    def _take(self, message: messages.GatewayToCourier, size: int) -> None:
        if isinstance(message, Transition):
            self._database_of(message).hold(message, size)
        elif isinstance(message, Ask):
            self._tell(self._answer(message))
        elif isinstance(message, ScheduleOrder):
            self._tell(self._obey(message))
        elif isinstance(message, Locate):
            self._tell(self._locate(message))
        elif isinstance(message, Disowned):
            any(database.take_disowned(message) for database in self._databases.values())
        elif isinstance(message, Forgotten):
            any(database.take_forgotten(message) for database in self._databases.values())
        else:
            any(database.take_answer(message) for database in self._databases.values())

    def _database_of(self, transition: Transition) -> Database:
        """Return where the projection belongs: beside its submission, unless our tables moved since."""
        alias = transition.using
        if alias not in self._databases or not router.allow_migrate_model(alias, Run):
            alias = router.db_for_write(Run)
        return self._databases[alias]

    def _answer(self, ask: Ask) -> Answer:
        try:
            located = rows.locate(ask)
            if isinstance(located, Answer):
                return located
            return self._databases[located.using].attempt(located.read, self._clock())
        except Away as error:
            return Answer(ask=ask.ask, status="away", detail=str(error))
        except Exception as error:  # a project's router raised; the question gets an answer, the loop goes on
            _log.exception("the question about %s/%s/%s cannot be answered", ask.app, ask.model, ask.pk)
            return Answer(ask=ask.ask, status="away", detail=str(error))

    def _locate(self, question: Locate) -> Located:
        away = ""
        for database in self._databases.values():
            try:
                found = database.locate(question.run, self._clock())
            except Away as error:
                away = str(error)
                continue
            if found is not None:
                return msgspec.structs.replace(found, ask=question.ask)
        return Located(ask=question.ask, status="away" if away else "unknown", detail=away)

    def _obey(self, order: ScheduleOrder) -> ScheduleAnswer:
        try:
            database = self._databases.get(home())
            if database is None:
                return ScheduleAnswer(ask=order.ask, status="away", detail="the project has no database")
            return database.obey(order, self._clock())
        except Away as error:
            return ScheduleAnswer(ask=order.ask, status="away", detail=str(error))
        except Exception as error:  # as in `_answer`
            _log.exception("the order to %s schedules cannot be obeyed", order.order)
            return ScheduleAnswer(ask=order.ask, status="away", detail=str(error))

    # --- what goes out --------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._beat()
        for database in self._databases.values():
            try:
                for message in database.work(self._clock(), self._gateway is not None):
                    self._tell(message)
            except Away:
                self._beat()  # it may have taken its time; it has said so in the log, and its work waits
        shared = any(database.shared for database in self._databases.values())
        if self._gateway is not None and shared is not self._shared and (shared or self._shared):
            self._shared = shared
            self._tell(Company(shared=shared))

    def _tell(self, message: Message) -> None:
        """Send to the gateway; without one, its successor asks or is asked again."""
        if self._gateway is None:
            return
        try:
            self._gateway.send(message)
        except LinkBroken as error:
            self._lose_gateway(error)


def _mask(link: Link, *, reads: bool) -> int:
    return (select.POLLIN if reads else 0) | (select.POLLOUT if link.wants_write else 0)
