"""Which events of a stream a subscriber wants, by their types.

Pure. A filtered stream keeps the ids of the whole one, so a cursor of either continues the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from taskkit.identifiers import MAX_EVENT_NAME

#: Types that one subscriber can name: a page of them, which no dashboard needs.
MAX_TYPES: Final = 100

#: What the gateway itself says on a stream; a client without it would not know where it stands.
_ALWAYS: Final = "stream."

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def wants(types: frozenset[str] | None, type: str) -> bool:
    """Whether an event of this type is wanted; None wants every type, and `stream.*` always is."""
    return types is None or type in types or type.startswith(_ALWAYS)


def split_types(texts: Iterable[str]) -> frozenset[str] | None:
    """Return the types in query parameters, each a comma list; None when there is no parameter.

    Raises:
      ValueError: as `check_types` does.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    return check_types(names) if names else None


def check_types(names: Iterable[str]) -> frozenset[str]:
    """Return names of event types as a set.

    Raises:
      ValueError: one is empty, too long or has a control character, or there are too many. The client's fault;
        the message is what it has to do.
    """
    types = frozenset(names)
    for name in types:
        if not name or len(name.encode("utf-8", "replace")) > MAX_EVENT_NAME or _CONTROL.search(name):
            raise ValueError(
                f"must be names of event types, separated by commas; {name[:40]!r} is none "
                f"(1 to {MAX_EVENT_NAME} bytes, no control characters)"
            )
    if len(types) > MAX_TYPES:
        raise ValueError(f"may name {MAX_TYPES} types at most, not {len(types)}")
    return types
