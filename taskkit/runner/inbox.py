"""What one attempt is told, sorted by name."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from taskkit.inbox import Inbox
from taskkit.wire.messages import Input


class Mail:
    """The inboxes of an attempt; one that nobody has asked for yet keeps what comes.

    Args:
      look: as `Inbox` has it.

    Attributes:
      cancelled: the attempt was asked to stop.
      beside: what is told comes from other processes, which see what is committed.
    """

    beside = True

    def __init__(self, look: Callable[[], None] = lambda: None, *, cancelled: bool = False) -> None:
        self._look = look
        self.cancelled = cancelled
        self._heard = 0
        self._inboxes: dict[str, Inbox] = {}

    def deliver(self, input: Input) -> None:
        """Put an input into its inbox; a gateway that took over repeats what this attempt may have."""
        if input.number > self._heard:
            self._heard = input.number
            self.inbox(input.name).put(msgspec.json.decode(input.data))

    def inbox(self, name: str) -> Inbox:
        """Return the inbox of this name."""
        return self._inboxes.setdefault(name, Inbox(self._look))
