"""A new child becomes what it was made for."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback

from taskkit.registry import TaskDefinition
from taskkit.runner import capture
from taskkit.runner.limits import protect
from taskkit.runner.main import Ends, Runner, close_connections
from taskkit.wire.messages import RunnerSpec
from taskkit.zygote import birth

#: Exit codes of a child that never came up, told apart from what user code leaves with (sysexits.h: EX_TEMPFAIL,
#: EX_SOFTWARE).
ORPHANED = 75
BOOT_FAILED = 70

#: Descriptors that travel with each role, in this order.
RUNNER_ENDS = ("events", "output", "orders", "faults", "blobs")
COURIER_ENDS = ("control", "poke", "faults")


def live_as_runner(
    spec: RunnerSpec, fds: list[int], parent: int, supervisor: int, tasks: dict[str, TaskDefinition]
) -> None:
    """Become a runner; never returns.

    Args:
      fds: descriptors in the order of RUNNER_ENDS.
      parent: pid of the process that forked this one; the supervisor's own after an exec.
      supervisor: pid of the process that has to be, or become, the parent.
    """
    code, faults = BOOT_FAILED, -1
    try:
        events, output, orders, faults, blobs = birth.move_descriptors(fds)
        birth.reset_signals()
        birth.name_process(
            f"bulkhead: {spec.role} {spec.id} ({spec.pool})", f"bh:{spec.role} {spec.id.rpartition('-')[2]}"
        )
        birth.await_adoption(parent, supervisor)
        birth.die_with(supervisor, signal.SIGKILL)
        birth.own_group(session=False)
        birth.become_subreaper()
        birth.report_faults(faults)
        birth.no_stdin()
        birth.reseed()
        capture.install(output)
        protect(spec)
        code = Runner(spec, Ends(events, output, orders, blobs), tasks).run()
        close_connections()
    except birth.Orphaned:
        code = ORPHANED
    except BaseException:
        _last_words(faults)
    finally:
        os._exit(code)


def live_as_courier(fds: list[int], parent: int, supervisor: int, state_dir: str) -> None:
    """Become the courier; never returns. `fds` are in the order of COURIER_ENDS, the rest as for a runner."""
    code, faults = BOOT_FAILED, -1
    try:
        control, poke, faults = birth.move_descriptors(fds)
        birth.reset_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        birth.name_process("bulkhead: courier", "bh:courier")
        birth.await_adoption(parent, supervisor)
        birth.die_with(supervisor, signal.SIGTERM)
        # Out of the runners' session: there, their autogroup's low weight would be the courier's as well.
        birth.own_group(session=True)
        birth.report_faults(faults)
        birth.no_stdin()
        birth.reseed()
        birth.hide()
        from taskkit.courier.loop import main

        main(socket.socket(fileno=control), socket.socket(fileno=poke), state_dir)
        code = 0
    except birth.Orphaned:
        code = ORPHANED
    except BaseException:
        _last_words(faults)
    finally:
        os._exit(code)


def _last_words(faults: int) -> None:
    """Say why a child could not live, where its supervisor's log is, or its run's output, and to the supervisor."""
    try:
        traceback.print_exc()
        if faults != -1:
            os.write(faults, traceback.format_exc().encode("utf-8", "replace"))
        sys.stderr.flush()
        capture.finish_lines()
    except OSError:
        return
