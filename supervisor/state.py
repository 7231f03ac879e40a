"""The state directory: made, locked, told apart from another supervisor's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Final

import psutil

from supervisor.child import tree_mark
from taskkit import linux
from taskkit.errors import AlreadyRunning, SettingsError, SupervisorError, TaskkitError

logger = logging.getLogger("bulkhead.supervisor")

#: Names inside the state directory; for ever.
LOCK = "lock"
CONTROL_SOCKET = "control.sock"
POKE_SOCKET = "poke.sock"
BLOBS = "blobs"
KEY = "key"

#: Bytes of the record in LOCK.
RECORD_BYTES: Final = 512


class NoRoom(SupervisorError):
    """The disk of the state directory is full: a start may succeed later, so it is no bad configuration."""

    exit_code = 1


class StateDirectory:
    """One supervisor's directory. The lock goes with the process, however it dies.

    It is on the directory itself: a file can be removed by somebody, and two supervisors would then each lock one of
    their own. LOCK only says who holds it.
    """

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
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(self.path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AlreadyRunning(
                f"a supervisor{_holder(self.path)} is running on {self.path}; `bulkhead status` shows it, "
                "`bulkhead stop` stops it, --state-dir chooses another directory"
            ) from None
        try:
            _end_leftovers(self.path)
            record = {"pid": os.getpid(), "started": psutil.Process().create_time(), "mark": tree_mark()}
            _write_record(self.path, json.dumps(record))
        except OSError as error:
            os.close(lock)
            raise _unusable(self.path, error) from error
        self._lock = lock

    def release(self) -> None:
        """Remove what another supervisor would trip over, then let go of the lock; nothing without the lock."""
        if self._lock == -1:
            return  # the sockets are somebody else's
        for name in (CONTROL_SOCKET, POKE_SOCKET):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()
        with contextlib.suppress(
            OSError
        ):  # a full disk, a directory that somebody has removed: it says too much
            _write_record(self.path, "")
        os.close(self._lock)
        self._lock = -1


def holder_of(path: Path) -> int | None:
    """Return the pid of the supervisor that holds this directory; 0 if it does not say, None when nobody does.

    Takes the lock for a moment, shared, so that several may look; a supervisor that starts at that moment would be
    refused, so look only when something is wrong.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _recorded(path) or 0
    finally:
        os.close(lock)
    return None


def _unusable(path: Path, error: OSError) -> TaskkitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"STATE_DIR = {str(path)!r}: {error.strerror}; make room there, then start again")
    return SettingsError(
        f"STATE_DIR = {str(path)!r}: {error.strerror}; choose a directory that this user may write "
        "(--state-dir, TASKKIT_STATE_DIR, or STATE_DIR in settings)"
    )


def _write_record(path: Path, text: str) -> None:
    """Write over what is there, always as many bytes: a disk that has filled up has room for them."""
    record = os.open(path / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(record, text.encode().ljust(RECORD_BYTES - 1) + b"\n", 0)
        os.ftruncate(record, RECORD_BYTES)
    finally:
        os.close(record)


def _end_leftovers(path: Path) -> None:
    """Kill what tasks of a supervisor that was killed here have left behind: their runs begin again."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a clean stop leaves no record
        left = linux.kill_tree(str(json.loads((path / LOCK).read_bytes()[:RECORD_BYTES])["mark"]))
        if left:
            logger.warning("killed %d process(es) of the tree before: %s", len(left), sorted(left))


def _recorded(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it may be anything
        return int(json.loads((path / LOCK).read_bytes()[:RECORD_BYTES])["pid"])
    return None


def _holder(path: Path) -> str:
    pid = _recorded(path)
    return f" (pid {pid})" if pid else ""
