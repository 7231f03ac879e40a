"""An attempt of nothing, told to nobody, before the first order comes.

A forked process shares its memory until it writes there, and Python writes wherever it looks (reference counts): its
first attempt meets several hundred pages that the kernel has to copy. Here they are copied while nobody waits.
"""

from __future__ import annotations

import contextvars
import os
from typing import Final

from taskkit.registry import TaskDefinition
from taskkit.runner.attempt import Attempt, perform_sync
from taskkit.runner.emitter import Emitter
from taskkit.runner.inbox import Mail
from taskkit.runner.orders import Orders
from taskkit.signals import ANNOUNCE
from taskkit.wire.codec import pack, unpack
from taskkit.wire.messages import Event, Order, RunnerSpec, Start, Started, TaskInfo


def _nothing() -> None:
    return None


#: By the name of our own task, of which no receiver of the project's is told.
_TASK: Final = TaskDefinition(
    info=TaskInfo(name=ANNOUNCE, path=f"{__name__}.{_nothing.__name__}", kind="function"),
    func=_nothing,
    model=None,
    loop=None,
    backoff=None,
)


def rehearse(spec: RunnerSpec, orders: Orders) -> None:
    """Go the way of an attempt, from its order to its end. Leaves nothing behind; no user code runs."""
    contextvars.copy_context().run(_rehearse, spec, orders)


def _rehearse(spec: RunnerSpec, orders: Orders) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        emitter = Emitter(nowhere, spec.pipe_size, -1)
        start: Start = unpack(pack(Start(run="", attempt=1, token="", task=ANNOUNCE)), Order)
        emitter.send(Started(token=start.token))
        attempt = Attempt(start, _TASK, emitter, spec, Mail())
        emitter.send(Event(token=start.token, type="", data=b"{}"))
        with orders.interrupting(start.token, emitter):
            finished = perform_sync(attempt)
        emitter.send(finished)
    finally:
        os.close(nowhere)
