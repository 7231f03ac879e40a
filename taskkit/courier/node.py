"""This tree's row in the project's database: where Django processes poke it, until when it is believed to live."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from django.db.models.functions import Now

from taskkit.identifiers import NAME_FILE
from taskkit.models import OPEN, Node, Run, Takeover

#: Rows of trees that are long gone are removed after this, and notes for those that never came back.
_FORGOTTEN_AFTER: Final = timedelta(days=7)
_NOTES_AFTER: Final = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who this tree is.

    Attributes:
      name: host name and digest of the state directory, as they were at its first start.
      poke_address, url: as `taskkit.models.Node` has them.
    """

    name: str
    poke_address: str
    url: str = ""

    @classmethod
    def of(cls, poke: socket.socket, state_dir: str, url: str = "") -> NodeIdentity:
        """Return the identity of the tree with this bound poke socket and state directory."""
        return cls(_name(state_dir), _address(poke.getsockname(), state_dir), url)

    def renew(self, using: str, seconds: float) -> bool:
        """Have this node's lease in the database `using` end in `seconds`; return whether it held until now.

        Raises:
          DatabaseError: the database is away.
        """
        values = {
            "poke_address": self.poke_address,
            "url": self.url,
            "pid": os.getppid(),
            "seen_at": Now(),
            "expires_at": Now() + timedelta(seconds=seconds),
        }
        own = Node.objects.using(using).filter(name=self.name)
        if own.filter(expires_at__gt=Now()).update(**values):
            return True
        if not own.update(**values):
            self._forget_others(using)
            Node.objects.using(using).bulk_create([Node(name=self.name, **values)])
        return False

    def _forget_others(self, using: str) -> None:
        """Remove rows of those who are long gone, but for those whose runs wait for them."""
        waiting = Run.objects.using(using).filter(status__in=OPEN).exclude(node="").values("node")
        gone = (
            Node.objects.using(using).filter(seen_at__lt=Now() - _FORGOTTEN_AFTER).exclude(name__in=waiting)
        )
        gone._raw_delete(using)
        Takeover.objects.using(using).filter(at__lt=Now() - _NOTES_AFTER)._raw_delete(using)


def _name(state_dir: str) -> str:
    # Kept: a container may have another host name at each start, and what the store in its volume has would be another
    # node's.
    path = Path(state_dir, NAME_FILE)
    with contextlib.suppress(OSError, ValueError):
        if kept := path.read_text(encoding="utf-8").strip()[:255]:
            return kept
    digest = hashlib.sha256(os.path.realpath(state_dir).encode()).hexdigest()[:12]
    name = f"{socket.gethostname()[:200]}-{digest}"
    with contextlib.suppress(OSError):  # without it the name is the same as long as the host's is
        fresh = path.with_suffix(".new")
        fresh.write_text(name + "\n", encoding="utf-8")
        fresh.replace(path)
    return name


def _address(bound: str | bytes, state_dir: str) -> str:
    if isinstance(bound, bytes):
        return "@" + bound.removeprefix(b"\0").decode()
    if bound.startswith(
        "/proc/self/fd/"
    ):  # a short spelling that means something in the binding process only
        return str(Path(state_dir, Path(bound).name))
    return os.path.abspath(bound) if bound else ""
