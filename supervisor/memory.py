"""What the kernel says about memory: kills for want of it, how much is left."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import psutil

#: Below this share of available memory, a SIGKILL that nobody of ours sent is suspected to be the OOM killer's.
_SCARCE: Final = 0.05

_CGROUPS: Final = Path("/sys/fs/cgroup")


def _counter_file() -> tuple[Path, str] | None:
    """Return the file and the key of the OOM-kill count of this process's memory cgroup."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":  # version 1
                candidate = _CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
            elif controllers == "":  # version 2
                candidate = _CGROUPS / path.lstrip("/") / "memory.events"
            else:
                continue
            if candidate.exists():
                return candidate, "oom_kill"
    return None


class OomCounter:
    """Counts OOM kills in this process's memory cgroup (cgroups(7): memory.events, or memory.oom_control)."""

    def __init__(self) -> None:
        self._source = _counter_file()
        self._last = self._read()

    def _read(self) -> int | None:
        if self._source is None:
            return None
        path, key = self._source
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == key:
                    return int(value)
        return None

    def since_last(self) -> int | None:
        """Return how many kills were counted since the last call; None when the kernel does not say."""
        now = self._read()
        before, self._last = self._last, now
        if now is None or before is None:
            return None
        return now - before


def is_scarce() -> bool:
    """Whether the machine has hardly any memory left."""
    try:
        memory = psutil.virtual_memory()
    except OSError:  # no descriptor is left to read it with
        return False
    return bool(memory.available < _SCARCE * memory.total)
