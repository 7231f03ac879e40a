"""The supervisor's side of the gateway, against small programs that stand for one."""

from __future__ import annotations

import json
import os
import signal
import socket
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from supervisor import gateway_client as room
from supervisor.gateway_client import Gateway, Report
from supervisor.policy import RestartPolicy
from supervisor.runners import Runner
from taskkit.errors import NeverReady, RestartIntensityExceeded
from taskkit.lifecycle import ProcessState
from taskkit.settings import LimitSettings
from taskkit.wire.messages import Configure, Drain, Drained, Kill
from tests.unit.supervisor.conftest import LEAVES, WAITS, Family

pytestmark = pytest.mark.usefixtures("leaves_nothing")

Limit = Callable[[float], AbstractContextManager[trio.CancelScope]]

#: Beginning of each program: `hear()` returns the next order, `say(message)` reports.
PREAMBLE = """
import json, os, signal, socket, sys
from taskkit import seqpacket
from taskkit.wire.codec import pack, unpack
from taskkit.wire.messages import *
control = socket.socket(fileno=int(sys.argv[1]))
def hear():
    received = seqpacket.receive(control)
    if received is None:
        sys.exit(0)
    return unpack(received[0], GatewayOrder), received[1]
def say(message):
    seqpacket.send(control, pack(message))
def note(*words):
    say(Kill(runner="note", kind="note", detail=json.dumps(words)))
"""

#: Serves, and notes each order with the number of descriptors that came along.
SERVES = """
say(GatewayReady())
while True:
    order, fds = hear()
    note(os.getpid(), type(order).__name__, len(fds), getattr(order, "adopted", None))
    if isinstance(order, EndStreams | Park):
        sys.exit(0)
"""


class Office:
    """A Gateway with whatever it tells the tree.

    Attributes:
      notes: what the programs noted.
      ups, downs: how often a gateway came and went.
      greets: whether one that came is told something.
    """

    def __init__(self, folder: Path, runners: Callable[[], list[Runner]]) -> None:
        self._folder = folder
        self.notes: list[list[object]] = []
        self.reports: list[Report] = []
        self.ups = self.downs = 0
        self.greets = False
        self.changed = trio.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.gateway = Gateway(
            limits=LimitSettings(),
            configure=self._configure,
            listener=self.listener,
            runners=runners,
            on_message=self._heard,
            on_up=self._up,
            on_down=self._down,
        )

    def program(self, source: str) -> None:
        """Let the next gateways be this program."""
        (self._folder / "gateway.py").write_text(PREAMBLE + textwrap.dedent(source))

    def _configure(self, adopting: list[str]) -> Configure:
        return Configure(
            settings={},
            catalogue=[],
            state_dir="/state",
            url="http://127.0.0.1:1",
            boot_id="b",
            key_file="/state/key",
            allowed_hosts=[],
            adopting=adopting,
        )

    def _heard(self, message: Report) -> None:
        if isinstance(message, Kill) and message.kind == "note":
            self.notes.append(json.loads(message.detail))
        else:
            self.reports.append(message)
        self._wake()

    def _up(self) -> None:
        self.ups += 1
        if self.greets:
            self.gateway.send(Drain(grace=1.0))
        self._wake()

    def _down(self) -> None:
        self.downs += 1
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was heard fulfils a condition."""
        with trio.fail_after(20):
            while not condition():
                await self.changed.wait()


@pytest.fixture
async def office(family: Family, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Office]:
    """Give an office whose gateways are small programs."""
    folder = family.runners.state_dir
    # In front of the real package, which is found through the site directory.
    monkeypatch.setenv("PYTHONPATH", str(folder))
    office = Office(folder, lambda: list(family.runners.all.values()))
    office.gateway.policy = RestartPolicy(intensity=10)
    with office.listener:
        yield office


@pytest.fixture
async def nursery_of_gateways(office: Office) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


async def test_started_means_serving(office: Office, nursery_of_gateways: trio.Nursery) -> None:
    office.program(SERVES)
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
    assert (office.gateway.up, office.ups) == (True, 1)
    assert office.gateway.child is not None
    assert office.gateway.child.state is ProcessState.RUNNING
    await office.until(lambda: len(office.notes) == 1)
    assert office.notes[0][1:] == ["Configure", 1, None], "the listening socket comes along"


async def test_the_listening_socket_that_comes_along_is_the_one(
    office: Office, nursery_of_gateways: trio.Nursery
) -> None:
    office.program(
        """
        order, fds = hear()
        say(GatewayReady())
        note(*socket.socket(fileno=fds[0]).getsockname())
        hear()
        """
    )
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
    await office.until(lambda: len(office.notes) == 1)
    assert tuple(office.notes[0]) == office.listener.getsockname()


async def test_the_next_one_is_told_everything_anew(
    office: Office, family: Family, nursery_of_gateways: trio.Nursery
) -> None:
    office.program(SERVES)
    await family.bear(WAITS)
    await family.wait_dead(await family.bear(LEAVES))
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
    office.gateway.drain(3.0)
    everything = [["Configure", 1, None], ["RunnerUp", 3, True], ["RunnerUp", 3, True], ["Exited", 0, None]]
    everything.append(["Drain", 0, None])
    await office.until(lambda: len(office.notes) == 5)
    assert [note[1:] for note in office.notes] == everything
    first = office.gateway.child
    assert first is not None
    first.send_signal(signal.SIGKILL)
    await office.until(lambda: len(office.notes) == 10)
    assert [note[1:] for note in office.notes[5:]] == everything
    assert office.notes[5][0] != first.pid
    assert (office.ups, office.downs, office.gateway.last_exit) == (2, 1, "SIGKILL")


async def test_the_next_one_starts_when_the_last_is_gone(
    office: Office, nursery_of_gateways: trio.Nursery
) -> None:
    # It hangs up, but lives on and ignores TERM: two readers would corrupt the pipes.
    office.program(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(GatewayReady())
        note(os.getpid())
        hear()
        control.close()
        while True: signal.pause()
        """
    )
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
    await office.until(lambda: len(office.notes) == 1)
    office.program(SERVES)
    await office.until(lambda: office.ups == 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(office.notes[0][0])), 0)
    assert office.gateway.last_exit == "SIGKILL"


