"""The state directory: made, locked, told apart from another supervisor's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from pathlib import Path

import psutil

from supervisor.child import tree_mark
from taskkit import linux
from taskkit.errors import AlreadyRunning, SettingsError

logger = logging.getLogger("bulkhead.supervisor")

#: Names inside the state directory; for ever.
LOCK = "lock"
CONTROL_SOCKET = "control.sock"
POKE_SOCKET = "poke.sock"
BLOBS = "blobs"
KEY = "key"


class StateDirectory:
    """One supervisor's directory. The lock goes with the process, however it dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    @property
    def lock(self) -> int:
        """Descriptor of the lock; still this object's."""
        return self._lock

    def keep(self, lock: int) -> None:
        """Go on with the lock of the image before."""
        self._lock = lock

    def acquire(self) -> None:
        """Make the directory (0700) and lock it.

        Raises:
          AlreadyRunning: another supervisor holds the lock; the message names its pid.
          SettingsError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.path / BLOBS).mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(
                f"STATE_DIR = {str(self.path)!r}: {error.strerror}; choose a directory that this user may write "
                "(--state-dir, TASKKIT_STATE_DIR, or STATE_DIR in settings)"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder(lock)
            os.close(lock)
            raise AlreadyRunning(
                f"a supervisor{holder} is running on {self.path}; `bulkhead status` shows it, `bulkhead stop` stops "
                "it, --state-dir chooses another directory"
            ) from None
        self._end_leftovers(lock)
        os.ftruncate(lock, 0)
        record = {"pid": os.getpid(), "started": psutil.Process().create_time(), "mark": tree_mark()}
        os.pwrite(lock, json.dumps(record).encode() + b"\n", 0)
        self._lock = lock

    @staticmethod
    def _end_leftovers(lock: int) -> None:
        """Kill what tasks of a supervisor that was killed here have left behind: their runs begin again."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a clean stop leaves no record
            left = linux.kill_tree(str(json.loads(os.pread(lock, 1000, 0))["mark"]))
            if left:
                logger.warning("killed %d process(es) of the tree before: %s", len(left), sorted(left))

    @staticmethod
    def _holder(lock: int) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it may be anything
            return f" (pid {json.loads(os.pread(lock, 1000, 0))['pid']})"
        return ""

    def release(self) -> None:
        """Remove what another supervisor would trip over, then let go of the lock; nothing without the lock."""
        if self._lock == -1:
            return  # the sockets are somebody else's
        for name in (CONTROL_SOCKET, POKE_SOCKET):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()
        os.ftruncate(self._lock, 0)
        os.close(self._lock)
        self._lock = -1
