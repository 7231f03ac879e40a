"""A rehearsal is an attempt that leaves nothing behind."""

from __future__ import annotations

import os
import signal

import pytest

from taskkit import current, linux, seqpacket
from taskkit.runner.orders import Orders
from taskkit.wire.codec import pack
from taskkit.wire.messages import Cancel, RunnerSpec, Start

pytestmark = pytest.mark.usefixtures("django_project")


def test_nothing_is_left_behind_and_nobody_hears_of_it() -> None:
    from taskkit.runner.rehearsal import rehearse  # it imports models
    from taskkit.signals import run_finished, run_started

    near, far = linux.seqpacket_pair()
    given_back: list[str] = []
    orders = Orders(far, given_back.append)
    start = Start(run="r", attempt=1, token="one", task="t.f")
    seqpacket.send(near, pack(start))
    seqpacket.send(near, pack(Cancel(token="one", reason="cancelled")))
    heard: list[object] = []

    def listen(**told: object) -> None:
        heard.append(told)

    before, handler = set(os.listdir("/proc/self/fd")), signal.getsignal(signal.SIGIO)
    run_started.connect(listen)
    run_finished.connect(listen)
    try:
        rehearse(RunnerSpec(id="u-1"), orders)
    finally:
        run_started.disconnect(listen)
        run_finished.disconnect(listen)
    assert heard == []
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(RuntimeError):
        current.current_run()
    assert orders.next() == start, "an order that came in the meantime is there"
    assert orders.is_cancelled("one")
    assert given_back == []
    near.close()
    far.close()
    signal.signal(signal.SIGIO, handler)  # behind the end of the socket, which is input, too
