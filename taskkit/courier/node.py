"""This tree's row in the project's database: where Django processes poke it."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from django.utils import timezone

from taskkit.models import Node

#: Rows of trees that are long gone (containers get a new host name each time) are removed after this.
_FORGOTTEN_AFTER: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who this tree is.

    Attributes:
      name: host name and digest of the state directory.
      poke_address: as `taskkit.models.Node` has it.
    """

    name: str
    poke_address: str

    @classmethod
    def of(cls, poke: socket.socket, state_dir: str) -> NodeIdentity:
        """Return the identity of the tree with this bound poke socket and state directory."""
        digest = hashlib.sha256(os.path.realpath(state_dir).encode()).hexdigest()[:12]
        return cls(f"{socket.gethostname()[:200]}-{digest}", _address(poke.getsockname(), state_dir))

    def register(self, using: str) -> None:
        """Write or renew the row in the database `using`.

        Raises:
          DatabaseError: the database is away.
        """
        now = timezone.now()
        values = {"poke_address": self.poke_address, "pid": os.getppid(), "seen_at": now}
        nodes = Node.objects.using(using)
        if not nodes.filter(name=self.name).update(**values):
            nodes.filter(seen_at__lt=now - _FORGOTTEN_AFTER)._raw_delete(using)
            nodes.bulk_create([Node(name=self.name, **values)])


def _address(bound: str | bytes, state_dir: str) -> str:
    if isinstance(bound, bytes):
        return "@" + bound.removeprefix(b"\0").decode()
    if bound.startswith(
        "/proc/self/fd/"
    ):  # a short spelling that means something in the binding process only
        return str(Path(state_dir, Path(bound).name))
    return os.path.abspath(bound) if bound else ""
