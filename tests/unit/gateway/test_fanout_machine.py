"""The hub against a list of events: whoever looks sees what was published, or is sent to the store."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from gateway import fanout
from gateway.fanout import Hub, Subscription
from gateway.store.rows import EventRow, OutputRow

#: Small bounds, so that rings overflow in a few steps.
EVENTS, BYTES = 6, 2_000


class Streams(RuleBasedStateMachine):
    """One run, its publisher and its subscribers.

    Attributes:
      events: everything that was published, by offset from `first` on.
      joined: by subscription the newest offset when it came, None when the run had ended and nobody was left who
        had followed it: the hub does not know it then, and what it said is in the store.
    """

    subscriptions: Bundle[Subscription] = Bundle("subscriptions")

    def __init__(self) -> None:
        super().__init__()
        self.patches = [
            patch.object(fanout, "RING_EVENTS", EVENTS),
            patch.object(fanout, "RING_BYTES", BYTES),
        ]
        for one in self.patches:
            one.start()
        self.hub = Hub()
        self.events: list[EventRow] = []
        self.joined: dict[Subscription, int | None] = {}
        self.open = True
        self.lines = 0

    def teardown(self) -> None:
        for one in self.patches:
            one.stop()

    @initialize(first=st.integers(0, 50))
    def accept(self, first: int) -> None:
        self.first = self.tail = first
        self.hub.opened(1, first)

    def row(self, offset: int, size: int) -> EventRow:
        return EventRow(offset, 1, offset, 1, "x", b"%d" % offset * size, 0.0)

    @rule(sizes=st.lists(st.integers(1, 600), max_size=8), again=st.integers(0, 3))
    def publish(self, sizes: list[int], again: int) -> None:
        """Publish; the first few have been published before, as after an answer that was lost."""
        if not self.open:
            return
        new = [self.row(self.tail + 1 + index, size) for index, size in enumerate(sizes)]
        self.hub.publish(1, self.events[len(self.events) - min(again, len(self.events)) :] + new)
        self.events += new
        self.tail += len(new)

    @rule(count=st.integers(1, 3))
    def publish_output(self, count: int) -> None:
        if not self.open:
            return
        rows = [OutputRow(1, self.lines + n, 0, 1, "stdout", "x", 0.0) for n in range(1, count + 1)]
        self.hub.publish_output(1, rows)
        self.lines += count

    @rule()
    def end(self) -> None:
        if self.open:
            self.hub.ended(1)
            self.open = False

    @rule(target=subscriptions)
    def attach(self) -> Subscription:
        joined = self.hub.attach(1)
        known = self.open or any(tail is not None for tail in self.joined.values())
        self.joined[joined] = self.tail if known else None
        return joined

    @rule(subscription=consumes(subscriptions))
    def leave(self, subscription: Subscription) -> None:
        subscription.__exit__(None, None, None)
        del self.joined[subscription]

    @rule(subscription=subscriptions, back=st.integers(0, 20), limit=st.integers(1, 3_000))
    def look(self, subscription: Subscription, back: int, limit: int) -> None:
        after = max(self.first, self.tail - back)
        found = subscription.batch(after, limit)
        if found is None:
            return  # the store has it
        rows = [entry.row for entry in found]
        wanted = self.events[after - self.first :]
        assert rows == wanted[: len(rows)], "what was published, in order, without a hole"
        assert bool(rows) == bool(wanted), "nothing is hidden"
        assert len(rows) <= 1 or sum(len(row.data) for row in rows) <= limit
        if len(rows) < len(wanted):
            assert sum(len(row.data) for row in wanted[: len(rows) + 1]) > limit, "it is as much as fits"

    @rule(subscription=subscriptions)
    def what_was_just_published_is_in_the_ring(self, subscription: Subscription) -> None:
        """Who keeps up never needs the store, unless one event alone is larger than the ring."""
        joined = self.joined[subscription]
        if joined is not None and self.tail > joined and 2 * len(self.events[-1].data) + 64 <= BYTES:
            assert subscription.batch(self.tail - 1) is not None

    @invariant()
    def says_what_is(self) -> None:
        for subscription, joined in self.joined.items():
            known = joined is not None
            assert subscription.tail == (self.tail if self.open else None)
            assert subscription.ended == (known and not self.open)
            assert subscription.news(self.tail - 1) == known
            assert subscription.news(self.tail) == (known and not self.open)
            assert not subscription.closing

    @invariant()
    def is_bounded(self) -> None:
        now = self.hub.statistics()
        assert now["ring_events"] <= EVENTS
        assert now["ring_bytes"] <= BYTES
        assert now["subscribers"] == len(self.joined)
        assert now["runs"] <= 1
        if not self.joined:
            assert (now["ring_events"], now["runs"]) == (0, int(self.open))


TestStreams = Streams.TestCase
