"""Who is still there: processes, socket files and descriptors that tests may leave behind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from taskkit import linux


class OpenTree(Protocol):
    """A tree that a test has open: what belongs to it is no leftover."""

    state_dir: Path

    @property
    def pid(self) -> int: ...


#: Begins the names of the state directories that this process makes: short, since a Unix socket's address has 107
#: bytes; its own, since several test runs may share the machine.
FOLDER_PREFIX = f"bh-{os.getpid()}-"

#: The trees that are open in this process.
opened: list[OpenTree] = []


@dataclass
class Standing:
    """A process that goes on until the end of a module's tests."""

    pid: int
    state_dir: Path = Path("/nowhere")


@contextlib.contextmanager
def standing(pid: int) -> Iterator[None]:
    """Have a process, with what is below it, count as an open tree while the block runs."""
    opened.append(one := Standing(pid))
    try:
        yield
    finally:
        opened.remove(one)


def describe(process: psutil.Process) -> str:
    """Return pid, state and command line, as far as they can still be read."""
    try:
        return f"{process.pid} ({process.status()}) {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return f"{process.pid} (gone)"


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def descendants(process: psutil.Process | None = None) -> set[psutil.Process]:
    """Return the living descendants of a process, or of this one."""
    try:
        found = (process or psutil.Process()).children(recursive=True)
    except psutil.Error:
        return set()
    return {child for child in found if is_alive(child)}


def _mentions(process: psutil.Process, text: str) -> bool:
    """Whether command line, working directory, open files or environment lead to `text`."""
    folder = Path("/proc", str(process.pid))
    with contextlib.suppress(OSError):
        if (
            text.encode() in (folder / "cmdline").read_bytes()
            or text.encode() in (folder / "environ").read_bytes()
        ):
            return True
    with contextlib.suppress(OSError):
        for link in (folder / "cwd", *(folder / "fd").iterdir()):
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(text):
                    return True
    return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill what is left of these processes; the start time is compared, so that a recycled pid is safe."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def processes_of(state_dir: Path) -> set[psutil.Process]:
    """Return the living processes that belong to a state directory, with all their descendants.

    A process that renamed itself and holds no file there is found only through its parents; e2e tests find
    the rest because this process is the subreaper of all trees.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        if process.pid != os.getpid() and is_alive(process) and _mentions(process, os.fspath(state_dir)):
            found |= {process} | descendants(process)
    return found


def wait_until_gone(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that still live after `timeout` seconds."""
    end = time.monotonic() + timeout
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < end:
        time.sleep(0.01)
        left = [process for process in left if is_alive(process)]
    return left


def reap_children() -> None:
    """Collect orphans of trees that ended as zombies of this process; open trees are left."""
    owned = {tree.pid for tree in opened}
    for pid in linux.children() - owned:
        with contextlib.suppress(OSError, psutil.Error):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                os.waitpid(pid, os.WNOHANG)


def strays() -> set[psutil.Process]:
    """Return descendants of this process that belong to no open tree."""
    everybody = descendants()  # first: a runner born in between must not count as a stray
    ours: set[psutil.Process] = set()
    for tree in opened:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(tree.pid)
            ours |= {root} | descendants(root)
    return everybody - ours


def wait_until_only(known: set[psutil.Process], timeout: float) -> set[psutil.Process]:
    """Wait until there are no strays but the known ones; return those still there after `timeout` seconds.

    Looks anew each time: a runner of an open tree whose parent, the first of its two forks, leaves while one look reads
    /proc seems to be nobody's in that look, and is the supervisor's in the next.
    """
    end = time.monotonic() + timeout
    while (left := strays() - known) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def open_trees() -> int:
    """Return how many trees are open in this process."""
    return len(opened)


def socket_files() -> set[Path]:
    """Return the socket files in the state directories that tests make."""
    found = set()
    for folder in Path("/tmp").glob(FOLDER_PREFIX + "*"):
        found |= {path for path in folder.rglob("*") if path.is_socket()}
    return found


def in_open_tree(path: Path) -> bool:
    """Whether a path lies in the state directory of an open tree."""
    return any(path.is_relative_to(tree.state_dir) for tree in opened)


def open_descriptors() -> set[tuple[int, str]]:
    """Return the pipes and sockets that this process holds."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target.startswith(("socket:", "pipe:")):
                found.add((int(link.name), target))
    return found
