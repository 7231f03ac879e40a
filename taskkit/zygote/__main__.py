"""The zygote's entry: `python -m taskkit.zygote CONTROL_FD JSON`.

Prepares, says what it found, then forks on request until its control socket ends. Never runs user code, never starts
an event loop, keeps one thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from taskkit import failpoints, linux, seqpacket
from taskkit.errors import SettingsError
from taskkit.wire.codec import pack, unpack
from taskkit.wire.messages import (
    Fork,
    Forked,
    ForkFailed,
    Message,
    Retire,
    ZygoteFailed,
    ZygoteOrder,
    ZygoteReady,
)
from taskkit.zygote import birth, prepare

if TYPE_CHECKING:  # it imports Django, which has to happen where a failure is told
    from taskkit.registry import TaskDefinition


#: What `linux.fork_sibling` says where it cannot work.
_NOT_HERE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EPERM})


class Options(msgspec.Struct, frozen=True):
    """What the supervisor wants of a zygote: `path` goes in front of sys.path, `migrate` is for the demo."""

    settings_module: str
    path: list[str]
    supervisor: int
    migrate: bool = False


def main(argv: list[str]) -> int:
    """Run the zygote; return its exit code: 0 when told to leave, 2 when the project cannot be prepared."""
    control = socket.socket(fileno=int(argv[1]))
    options = msgspec.json.decode(argv[2], type=Options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    birth.name_process("bulkhead: zygote", "bh:zygote")
    birth.die_with(options.supervisor, signal.SIGTERM)
    birth.lower_session_weight()
    try:
        tasks, ready = _prepare(control, options)
    except prepare.NotForkSafe as error:
        return _fail(control, "not fork-safe", str(error))
    except SettingsError as error:
        return _fail(control, str(error), "")
    except BaseException as error:
        return _fail(control, f"{type(error).__name__}: {error}", prepare.complaint_of(error))
    seqpacket.send(control, pack(ready))
    _serve(control, tasks, options.supervisor)
    return 0


def _prepare(control: socket.socket, options: Options) -> tuple[dict[str, TaskDefinition], ZygoteReady]:
    tasks = prepare.load_project(options.settings_module, options.path)
    prepare.check_pools(tasks)
    prepare.check_schedules(tasks)
    probe = prepare.probe_database(migrate=options.migrate)
    if prepare.any_pool_forks():
        prepare.practise()
        prepare.freeze({control.fileno()})
    return tasks, prepare.describe(options.settings_module, tasks, probe)


def _fail(control: socket.socket, reason: str, detail: str) -> int:
    with contextlib.suppress(OSError):
        seqpacket.send(control, pack(ZygoteFailed(reason=reason, detail=detail)))
    return 2


def _serve(control: socket.socket, tasks: dict[str, TaskDefinition], supervisor: int) -> None:
    while (received := seqpacket.receive(control)) is not None:
        payload, fds = received
        order: Fork | Retire = unpack(payload, ZygoteOrder)
        if isinstance(order, Retire):
            return
        _fork(control, order, fds, tasks, supervisor)
        seqpacket.close_all(fds)


def _fork(
    control: socket.socket, order: Fork, fds: list[int], tasks: dict[str, TaskDefinition], supervisor: int
) -> None:
    """Fork the children that an order asks for, so that they are the supervisor's."""
    try:
        failpoints.hit("zygote.forking")
        if _bear(control, order, fds, tasks, supervisor, linux.fork_sibling):
            return
        # This machine, or what confines this process, does not let it: an intermediate process forks them and
        # leaves, and the supervisor, a subreaper, gets them.
        pid = os.fork()
    except OSError as error:
        seqpacket.send(control, pack(ForkFailed(ask=order.ask, detail=str(error))))
        return
    if pid:
        os.waitpid(pid, 0)
        return
    code = 1
    try:
        _bear(control, order, fds, tasks, supervisor, os.fork)
        code = 0
    finally:
        os._exit(code)


def _bear(
    control: socket.socket,
    order: Fork,
    fds: list[int],
    tasks: dict[str, TaskDefinition],
    supervisor: int,
    fork: Callable[[], int],
) -> bool:
    """Fork the children; return False, before the first, if `fork` is not possible here at all."""
    from taskkit.zygote import roles

    count = 1 if order.courier else len(order.runners)
    each = len(fds) // count
    parent = os.getpid()
    for index in range(count):
        try:
            pid = fork()
        except OSError as error:
            if index == 0 and error.errno in _NOT_HERE:
                return False
            seqpacket.send(control, pack(ForkFailed(ask=order.ask, detail=str(error))))
            return True
        if pid == 0:
            mine = fds[index * each : (index + 1) * each]
            if order.courier:
                roles.live_as_courier(mine, parent, supervisor, order.state_dir)
            roles.live_as_runner(order.runners[index], mine, parent, supervisor, tasks)
        failpoints.hit("zygote.born")
        _announce(control, Forked(ask=order.ask, index=index, pid=pid), pid)
    return True


def _announce(control: socket.socket, message: Message, pid: int) -> None:
    """Tell the supervisor of a child that it does not know, so does not reap: its pid cannot be another's yet."""
    pidfd = os.pidfd_open(pid)
    seqpacket.send(control, pack(message), (pidfd,))
    os.close(pidfd)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
