"""How often: `10/m` is ten in any minute. Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

#: Most starts in one time: the gateway remembers the moment of each.
MOST: Final = 10_000

#: Longest time, seconds: a day.
LONGEST: Final = 86_400.0

_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_TEXT: Final = re.compile(r"(\d{1,9})/(\d{1,9})?([smhd])", re.ASCII)


class Rate(NamedTuple):
    """At most `starts` in any `seconds`."""

    starts: int
    seconds: float


def parse_rate(text: str) -> Rate:
    """Return the rate that `10/s`, `100/m`, `1000/h`, `5/d` or `3/30s` means.

    Raises:
      ValueError: it means none, or one that is too much to remember; the message says what is possible.
    """
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError("write a number per time, such as 10/s, 100/m, 1000/h, 5/d or 3/30s")
    rate = Rate(int(found[1]), int(found[2] or 1) * _SECONDS[found[3]])
    if not (1 <= rate.starts <= MOST and 1 <= rate.seconds <= LONGEST):
        raise ValueError(f"it may be 1 to {MOST:,} starts in 1 second to 1 day")
    return rate
