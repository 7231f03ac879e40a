"""Decides whether the wall clock may be believed when it says that something is old. Pure.

Ages are of the wall clock: a run that ended a month ago did so whether the machine was on or off. But a wall clock
can be wrong, and one that jumps a year ahead makes everything old at once. So the clock that only counts, and never
jumps (CLOCK_BOOTTIME), is asked whether as much time has passed. If not, nothing is removed for its age until the
clock has gone back, or a day has passed: then somebody has seen it, or it was wrong before and is right now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

#: Seconds that the two clocks may differ between two looks. NTP slews by 0.5 ms per second at most, which makes 43 s
#: a day; larger corrections of seconds happen at start and do no harm to ages of days.
TOLERANCE: Final = 300.0

#: Seconds for which ages are not acted on after a jump.
HOLD: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A moment at which the wall clock was believed, by both clocks; `boot` says which count the second one is of."""

    wall: float
    counted: float
    boot: str


class AgeClock:
    """Watches the wall clock from look to look.

    Args:
      boot: the kernel's name for the time since the last boot.
      noted: what `note` returned in an earlier life, or None.
    """

    def __init__(self, boot: str, noted: str | None = None) -> None:
        self._boot = boot
        self._anchor = _read(noted)
        self._held_since: float | None = None

    @property
    def held(self) -> bool:
        """Whether the last look found a jump that is not believed yet."""
        return self._held_since is not None

    def look(self, wall: float, counted: float) -> bool:
        """Whether ages may be acted on now.

        Args:
          wall: Unix seconds.
          counted: seconds of a clock that never jumps and counts a sleeping machine's time as well.
        """
        if self._ahead(wall, counted) <= TOLERANCE:
            self._held_since = None
        else:
            if self._held_since is None:
                self._held_since = counted
            if counted - self._held_since < HOLD:
                return False
            self._held_since = None
        self._anchor = _Anchor(wall, counted, self._boot)
        return True

    def _ahead(self, wall: float, counted: float) -> float:
        """Return how many seconds more than it should the wall clock has moved; below 0 it moved less, or back."""
        anchor = self._anchor
        if anchor is None:
            return 0.0
        if anchor.boot == self._boot:
            return (wall - anchor.wall) - (counted - anchor.counted)
        # How long the machine was off is not known. Longer than HOLD is as suspicious as a jump: a machine whose
        # clock has lost its battery begins somewhere, and a day more costs nothing.
        return (wall - anchor.wall) - counted - HOLD

    def note(self) -> str:
        """Return what the next life has to know; a jump that is not believed is none of it, so it is found again."""
        anchor = self._anchor
        return "" if anchor is None else msgspec.json.encode(anchor).decode()


def _read(noted: str | None) -> _Anchor | None:
    if not noted:
        return None
    try:
        found: Any = msgspec.json.decode(noted, type=_Anchor)
    except msgspec.MsgspecError:
        return None
    return found if isinstance(found, _Anchor) else None
