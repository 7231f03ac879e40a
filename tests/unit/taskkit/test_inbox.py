"""Inboxes, in a thread, under both event loops, beside a signal handler."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import anyio
import pytest

from taskkit.inbox import Inbox
from taskkit.runner.inbox import Mail
from taskkit.wire.messages import Input


def test_messages_come_in_their_order_once() -> None:
    inbox = Inbox()
    for n in range(3):
        inbox.put({"n": n})
    assert [inbox.get(0)["n"], inbox.get()["n"], inbox.get(1.0)["n"]] == [0, 1, 2]
    with pytest.raises(TimeoutError, match="no message within 0 s"):
        inbox.get(0)
    with pytest.raises(TimeoutError):
        inbox.get(0.01)


def test_a_signal_handler_may_bring_what_its_thread_waits_for() -> None:
    inbox = Inbox()
    before = signal.signal(signal.SIGUSR1, lambda *_: inbox.put({"from": "handler"}))
    try:
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        assert inbox.get(10) == {"from": "handler"}
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_asynchronous_tasks_wait_in_their_loop(backend: str) -> None:
    async def main() -> None:
        inbox = Inbox()
        heard: list[dict[str, Any]] = []

        async def hear() -> None:
            heard.append(await inbox.aget())

        with anyio.fail_after(10):
            async with anyio.create_task_group() as group:
                group.start_soon(hear)
                group.start_soon(hear)
                await anyio.wait_all_tasks_blocked()
                assert not heard
                inbox.put({"n": 1})
                await anyio.wait_all_tasks_blocked()
                assert heard == [{"n": 1}], "one message is for one"
                inbox.put({"n": 2})
        with pytest.raises(TimeoutError):
            await inbox.aget(0.01)
        inbox.put({"n": 3})
        assert await inbox.aget(0) == {"n": 3}
        with anyio.move_on_after(0.01):
            await inbox.aget()
        inbox.put({"n": 4})
        assert await inbox.aget() == {"n": 4}, "whoever was cancelled has taken nothing"
        inbox.put({"n": 5})
        with pytest.raises(RuntimeError, match="await aget"):
            inbox.get()
        assert await anyio.to_thread.run_sync(inbox.get) == {"n": 5}

    anyio.run(main, backend=backend)


def test_what_was_heard_is_not_heard_again() -> None:
    mail = Mail()
    told = [Input(token="t", number=n, name=name, data=b'{"n":%d}' % n) for n, name in ((1, "a"), (2, "b"))]
    for order in [*told, *told, Input(token="t", number=3, name="a", data=b'{"n":3}')]:
        mail.deliver(order)
    assert [mail.inbox("a").get(0), mail.inbox("a").get(0)] == [{"n": 1}, {"n": 3}]
    assert mail.inbox("b").get(0) == {"n": 2}
    with pytest.raises(TimeoutError):
        mail.inbox("a").get(0)


def test_one_that_waits_has_others_look_for_what_its_thread_was_not_woken_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("taskkit.inbox._LOOK", 0.01)
    lost = [{"n": 1}]
    inbox: Inbox = Inbox(lambda: inbox.put(lost.pop()) if lost else None)
    assert inbox.get(10) == {"n": 1}
    with pytest.raises(TimeoutError):
        inbox.get(0.05)
