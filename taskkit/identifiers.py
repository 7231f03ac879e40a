"""Names that leave the process: run ids, task names, event names, cursors.

Pure: no I/O but the random numbers and the clock of `new_run_id`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import uuid

#: Longest cursor accepted. Fetch makes a preflight for a Last-Event-ID above 128 bytes (WHATWG Fetch,
#: CORS-unsafe request-header), which native EventSource users would notice as failing reconnects.
MAX_CURSOR = 128

#: Longest event name, bytes of UTF-8. It is repeated in every event of a stream.
MAX_EVENT_NAME = 200

#: File in a state directory with the name of its node, which the courier gives to it.
NAME_FILE = "node"

_TASK_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_FORBIDDEN_IN_EVENT_NAME = re.compile(r"[\r\n\0]")
_RESERVED_PREFIXES = ("run.", "stream.")

#: The browser's EventSource dispatches its own `open`; an SSE event of that name fires the same listeners.
_RESERVED_NAMES = frozenset({"open"})

#: Names that were found sound, and how many of them are kept: a task uses few, and each of them often.
_sound_names: set[str] = set()
_MAX_SOUND_NAMES = 256


def new_run_id() -> str:
    """Return a fresh UUIDv7 in its text form: 48 bits of Unix milliseconds, then random bits.

    Ids of one process sort by time to the millisecond. Source: RFC 9562 §5.7.
    """
    return _uuid7(time.time_ns() // 1_000_000, secrets.randbits(80))


def child_run_id(parent: str, key: str) -> str:
    """Return the id of the child of `parent` that is known by `key`: whoever asks, whenever, it is the same."""
    digest = hashlib.sha256(f"{parent}\n{key}".encode()).digest()
    return _uuid7(uuid.UUID(parent).int >> 80, int.from_bytes(digest[:10]))


def _uuid7(milliseconds: int, bits: int) -> str:
    value = (milliseconds << 80) | bits
    value = (value & ~(0xF << 76)) | (0x7 << 76)  # version 7
    value = (value & ~(0x3 << 62)) | (0x2 << 62)  # variant of RFC 9562
    return str(uuid.UUID(int=value))


def run_id_time(id: str) -> float:
    """Return the Unix time in a UUIDv7, to the millisecond."""
    return (uuid.UUID(id).int >> 80) / 1000


def parse_run_id(text: str) -> str | None:
    """Return the canonical form of a run id, or None when `text` is not a UUID."""
    return text.lower() if _UUID.fullmatch(text) else None


def new_token() -> str:
    """Return the random fence of one attempt: 96 bits, 16 characters of URL-safe base64."""
    return secrets.token_urlsafe(12)


def is_task_name(name: str) -> bool:
    """Whether `name` has the form `<app label>.<function or model>` or a longer dotted path."""
    return _TASK_NAME.fullmatch(name) is not None


def check_event_name(name: str) -> str:
    """Return `name` if a task may send events of that name.

    Raises:
      ValueError: it is empty, too long, has CR, LF or NUL (they would end the SSE field and let a task forge
        events: WHATWG HTML §9.2.6), or is reserved for lifecycle events. The task's fault.
    """
    if type(name) is str and name in _sound_names:
        return name
    if not isinstance(name, str) or not name:
        raise ValueError(f"an event's name must be a non-empty string, not {name!r}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"an event's name must be Unicode text: {name!r}") from None
    if size > MAX_EVENT_NAME:
        raise ValueError(f"an event's name may have {MAX_EVENT_NAME} bytes at most: {name[:40]!r}…")
    if _FORBIDDEN_IN_EVENT_NAME.search(name):
        raise ValueError(f"an event's name must not contain CR, LF or NUL: {name!r}")
    if name.startswith(_RESERVED_PREFIXES) or name in _RESERVED_NAMES:
        raise ValueError(f"the event name {name!r} is reserved; choose another")
    if type(name) is str and len(_sound_names) < _MAX_SOUND_NAMES:
        _sound_names.add(name)
    return name
