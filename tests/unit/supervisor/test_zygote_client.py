"""A real zygote of tests.project: what it says, what it forks, how it fails; and its keeper."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from supervisor import zygote_client as room
from supervisor.child import Child
from supervisor.config import Config
from supervisor.runners import Ends, open_ends
from supervisor.zygote_client import ForkError, Zygote
from supervisor.zygote_keeper import ZygoteKeeper
from taskkit import linux
from taskkit.errors import NeverReady
from taskkit.lifecycle import ProcessState
from taskkit.wire.codec import unpack_runner_frame
from taskkit.wire.framing import read_frames
from taskkit.wire.messages import Hello, RunnerSpec, ZygoteReady
from tests import helpers

Limit = Callable[[float], AbstractContextManager[trio.CancelScope]]

#: Seconds to import the project; 0.5 on an idle machine.
BOOT = 30

PROJECT = Config(settings_module="tests.project.settings", path=(str(helpers.ROOT),))


@pytest.fixture(autouse=True)
def _environment(leaves_nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a database, be the parent of whatever is forked twice, take no setting from outside."""
    linux.set_subreaper()
    database = tmp_path / "project.sqlite3"
    shutil.copyfile(helpers.migrated_database(), database)
    monkeypatch.setenv("BULKHEAD_TEST_DB", str(database))
    for name in [name for name in os.environ if name.startswith("TASKKIT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
async def nursery_of_zygotes() -> AsyncIterator[trio.Nursery]:
    """Give a nursery in which zygotes live; they are ended with it."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


class Nest:
    """A zygote that is ready, with what it said."""

    def __init__(self, zygote: Zygote, ready: ZygoteReady, gone: trio.Event) -> None:
        self.zygote, self.ready, self.gone = zygote, ready, gone


@pytest.fixture
async def nest(nursery_of_zygotes: trio.Nursery, deadline: Limit) -> Nest:
    zygote, gone = Zygote(PROJECT), trio.Event()

    async def live(*, task_status: trio.TaskStatus[ZygoteReady]) -> None:
        await zygote.run(task_status=task_status)
        gone.set()

    with deadline(BOOT):
        ready = await nursery_of_zygotes.start(live)
    return Nest(zygote, ready, gone)


class Brood:
    """Runners forked by hand, with their ends."""

    def __init__(self, fork: Callable[..., Awaitable[list[tuple[int, int]]]], blobs: Path) -> None:
        self._fork = fork
        self._blobs = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY)
        self._ends: list[Ends] = []
        self.children: list[Child] = []

    async def fork(self, names: Sequence[str]) -> list[Child]:
        made = [open_ends() for _ in names]
        fds = [fd for ends in made for fd in (*ends.far, ends.faults, self._blobs)]
        try:
            born = await self._fork([RunnerSpec(id=name, pipe_size=65536) for name in names], fds)
        except BaseException:
            for ends in made:
                ends.close_near()
            raise
        finally:
            for ends in made:
                ends.close_far()
        self._ends += made
        children = [Child(n, pid, fd, group=True) for n, (pid, fd) in zip(names, born, strict=True)]
        self.children += children
        return children

    async def hello(self, index: int) -> Hello:
        """Return the first frame of the runner made as number `index`."""
        fd = self._ends[index].near[0]
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(fd)
        (frame,) = read_frames(os.read(fd, 65536))
        message = unpack_runner_frame(frame)
        assert isinstance(message, Hello)
        return message

    async def close(self) -> None:
        for child in self.children:
            await child.end(0)
        for ends in self._ends:
            ends.close_near()
        os.close(self._blobs)


@pytest.fixture
async def brood(nest: Nest, tmp_path: Path) -> AsyncIterator[Brood]:
    brood = Brood(nest.zygote.fork, tmp_path)
    yield brood
    await brood.close()


# --- what it says ----------------------------------------------------------------------------------------------


async def test_the_first_message_has_settings_catalogue_and_versions(nest: Nest) -> None:
    ready = nest.ready
    assert ready.settings_module == PROJECT.settings_module
    assert ready.settings["LIMITS"]["stop_grace_seconds"] == 3.0
    assert "testserver" in ready.allowed_hosts
    assert set(ready.versions) == {"bulkhead", "django", "python"}
    assert (ready.unapplied, ready.database_error) == ([], "")
    tasks = {task.name: task for task in ready.catalogue}
    assert tasks["proj.add"].parameters["required"] == ["a", "b"]
    assert tasks["proj.add"].doc.startswith("Return the sum")
    assert nest.zygote.child.state is ProcessState.RUNNING


async def test_it_has_one_thread_and_a_session_of_its_own(nest: Nest) -> None:
    process = psutil.Process(nest.zygote.child.pid)
    assert process.num_threads() == 1
    assert os.getsid(process.pid) == process.pid


async def test_cancelling_ends_it(deadline: Limit) -> None:
    zygote = Zygote(PROJECT)
    with deadline(BOOT):
        async with trio.open_nursery() as nursery:
            await nursery.start(zygote.run)
            process = psutil.Process(zygote.child.pid)
            nursery.cancel_scope.cancel()
    assert not process.is_running()


# --- what it forks ---------------------------------------------------------------------------------------------


async def test_two_runners_of_one_order_are_our_children_and_say_hello(nest: Nest, brood: Brood) -> None:
    first, second = await brood.fork(["r-1", "r-2"])
    assert await brood.hello(0) == Hello(runner="r-1", pid=first.pid)
    assert await brood.hello(1) == Hello(runner="r-2", pid=second.pid)
    for child in (first, second):
        process = psutil.Process(child.pid)
        assert process.ppid() == os.getpid()
        assert os.getsid(child.pid) == nest.zygote.child.pid
        assert os.getpgid(child.pid) == child.pid
    assert nest.zygote.births == 0


async def test_many_orders_at_once_each_get_their_own(brood: Brood, nest: Nest, deadline: Limit) -> None:
    with deadline(30):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(brood.fork, [f"{number}-a", f"{number}-b"])
            await trio.testing.wait_all_tasks_blocked()
            assert nest.zygote.births == 5
    assert nest.zygote.births == 0
    assert len({child.pid for child in brood.children}) == 10
    said = [await brood.hello(index) for index in range(10)]
    assert [(hello.runner, hello.pid) for hello in said] == [(c.name, c.pid) for c in brood.children]


async def test_runners_outlive_their_zygote_and_pending_forks_fail(
    nest: Nest, brood: Brood, deadline: Limit
) -> None:
    first, second = await brood.fork(["r-1", "r-2"])
    await brood.hello(0)
    await brood.hello(1)
    os.kill(nest.zygote.child.pid, signal.SIGSTOP)
    failures: list[str] = []

    async def fork() -> None:
        with pytest.raises(ForkError) as caught:
            await brood.fork(["r-3"])
        failures.append(str(caught.value))

    with deadline(4):  # less than a fork may take: the death itself is the answer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fork)
            nursery.start_soon(fork)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(nest.zygote.child.pid, signal.SIGKILL)
        await nest.gone.wait()
        with pytest.raises(ForkError):  # and so it is for whoever comes late
            await brood.fork(["r-4"])
    assert failures == ["the zygote is gone"] * 2
    assert str(nest.zygote.child.exit) == "SIGKILL"
    assert nest.zygote.births == 0
    for child in (first, second):
        assert psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE


async def test_a_zygote_that_does_not_answer_is_killed(
    nest: Nest, brood: Brood, deadline: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FORK_SECONDS", 0.1)
    os.kill(nest.zygote.child.pid, signal.SIGSTOP)
    with deadline(10):
        with pytest.raises(ForkError, match="did not answer"):
            await brood.fork(["r-1"])
        await nest.gone.wait()
    assert str(nest.zygote.child.exit) == "SIGKILL"


async def test_a_cancelled_fork_is_a_birth_no_more(nest: Nest, brood: Brood) -> None:
    os.kill(nest.zygote.child.pid, signal.SIGSTOP)
    with trio.move_on_after(0.05):
        await brood.fork(["r-1"])
    assert nest.zygote.births == 0


# --- how it fails ----------------------------------------------------------------------------------------------


def project(folder: Path, settings: str) -> Config:
    """Return a project with these settings on top of those of tests.project."""
    (folder / "their_settings.py").write_text(
        "from tests.project.settings import *\n" + textwrap.dedent(settings)
    )
    return Config(settings_module="their_settings", path=(str(folder), str(helpers.ROOT)))


async def fails(config: Config) -> str:
    """Return why this project's zygote is never ready."""
    with trio.fail_after(BOOT):
        async with trio.open_nursery() as nursery:
            with pytest.raises(NeverReady) as caught:  # itself, not in a group
                await nursery.start(Zygote(config).run)
    return str(caught.value)


async def test_a_project_that_cannot_be_imported_says_why_in_full(tmp_path: Path) -> None:
    words = await fails(project(tmp_path, "def careless():\n    return 1 / 0\ncareless()\n"))
    assert words.startswith("their_settings: ZeroDivisionError: division by zero")
    assert "Traceback (most recent call last)" in words
    assert 'their_settings.py", line 3, in careless' in words


async def test_a_settings_module_that_does_not_exist_is_named(tmp_path: Path) -> None:
    words = await fails(Config(settings_module="no.such.settings", path=(str(helpers.ROOT),)))
    assert "no.such.settings" in words
    assert "No module named 'no'" in words


async def test_a_wrong_setting_is_named_with_its_value(tmp_path: Path) -> None:
    words = await fails(project(tmp_path, "TASKKIT = {'LIMITS': {'connections': 'many'}}"))
    assert "LIMITS.connections" in words
    assert "'many'" in words


async def test_a_project_that_dies_at_import_says_how(tmp_path: Path) -> None:
    words = await fails(project(tmp_path, "import os\nos._exit(5)\n"))
    assert "died while it imported the project (exit code 5)" in words


async def test_a_project_that_hangs_at_import_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "READY_SECONDS", 0.5)
    words = await fails(project(tmp_path, "import time\ntime.sleep(60)\n"))
    assert "importing their_settings took longer" in words


async def test_a_thread_that_stays_is_no_ground_to_fork_from(tmp_path: Path) -> None:
    words = await fails(
        project(
            tmp_path,
            "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), name='lingers').start()\n",
        )
    )
    assert "not fork-safe" in words
    assert "lingers" in words


# --- its keeper ------------------------------------------------------------------------------------------------


async def test_the_keeper_goes_on_trying_while_the_project_is_broken(
    nursery_of_zygotes: trio.Nursery, tmp_path: Path, deadline: Limit, caplog: pytest.LogCaptureFixture
) -> None:
    switch = tmp_path / "broken"
    config = project(
        tmp_path, f"import os\nif os.path.exists({str(switch)!r}): raise RuntimeError('half edited')\n"
    )
    first, up = Zygote(config), trio.Event()
    with deadline(2 * BOOT), caplog.at_level(logging.WARNING):
        ready = await nursery_of_zygotes.start(first.run)
        keeper = ZygoteKeeper(config, first, ready, nursery_of_zygotes, up.set)
        nursery_of_zygotes.start_soon(keeper.run)
        switch.touch()
        first.child.send_signal(signal.SIGKILL)
        while caplog.text.count("half edited") < 2:
            assert not up.is_set()
            await trio.sleep(0.02)
        switch.unlink()
        await up.wait()
        assert keeper.restarts == 1
        assert keeper.child.state is ProcessState.RUNNING
        brood = Brood(keeper.fork, tmp_path)
        await brood.fork(["r-1"])
        await brood.hello(0)
        await brood.close()


async def test_a_zygote_that_is_still_importing_is_known(
    nest: Nest, nursery_of_zygotes: trio.Nursery, deadline: Limit
) -> None:
    up = trio.Event()
    keeper = ZygoteKeeper(PROJECT, nest.zygote, nest.ready, nursery_of_zygotes, up.set)
    nursery_of_zygotes.start_soon(keeper.run)
    strangers = linux.children() - {nest.zygote.child.pid}
    assert linux.children() - strangers == keeper.pids
    nest.zygote.child.send_signal(signal.SIGKILL)
    with deadline(BOOT):
        while not up.is_set():
            # What sweeps strays looks at any moment: whoever is not in `pids` is killed.
            assert linux.children() - strangers <= keeper.pids | {nest.zygote.child.pid}
            await trio.sleep(0.01)
    assert keeper.pids == {keeper.child.pid}


async def test_a_keeper_that_stops_makes_no_successor(
    nest: Nest, nursery_of_zygotes: trio.Nursery, deadline: Limit
) -> None:
    keeper = ZygoteKeeper(PROJECT, nest.zygote, nest.ready, nursery_of_zygotes, lambda: None)
    keeper.stopping = True
    nest.zygote.child.send_signal(signal.SIGTERM)
    with deadline(5):
        await keeper.run()
    assert keeper.restarts == 0
