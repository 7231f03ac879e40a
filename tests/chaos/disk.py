"""A small disk that can be made full and free again: a tmpfs, where mounting is allowed."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from tests.helpers import FOLDER_PREFIX

_MS_REMOUNT: Final = 32
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _mount(path: Path, size: int, flags: int = 0) -> None:
    result = _libc.mount(
        b"tmpfs", os.fsencode(path), b"tmpfs", ctypes.c_ulong(flags), f"size={size},mode=0700".encode()
    )
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"mount: {os.strerror(number)}", str(path))


class Disk:
    """A temporary directory; on a file system of its own when this process may mount one.

    A full disk is the same file system made as small as what it holds: nothing has to be written, and it is full at
    once for everybody. Source: tmpfs(5), `mount -o remount,size=`.

    Args:
      size: bytes when it is not full.

    Attributes:
      path: the directory.
      mounted: whether it can be made full.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
        try:
            _mount(self.path, size)
            self.mounted = True
        except OSError:
            self.mounted = False

    def fill(self) -> None:
        """Leave no free page, or hardly any where somebody writes meanwhile."""
        for spare in (0, 0, 1, 4, 16, 64):
            state = os.statvfs(self.path)
            used = state.f_blocks - state.f_bfree + spare
            try:
                _mount(self.path, max(used, 1) * state.f_frsize, _MS_REMOUNT)
            except OSError as error:  # it holds more by now than it held a moment ago
                if error.errno != errno.EINVAL:
                    raise
            else:
                return

    def free(self) -> None:
        """Give the space back."""
        _mount(self.path, self._size, _MS_REMOUNT)

    @property
    def used(self) -> int:
        """Bytes in use."""
        state = os.statvfs(self.path)
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def remove(self) -> None:
        """Unmount and remove it."""
        if self.mounted:
            _libc.umount2(os.fsencode(self.path), _MNT_DETACH)
        shutil.rmtree(self.path, ignore_errors=True)
