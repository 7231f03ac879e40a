"""The lease of this tree in a database that it may share: who lives, whose runs are free to be taken.

Rule 1: time is the database's. Whether a lease holds is decided there, by one clock for all trees; here monotonic
seconds only pace the renewals.

Rule 2: who judges others has to be sound itself. Runs of a node are taken over only by one that has kept its own lease
for as long as a lease: when the database comes back, or everything is started at once, nobody is late yet.

Rule 3: what a lease costs is for those who share. A tree that is alone on SQLite writes once in 30 s, claims nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from django.db import connections
from django.db.models import Q
from django.db.models.functions import Now

from taskkit.courier import takeover
from taskkit.courier.node import NodeIdentity
from taskkit.models import Node

#: How often a lease is renewed in its time: the courier may hang for 10 s over another database
#: (taskkit.courier.reach), which with a quarter of the default's 15 s still leaves a second.
RENEWALS: Final = 4

#: Seconds between two renewals of a tree that is alone on SQLite, whose file no other machine should write.
#: taskkit.outbox.NODE_FRESH allows two to be missed.
ALONE: Final = 30.0


class Lease:
    """What one tree knows of itself and the others in the database `using`.

    Args:
      seconds: LIMITS.lease_seconds.
      clock: monotonic seconds.

    Attributes:
      shared: other nodes live.
      next: when it is to be renewed.
    """

    def __init__(
        self, using: str, node: NodeIdentity, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._using = using
        self._node = node
        self._seconds = seconds
        self._clock = clock
        self._kept_since = math.inf
        self.shared = False
        self.next = -math.inf

    @property
    def claims(self) -> bool:
        """Whether what is taken from the outbox has to be claimed: on SQLite a tree is most often alone."""
        return self.shared or connections[self._using].vendor != "sqlite"

    def renew(self) -> bool:
        """Renew it; return whether runs of others were put back into the outbox.

        Raises:
          DatabaseError: the database is away.
        """
        relaxed = not self.claims
        seconds = max(self._seconds, 3 * ALONE) if relaxed else self._seconds
        kept = self._node.renew(self._using, seconds)
        now = self._clock()
        if not kept or self._kept_since > now:
            self._kept_since = now
        was_shared, dead = self.shared, self._look()
        self.next = now + (ALONE if relaxed and not self.shared else self._seconds / RENEWALS)
        if self.shared and not was_shared and relaxed:
            self.next = now  # at once as short as the others expect it
        if now - self._kept_since < self._seconds:
            return False
        return self._take_over(dead)

    def _look(self) -> list[str]:
        """Find out who lives; return who does not."""
        others = Node.objects.using(self._using).exclude(name=self._node.name)
        self.shared = others.filter(expires_at__gt=Now()).exists()
        return list(
            others.filter(Q(expires_at__isnull=True) | Q(expires_at__lte=Now())).values_list(
                "name", flat=True
            )
        )

    def _take_over(self, dead: list[str]) -> bool:
        taken = 0
        for name in takeover.owners(self._using, dead):
            count = takeover.put_back(self._using, name)
            taken += count
            if count == takeover.BATCH:  # there may be more; the beat comes first
                self.next = self._clock()
                break
        return taken > 0
