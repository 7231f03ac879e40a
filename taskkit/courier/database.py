"""What the courier has to do in one database, at a pace that the database bears."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, TypeVar

from django.db import Error, connections, router

from taskkit import failpoints
from taskkit.courier import outbox_reader, projection, schedule_orders, takeover, unspoken, whereabouts
from taskkit.courier.lease import Lease
from taskkit.courier.node import NodeIdentity
from taskkit.courier.reach import Place, hang_limit
from taskkit.courier.recall import Comparison
from taskkit.courier.schedules import Schedules
from taskkit.models import TOGETHER, Schedule, Slot
from taskkit.wire.messages import (
    Disown,
    Disowned,
    Forgotten,
    Located,
    Recall,
    ScheduleAnswer,
    ScheduleOrder,
    Submit,
    Submitted,
    Told,
    Transition,
)

_T = TypeVar("_T")
_log = logging.getLogger("bulkhead.courier")

#: Seconds between two tries of a database that does not answer: doubled each time.
BACKOFF: Final = (0.1, 5.0)

#: Submissions that may be unanswered. Enough to fill one round of the gateway, few enough to repeat.
WINDOW: Final = 64

#: Transitions in one transaction, at most: after a failure half as many, as a database may be just slow.
BATCH: Final = 100

#: Seconds between two looks into the outbox without a poke.
POLL: Final = 1.0

#: Seconds between two looks with pokes: anybody on this machine may poke, as often as he likes.
POKED: Final = 0.01

#: Seconds between two looks whether the tables are there, and at a connection's age against CONN_MAX_AGE.
RENEWAL: Final = 30.0

#: Seconds between two looks for tables that were missing: a second database that is not ours, or not migrated
#: yet.
MISSING_TABLES: Final = 5.0

#: Seconds after which an unanswered submission is sent again; the gateway answers it as it did the first
#: time.
ANSWER_DEADLINE: Final = 30.0

#: Seconds to hold submissions back after the gateway put some off: doubled each time, until it takes one.
PUT_OFF: Final = (1.0, 30.0)


class Away(Exception):
    """The database does not answer; it is tried again by itself."""


class Database:
    """One database of the project. Every method that may fail raises Away and leaves the work as it was.

    Args:
      lease: seconds, LIMITS.lease_seconds.
      clock: monotonic seconds.

    Attributes:
      held: newest transition of each run that is to be written, with its size in bytes.
    """

    def __init__(
        self,
        alias: str,
        node: NodeIdentity,
        clock: Callable[[], float] = time.monotonic,
        *,
        lease: float = 15.0,
    ) -> None:
        self.alias = alias
        self._clock = clock
        self._place = Place(alias)
        self.held: dict[str, tuple[Transition, int]] = {}
        self._node = node
        self._ours = all(router.allow_migrate_model(alias, model) for model in TOGETHER)
        self._has_tables = False
        self.registered = False
        self._answers: dict[str, Submitted] = {}
        self._unanswered: dict[str, float] = {}  # id → when to send it again
        self._data_version: int | None = None
        self._backoff = 0.0
        self._put_off = 0.0
        self._batch = BATCH
        self._retry_at = self._renew_at = self._poll_at = self._submit_at = 0.0
        self._polled_at = -math.inf
        self._lease = Lease(alias, node, lease, clock)
        self._notes = takeover.Notes(alias, node.name)
        self._comparison = Comparison(alias, node.name)
        self._schedules = Schedules(alias, clock)

    # --- what comes in --------------------------------------------------------------------------------------

    def hold(self, transition: Transition, size: int) -> None:
        """Take a transition to write; an older one of the same run is void, and one of a copy that was forgotten."""
        older = self.held.get(transition.run)
        if older is None or older[0].fence != transition.fence or older[0].version < transition.version:
            self.held[transition.run] = transition, size

    def take_answer(self, answer: Submitted) -> bool:
        """Take the answer if its submission came from here."""
        if self._unanswered.pop(answer.id, None) is None:
            return False
        self._answers[answer.id] = answer
        return True

    def take_forgotten(self, answer: Forgotten) -> bool:
        """Take the answer if the run was asked about from here."""
        return self._comparison.take(answer.run)

    def take_disowned(self, answer: Disowned) -> bool:
        """Take the answer if the gateway was told of it from here."""
        return self._notes.take(answer.run, answer.fence)

    @property
    def shared(self) -> bool:
        """Whether other nodes live that use this database."""
        return self._lease.shared

    def look_soon(self) -> None:
        """Look into the outbox soon: somebody poked."""
        self._poll_at = min(self._poll_at, self._polled_at + POKED)

    def send_anew(self) -> None:
        """Send again what is unanswered: the gateway that was asked is gone."""
        self._unanswered.clear()
        self._submit_at = self._poll_at = self._put_off = 0.0
        self._data_version = None
        self._comparison.begin(self._clock())
        self._notes.send_anew()
        self._lease.next = min(self._lease.next, self._clock())

    # --- what is to be done ---------------------------------------------------------------------------------

    def next_turn(self, now: float, linked: bool) -> float:
        """Return when there is something to do."""
        if not self._ours:
            return math.inf
        if now < self._retry_at:
            return self._retry_at
        if not self._has_tables:
            return self._renew_at
        if self.held or self._answers or self._comparison.has_news or self._notes.has_news:
            return now
        due = min(self._renew_at, self._schedules.next, self._lease.next)
        if not linked:
            return due
        return min(due, max(self._poll_at, self._submit_at), self._comparison.next)

    def work(self, now: float, linked: bool) -> Iterator[Told | Submit | Recall | Disown]:
        """Do what is due; yield what the gateway is to be told, each once it is true.

        Args:
          linked: whether there is a gateway to submit to.

        Raises:
          Away: the database does not answer. What was yielded stands.
        """
        if now < self._retry_at or not self._ours:
            return
        if now >= self._renew_at:
            self.attempt(self._renew, now)
            self._renew_at = now + (RENEWAL if self._has_tables else MISSING_TABLES)
        if self._has_tables:
            yield from self._keep_lease(now, linked)
            self.attempt(lambda: self._settle(now), now)
            yield from self.attempt(self._write, now)
            if self._comparison.has_news:
                self.attempt(self._comparison.settle, now)
            if now >= self._schedules.next and self.attempt(self._schedules.turn, now):
                self._look_again()
            if linked and now >= self._comparison.next:
                yield from self.attempt(lambda: self._comparison.ask(now, shared=self._lease.shared), now)
            if linked and now >= max(self._poll_at, self._submit_at):
                yield from self.attempt(lambda: self._poll(now), now)

    def locate(self, run: str, now: float) -> Located | None:
        """Return who has a run, None where this database does not know.

        Raises:
          Away: the database does not answer.
        """
        if not (self._ours and self._has_tables):
            return None
        return self.attempt(lambda: whereabouts.find(self.alias, run, self._node.name), now)

    def _keep_lease(self, now: float, linked: bool) -> Iterator[Disown]:
        """Renew the lease before anything is done by it, and hear what was taken over meanwhile."""
        if self._notes.has_news:
            self.attempt(self._notes.settle, now)
            if linked and self._notes.more:
                yield from self.attempt(self._notes.read, now)
        if now < self._lease.next:
            return
        if self.attempt(self._lease.renew, now):
            self._look_again()
        self.registered = True
        if linked:
            yield from self.attempt(self._notes.read, now)

    def obey(self, order: ScheduleOrder, now: float) -> ScheduleAnswer:
        """Do what the gateway wants done with schedules.

        Raises:
          Away: the database does not answer; whether it was done shows when it is back.
        """
        answer = self.attempt(lambda: schedule_orders.obey(order, self.alias), now)
        self._schedules.look_soon()
        return answer

    def attempt(self, work: Callable[[], _T], now: float) -> _T:
        """Return what `work` returns.

        Raises:
          Away: the database did not answer now, or a moment ago.
        """
        if now < self._retry_at:
            raise Away(f"the database {self.alias!r} does not answer")
        try:
            with hang_limit(self.alias):
                self._place.check()
                result = work()
        except (
            Exception
        ) as error:  # also what drivers raise past Django; the loop goes on with the other databases
            self._fail(error, now)
            raise Away(f"the database {self.alias!r} does not answer: {error}") from error
        if self._backoff:
            _log.warning("the database %r answers again", self.alias)
            self._backoff = 0.0
        return result

    def _fail(self, error: Exception, now: float) -> None:
        if not self._backoff:
            known = isinstance(error, Error)
            _log.warning("the database %r does not answer: %s", self.alias, error, exc_info=not known)
        self._backoff = min(max(2 * self._backoff, BACKOFF[0]), BACKOFF[1])
        # From the end of a try that hung, so that the other databases have their turn before the next one.
        self._retry_at = self._clock() + self._backoff
        # Tables and node once more: it may come back as another database.
        self._renew_at = self._lease.next = 0.0
        self._disconnect()

    def _disconnect(self) -> None:
        self._data_version = None  # the next connection counts anew
        self._schedules.look_soon()
        try:
            connections[self.alias].close()
        except (
            Exception
        ) as error:  # the driver chokes on a dead socket; Django has dropped the connection by then
            _log.info("the connection to %r could not be closed properly: %s", self.alias, error)

    def _renew(self) -> None:
        connection = connections[self.alias]
        connection.close_if_unusable_or_obsolete()
        self._data_version = None
        self._schedules.look_soon()
        tables = set(connection.introspection.table_names())
        models = (*TOGETHER, *((Schedule, Slot) if self._schedules.is_ours else ()))
        self._has_tables = all(model._meta.db_table in tables for model in models)
        if self.held and not self._has_tables:
            _log.warning(
                "the database %r lacks taskkit's tables: manage.py migrate --database %s", *2 * (self.alias,)
            )

    def _settle(self, now: float) -> None:
        if not self._answers:
            return
        later = [answer for answer in self._answers.values() if answer.code in outbox_reader.LATER]
        final = [answer for answer in self._answers.values() if answer.code not in outbox_reader.LATER]
        if final:
            failpoints.hit("courier.answered")
            projection.settle(self.alias, final)
            failpoints.hit("courier.settled")
        for answer in later:
            outbox_reader.postpone(self.alias, answer, release=self._lease.shared)
        self._answers.clear()
        self._pace(now, accepted=bool(final), put_off=bool(later))

    def _pace(self, now: float, *, accepted: bool, put_off: bool) -> None:
        if accepted:
            self._put_off = 0.0
        if put_off:
            self._put_off = min(max(2 * self._put_off, PUT_OFF[0]), PUT_OFF[1])
            self._submit_at = now + self._put_off
        self._look_again()

    def _look_again(self) -> None:
        """Look at the next turn, although nobody else changed the database: the window has room."""
        self._poll_at = 0.0
        self._data_version = None

    def _write(self) -> list[Told]:
        batch = [transition for transition, _ in islice(self.held.values(), self._batch)]
        if batch:
            size, self._batch = self._batch, max(1, self._batch // 2)
            failpoints.hit("courier.projecting")
            projection.write(self.alias, batch, self._node.name)
            failpoints.hit("courier.projected")
            if any(map(unspoken.is_unspoken, batch)):
                self._look_again()  # SQLite's data_version does not count what this connection has submitted
            self._batch = min(2 * size, BATCH)
        for transition in batch:
            del self.held[transition.run]
        return [Told(run=transition.run, version=transition.version) for transition in batch]

    def _poll(self, now: float) -> list[Submit]:
        for id_ in [id_ for id_, deadline in self._unanswered.items() if deadline <= now]:
            del self._unanswered[id_]
            self._data_version = None
        self._polled_at, self._poll_at = now, now + POLL
        # Read before the rows: what is committed in between is seen next time, not never.
        version = outbox_reader.data_version(self.alias)
        if version is not None and version == self._data_version:
            return []
        claimant = outbox_reader.Claimant(self._node.name, self._lease.claims)
        submissions, refusals = outbox_reader.read(
            self.alias, self._unanswered, WINDOW - len(self._unanswered), claimant
        )
        if refusals:
            projection.settle(self.alias, refusals)
        if submissions:
            failpoints.hit("courier.read")
        self._data_version = version
        self._unanswered.update((submission.id, now + ANSWER_DEADLINE) for submission in submissions)
        return submissions
