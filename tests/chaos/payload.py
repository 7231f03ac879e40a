"""What chaos tasks say: text that anybody can recompute from a number.

Pure; imported by the tasks that say it, by the checker that verifies it.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

#: Characters of an event at scale 1. One in eight is long, so that frames cross the pages of a pipe.
_SHORT: Final = 120
_LONG: Final = 3_000


def pad(salt: int, n: int, scale: int = 1) -> str:
    """Return the text of event `n` of the run with this salt: the same wherever it is asked, unlike any other.

    Args:
      scale: multiplies its length; 40 and more does not fit a frame and goes to a blob.
    """
    digest = hashlib.sha256(f"{salt}:{n}:{scale}".encode()).hexdigest()
    length = _LONG if int(digest[0], 16) < 2 else _SHORT
    if scale > 1:
        length = _LONG * scale
    return (digest * (length // len(digest) + 1))[:length]


def tick(salt: int, n: int, scale: int = 1) -> dict[str, Any]:
    """Return the data of event `n`."""
    return {"n": n, "salt": salt, "scale": scale, "pad": pad(salt, n, scale)}


def is_right(data: dict[str, Any], salt: int, scale: int = 1) -> bool:
    """Whether `data`, as a client saw it, is what the run with this salt said."""
    n = data.get("n")
    return (
        isinstance(n, int)
        and data.get("salt") == salt
        and data.get("scale") == scale
        and data.get("pad") == pad(salt, n, scale)
    )
