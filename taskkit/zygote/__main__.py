"""The zygote's entry: `python -m taskkit.zygote CONTROL_FD JSON`.

Prepares, says what it found, then forks on request until its control socket ends. Never runs user code, never starts
an event loop, keeps one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback

from taskkit import seqpacket
from taskkit.errors import SettingsError
from taskkit.wire.codec import pack, unpack
from taskkit.wire.messages import Fork, Forked, ForkFailed, Message, Retire, ZygoteFailed, ZygoteOrder
from taskkit.zygote import birth, prepare

#: Weight of the session of zygote and runners, as a nice value (sched(7), autogroup).
SESSION_NICE = 10


def main(argv: list[str]) -> int:
    """Run the zygote; return its exit code: 0 when told to leave, 2 when the project cannot be prepared."""
    control = socket.socket(fileno=int(argv[1]))
    options = json.loads(argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    birth.name_process("bulkhead: zygote", "bh:zygote")
    birth.die_with(options["supervisor"], signal.SIGTERM)
    _lower_session_weight()
    try:
        tasks = prepare.load_project(options["settings_module"], options["path"])
        prepare.check_pools(tasks)
        probe = prepare.probe_database(migrate=options["migrate"])
        forks = prepare.any_pool_forks()
        if forks:
            prepare.freeze({control.fileno()})
        ready = prepare.describe(options["settings_module"], tasks, probe)
    except prepare.NotForkSafe as error:
        return _fail(control, "not fork-safe", str(error))
    except SettingsError as error:
        return _fail(control, "settings", str(error))
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        return _fail(control, reason, traceback.format_exc())
    seqpacket.send(control, pack(ready))
    del ready
    if forks:
        _serve(control, tasks, options)
    else:
        seqpacket.receive(control)  # all pools spawn: stay for what the catalogue says, until the end
    return 0


def _fail(control: socket.socket, reason: str, detail: str) -> int:
    with contextlib.suppress(OSError):
        seqpacket.send(control, pack(ZygoteFailed(reason=reason, detail=detail)))
    return 2


def _lower_session_weight() -> None:
    """Give the session of zygote and runners, which is one scheduling group, less weight than the rest.

    Written once: an ordinary user may do so ten times a second only.
    """
    with contextlib.suppress(OSError):  # a kernel without autogroups
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(SESSION_NICE))


def _serve(control: socket.socket, tasks: dict[str, object], options: dict[str, object]) -> None:
    while (received := seqpacket.receive(control)) is not None:
        payload, fds = received
        order: Fork | Retire = unpack(payload, ZygoteOrder)
        if isinstance(order, Retire):
            return
        _fork(control, order, fds, tasks, options)
        seqpacket.close_all(fds)


def _fork(
    control: socket.socket, order: Fork, fds: list[int], tasks: dict[str, object], options: dict[str, object]
) -> None:
    """Fork the intermediate process, which forks the children and leaves, so that they become the supervisor's."""
    try:
        pid = os.fork()
    except OSError as error:
        seqpacket.send(control, pack(ForkFailed(ask=order.ask, detail=str(error))))
        return
    if pid:
        os.waitpid(pid, 0)
        return
    code = 1
    try:
        _bear(control, order, fds, tasks, options)
        code = 0
    finally:
        os._exit(code)


def _bear(
    control: socket.socket, order: Fork, fds: list[int], tasks: dict[str, object], options: dict[str, object]
) -> None:
    from taskkit.zygote import roles

    supervisor = int(str(options["supervisor"]))
    count = 1 if order.courier else len(order.runners)
    each = len(fds) // count
    for index in range(count):
        try:
            pid = os.fork()
        except OSError as error:
            seqpacket.send(control, pack(ForkFailed(ask=order.ask, detail=str(error))))
            return
        if pid == 0:
            mine = fds[index * each : (index + 1) * each]
            if order.courier:
                roles.live_as_courier(mine, supervisor, order.state_dir)
            roles.live_as_runner(order.runners[index], mine, supervisor, tasks)  # type: ignore[arg-type]
        _announce(control, Forked(ask=order.ask, index=index, pid=pid), pid)


def _announce(control: socket.socket, message: Message, pid: int) -> None:
    """Tell the supervisor of a child while this process is its parent: its pid cannot be another's yet."""
    pidfd = os.pidfd_open(pid)
    seqpacket.send(control, pack(message), (pidfd,))
    os.close(pidfd)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
