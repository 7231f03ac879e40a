"""Named moments at which a test can end, stop or fail the process that passes them.

Rule 1: outside tests a moment costs one comparison and does nothing. Tests name a directory in BULKHEAD_FAILPOINTS
before the tree starts, and arm a moment at any time by a file of its name there.

Rule 2: an armed moment acts once, in the first process that passes it: the file is renamed before anything happens.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from typing import Final

#: Environment variable with the directory of armed moments; unset outside tests.
VARIABLE: Final = "BULKHEAD_FAILPOINTS"

#: What a file may ask for.
ACTIONS: Final = ("kill", "stop", "error")

#: Ending of the name of a moment's file once it has acted; the file then holds the pid.
ACTED: Final = ".acted"

#: What a round of the gateway can contain, and how far it can have come when something happens to it.
ROUND_KINDS: Final = ("accept", "assign", "started", "event", "end", "told", "drained")
ROUND_PHASES: Final = {
    "decided": "planned, nothing written",
    "committed": "in the store, still in the pipes",
    "consumed": "out of the pipes, no client has it",
    "published": "clients have it, no order or message has left",
}

#: Every moment, with what has happened by then.
POINTS: Final[Mapping[str, str]] = {
    "accept.asked": "a submission is valid, nothing is decided",
    "accept.answered": "a submission is committed, its answer has not left",
    **{
        f"{phase}.{kind}": f"a round with `{kind}`: {what}"
        for phase, what in ROUND_PHASES.items()
        for kind in ROUND_KINDS
    },
    "store.commit": "all rows are written, the transaction is open",
    "start.ordered": "a runner's socket has taken `Start`",
    "gateway.configured": "a new gateway has its orders, not the store",
    "gateway.opened": "a new gateway has the store, nothing of what was lost is written",
    "gateway.serving": "a new gateway serves, the supervisor does not know",
    "gateway.parked": "streams have been sent away for a planned restart, the store is open",
    "transition.sent": "the courier has been sent a transition",
    "drained.sent": "the supervisor has been told that a runner is drained",
    "fork.ordered": "the supervisor is about to order runners from the zygote",
    "fork.born": "runners live, the supervisor has not registered them",
    "runner.registered": "a runner is registered, no gateway knows it",
    "runner.reaped": "a runner's exit is classified, no gateway knows it",
    "runner.drained": "a runner is drained, its descriptors are open",
    "deadline.set": "the supervisor has been told a deadline and has not noted it",
    "reload.ready": "the new zygote is ready, the old one still serves",
    "reload.switched": "the new zygote serves, old runners have not been sent home",
    "zygote.forking": "the zygote is about to fork",
    "zygote.born": "a child lives, its birth is not announced",
    "runner.hello": "a runner has not said Hello",
    "runner.starting": "a runner has an order, `Started` is not written",
    "runner.started": "`Started` is written, user code has not run",
    "runner.event": "an event is rendered, not written",
    "runner.blob": "a large value is on disk, no frame refers to it",
    "runner.finishing": "user code has returned, `Finished` is not written",
    "runner.finished": "`Finished` is written, the runner lives",
    "courier.read": "outbox entries are read, not submitted",
    "courier.answered": "a submission is answered, the outbox entry is still there",
    "courier.settled": "the outbox entry is gone, nothing else has happened",
    "courier.projecting": "a transition has come, the database does not have it",
    "schedule.due": "a slot is due, nothing is written",
    "schedule.fired": "a slot and its run are written, the transaction is open",
    "schedule.committed": "a slot and its run are in the database, nobody has been told",
    "courier.projected": "the database has a transition, the gateway does not know",
    "courier.claimed": "outbox entries are claimed, nothing is submitted",
    "takeover.written": "a dead node's runs are back in the outbox, the transaction is open",
    "takeover.committed": "a dead node's runs are back in the outbox, nobody has claimed them",
    "takeover.heard": "a node has forgotten a run that is another's now, its note is still there",
}

#: Those that a tree comes to only when it shares its database, or was taken for dead.
SHARED: Final = frozenset({"courier.claimed", "takeover.written", "takeover.committed", "takeover.heard"})

_directory: Final = os.environ.get(VARIABLE)


class Injected(OSError):
    """What an armed moment raises for the action "error"."""


def enabled() -> bool:
    """Whether this process runs under a test that arms moments."""
    return _directory is not None


def hit(name: str) -> None:
    """Pass the moment `name`.

    Raises:
      Injected: a test wants the process to fail here.
    """
    if _directory is not None:
        _act(os.path.join(_directory, name))


def _act(path: str) -> None:
    try:
        os.rename(path, path + ACTED)
    except OSError:
        return  # not armed, or another process was faster
    with open(path + ACTED, "r+") as file:
        action = file.read().strip()
        file.seek(0)
        file.write(f"{os.getpid()}\n")
        file.truncate()
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise Injected(errno.EIO, f"failpoint {os.path.basename(path)}")
