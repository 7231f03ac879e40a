"""What became of a request that ran as a task, in the words of bazis-async-request. Pure.

Both the gateway and the Django site answer in them. The keys leave the process: they are for ever.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final

from taskkit.claims import OWN, Claims
from taskkit.lifecycle import RunStatus

#: A run's state in the seed's words. It cannot cancel: for its clients, what was cancelled has failed.
WORDS: Final[Mapping[RunStatus, str]] = {
    RunStatus.READY: "pending",
    RunStatus.RUNNING: "processing",
    RunStatus.SUCCESSFUL: "completed",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "failed",
}

#: Of a run that has not ended.
NOT_READY: Final[Mapping[str, Any]] = {"status": "not ready"}

#: What a request's result has besides.
_OPTIONAL: Final = ("encoding", "truncated")


#: A channel of a client without credentials; whoever knows its name has what is on it (bazis-ws: 16 to 128 characters).
_CHANNEL: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")

#: Before such a channel's name in a run's `subject`, so that none can be that of a user.
ANONYMOUS: Final = "anon:"

#: Seconds that a connection of such a client may last; it has no credential that would expire.
_SESSION: Final = 86_400.0


def is_channel(text: str) -> bool:
    """Whether a client without credentials may call its channel so. No token of ours looks like that: it has dots."""
    return _CHANNEL.fullmatch(text) is not None


def channel_claims(channel: str) -> Claims:
    """Return what whoever knows the name of a channel may do: follow what was submitted on it."""
    return Claims(
        subject=ANONYMOUS + channel,
        expires_at=time.time() + _SESSION,
        id="",
        actions=frozenset({"read"}),
        runs=OWN,
        tasks=(),
    )


def outcome(id: str, status: RunStatus, result: Any, error: Any, endpoint: str = "") -> Mapping[str, Any]:
    """Return `{task_id, status, endpoint, headers, response}`: `status` is the view's own, 500 if the run failed.

    A run of another task that succeeded has status 200, and what it returned as its response.
    """
    if not status.is_terminal:
        return NOT_READY
    if status is not RunStatus.SUCCESSFUL:
        said = error.get("message") if isinstance(error, Mapping) else None
        answer = {
            "status": 500,
            "endpoint": endpoint,
            "headers": [],
            "response": {"error": said or WORDS[status]},
        }
    elif isinstance(result, Mapping) and "endpoint" in result and "response" in result:
        answer = {name: result.get(name) for name in ("status", "endpoint", "headers", "response")}
        answer |= {name: result[name] for name in _OPTIONAL if name in result}
    else:
        answer = {"status": 200, "endpoint": endpoint, "headers": [], "response": result}
    return {"task_id": id, **answer}


def full(status: RunStatus, channel: str, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the answer to `?full_response=true`: `{status, channel_name, response}`; `status` is the run's."""
    response = found if status.is_terminal else None
    return {"status": WORDS[status], "channel_name": channel, "response": response}
