"""The first gateway, forked while this process has little but what both import.

They then share the pages of that (4 MiB in each of them otherwise), and the gateway imports its own rooms while the
zygote imports the project. Later gateways, and the first if anything goes wrong here, are made by exec.

Rule: imports at the top of this file are what supervisor and gateway have in common, and no room of either.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Final, NoReturn

import psutil
import setproctitle
import trio

from taskkit import channel, failpoints, linux, seqpacket, settings, tokens
from taskkit.wire import messages

#: Imported for the pages.
_COMMON: Final = (psutil, setproctitle, trio, channel, failpoints, settings, tokens, messages)

#: What it becomes: a name, as this package must not import that one.
_MODULE: Final = "gateway.__main__"

#: Signals that end or reload the tree by way of the supervisor, as at any child by exec.
_NOT_MINE: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)

_waiting: list[tuple[int, socket.socket]] = []


def bear() -> None:
    """Fork it; it waits for `take`. Without room for another process nothing happens."""
    if linux.TREE_MARK in os.environ:
        return  # below a task of another tree, whose mark an exec would leave out
    with contextlib.suppress(OSError):
        ours, theirs = linux.seqpacket_pair()
        with theirs:
            gc.collect()
            gc.freeze()  # a collection would write to every page
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                _live(theirs)
        _waiting.append((pid, ours))


def pids() -> set[int]:
    """Of the process that waits: it is no stray."""
    return {pid for pid, _ in _waiting}


def take(arguments: Sequence[str], fd: int) -> int | None:
    """Let the waiting process be `python -m gateway FD *arguments`; return its pid, or None when there is none."""
    if not _waiting:
        return None
    pid, ours = _waiting.pop()
    with ours:
        try:
            seqpacket.send(ours, json.dumps(list(arguments)).encode(), (fd,))
        except OSError:  # it has died; what it said is in the log, and another will say the same
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            return None
    return pid


def dismiss() -> None:
    """End one that was not needed. It has nothing yet that could be lost, and may be in the middle of its imports."""
    while _waiting:
        pid, ours = _waiting.pop()
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _live(control: socket.socket) -> NoReturn:
    code = 1
    try:
        code = _become(control)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _become(control: socket.socket) -> int:
    for number in _NOT_MINE:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # an image after an upgrade begins with some blocked
    only = control.fileno()
    os.closerange(3, only)
    os.closerange(only + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["SPT_NOENV"] = "1"
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    module = importlib.import_module(_MODULE)
    received = seqpacket.receive(control)
    if received is None:  # not needed: the tree was not made
        return 0
    payload, fds = received
    control.close()
    return int(module.main(["gateway", str(fds[0]), *json.loads(payload)]))
