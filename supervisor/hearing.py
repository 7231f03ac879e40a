"""The next word of a child, or the certainty that none will come."""

from __future__ import annotations

import logging
import os
from typing import Final, TypeVar

import trio

from supervisor.child import Child
from taskkit.channel import Channel
from taskkit.errors import RemoteWireError

logger = logging.getLogger("bulkhead.supervisor")

_M = TypeVar("_M")

#: Seconds for a child that has hung up to leave by itself: Python's own clearing up takes a tenth, on a busy machine
#: ten times as long, and whoever is killed in it has no exit code to tell.
_LEAVE_SECONDS: Final = 2.0


async def hear(channel: Channel[_M], child: Child, limit: float) -> _M | None:
    """Return the child's next message, or None when it has died, hangs or breaks the protocol: it has to be ended.

    No message carries descriptors in this direction; what comes along is closed.

    Args:
      limit: seconds of silence that are too long.
    """
    try:
        with trio.fail_after(limit):
            message, fds = await channel.receive()
    except trio.EndOfChannel:
        # It has hung up, so it is about to leave: let it, or its exit code and traceback would be lost.
        with trio.move_on_after(_LEAVE_SECONDS):
            await child.wait()
        return None
    except RemoteWireError as error:
        logger.error("the %s broke the protocol: %s; it is replaced", child.name, error)
        return None
    except trio.TooSlowError:
        logger.error("the %s has not said anything for %.0f s; it is replaced", child.name, limit)
        return None
    for fd in fds:
        os.close(fd)
    return message
