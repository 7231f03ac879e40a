"""One child by exec instead of fork: `python -m taskkit.zygote.spawned CONTROL_FD JSON`.

For pools with start="spawn", whose libraries do not survive a fork. It prepares the project like a zygote, then
becomes what the one Fork message on its control socket says.
"""

from __future__ import annotations

import json
import signal
import socket
import sys

from taskkit import seqpacket
from taskkit.wire.codec import unpack
from taskkit.wire.messages import Fork
from taskkit.zygote import birth, prepare


def main(argv: list[str]) -> int:
    """Become the child; returns only when the project cannot be imported or no order came."""
    control = socket.socket(fileno=int(argv[1]))
    options = json.loads(argv[2])
    birth.die_with(options["supervisor"], signal.SIGKILL)
    birth.name_process(f"bulkhead: {options['name']}", f"bh:{options['name']}")
    birth.lower_session_weight()
    tasks = prepare.load_project(options["settings_module"], options["path"])
    from taskkit.zygote import roles

    received = seqpacket.receive(control)
    if received is None:
        return roles.ORPHANED
    payload, fds = received
    order: Fork = unpack(payload, Fork)
    supervisor = options["supervisor"]
    if order.courier:
        roles.live_as_courier(fds, supervisor, supervisor, order.state_dir)
    roles.live_as_runner(order.runners[0], fds, supervisor, supervisor, tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