async def test_what_it_reports_reaches_the_tree(office: Office, nursery_of_gateways: trio.Nursery) -> None:
    office.program('say(GatewayReady()); say(Beat()); say(Drained(runner="r-1")); hear(); hear()')
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
    await office.until(lambda: bool(office.reports))
    assert office.reports == [Drained(runner="r-1")]


@pytest.mark.parametrize(
    "source",
    [
        "say(GatewayReady()); hear(); signal.pause()",
        'say(GatewayReady()); control.send(b"?"); signal.pause()',
    ],
    ids=["silence", "garbage"],
)
async def test_silence_and_garbage_are_ended_and_replaced(
    office: Office, nursery_of_gateways: trio.Nursery, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(office.gateway, "_beat_seconds", 0.3)
    office.program(source)
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
    await office.until(lambda: office.ups == 2)
    assert office.downs >= 1
    assert office.gateway.last_exit in ("SIGTERM", "SIGKILL")


async def test_a_word_that_comes_too_late_or_twice_is_no_news(office: Office) -> None:
    office.program("say(GatewayReady()); say(GatewayReady()); hear(); os.kill(os.getpid(), signal.SIGKILL)")
    async with trio.open_nursery() as nursery:
        with trio.fail_after(20):
            await nursery.start(office.gateway.run)
            await office.until(lambda: office.ups == 2)
        assert office.downs >= 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("sys.exit(4)", 2),
        ("hear(); hear()", 1),  # hangs, and is killed
        ("sys.exit(os.EX_TEMPFAIL)", 1),
    ],
    ids=["leaves", "hangs", "no-room"],
)
async def test_one_that_never_comes_up_is_a_boot_error_unless_it_may_pass(
    office: Office, monkeypatch: pytest.MonkeyPatch, source: str, code: int
) -> None:
    monkeypatch.setattr(room, "READY_SECONDS", 0.5)
    office.program(source)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            with pytest.raises(NeverReady, match="does not come up: 3 times") as caught:
                await nursery.start(office.gateway.run)
    assert office.ups == 0
    assert caught.value.exit_code == code


async def test_one_that_keeps_dying_is_given_up(office: Office) -> None:
    office.gateway.policy = RestartPolicy(intensity=2)
    office.greets = True  # it leaves when its word has arrived: its end may be seen before
    office.program("hear(); say(GatewayReady()); hear(); sys.exit(9)")
    with (
        trio.fail_after(30),
        pytest.raises(RestartIntensityExceeded, match=r"3 times .*exit code 9") as caught,
    ):
        await office.gateway.run(task_status=trio.TASK_STATUS_IGNORED)
    assert office.ups == office.downs == 3
    assert caught.value.exit_code == 4


async def test_while_stopping_it_may_leave(office: Office) -> None:
    office.program("say(GatewayReady())\nwhile not isinstance(hear()[0], Drain): pass")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(office.gateway.run)
            office.gateway.stopping = True
            office.gateway.drain(1.0)
    assert (office.gateway.last_exit, office.ups) == ("exit code 0", 1)
    office.gateway.drain(1.0)  # to nobody


async def test_a_planned_restart_is_no_death(office: Office, nursery_of_gateways: trio.Nursery) -> None:
    """The next process is there before the present one is asked to leave, and is told everything."""
    office.program(SERVES)
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
        before = office.gateway.child
        assert await office.gateway.restart()
    assert before is not None
    assert str(before.exit) == "exit code 0"
    assert (office.ups, office.downs, office.gateway.policy.restarts) == (2, 1, 0)
    await office.until(lambda: [note[1] for note in office.notes].count("Configure") == 2)
    pids = {note[0] for note in office.notes}
    assert len(pids) == 2


async def test_one_that_does_not_leave_when_asked_is_killed(
    office: Office, nursery_of_gateways: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PARK_SECONDS", 0.3)
    office.program("say(GatewayReady())\nwhile True: hear()")
    with trio.fail_after(20):
        await nursery_of_gateways.start(office.gateway.run)
        assert await office.gateway.restart()
    assert office.gateway.last_exit == "SIGKILL"
    assert office.ups == 2


async def test_without_a_gateway_there_is_nothing_to_restart(office: Office) -> None:
    assert not await office.gateway.restart()
