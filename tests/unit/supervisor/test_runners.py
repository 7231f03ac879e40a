"""A runner's descriptors from birth until drained, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator, Sequence

import pytest
import trio

from supervisor import runners as room
from supervisor.runners import open_ends
from supervisor.zygote_client import ForkError
from taskkit import linux, seqpacket
from taskkit.lifecycle import ProcessEvent, ProcessState
from taskkit.settings import PoolSettings
from taskkit.wire.codec import unpack_runner_frame
from taskkit.wire.framing import PIPE_SIZE, read_frames
from taskkit.wire.messages import Hello, RunnerSpec
from tests.unit.supervisor.conftest import LEAVES, WAITS, Family, program

pytestmark = pytest.mark.usefixtures("leaves_nothing")


# --- the ends --------------------------------------------------------------------------------------------------


def test_the_ends_are_two_pipes_a_socket_and_a_file() -> None:
    ends = open_ends()
    for near, far in zip(ends.near[:2], ends.far[:2], strict=True):
        os.write(far, b"forth")
        assert os.read(near, 10) == b"forth"
    os.write(ends.near[2], b"order")
    assert os.read(ends.far[2], 10) == b"order"
    assert "bulkhead-faults" in os.readlink(f"/proc/self/fd/{ends.faults}")
    assert ends.pipe_size == linux.set_pipe_size(ends.far[0], PIPE_SIZE)
    assert not any(os.get_inheritable(fd) for fd in (*ends.near, *ends.far, ends.faults))
    ends.close_far()
    ends.close_near()


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Allow five more descriptors than are open: not enough for one runner."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/dev/null", os.O_RDONLY)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 5, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_descriptors_leave_none_open(few_descriptors: None) -> None:
    for _ in range(20):  # a leak would end differently from the second time on
        with pytest.raises(OSError) as caught:
            open_ends()
        assert caught.value.errno == errno.EMFILE


# --- birth -----------------------------------------------------------------------------------------------------


async def test_every_spec_has_a_name_of_its_own(family: Family) -> None:
    assert len({spec.id for spec in family.specs(50)}) == 50


async def test_a_spec_carries_the_pools_wishes(family: Family) -> None:
    settings = PoolSettings(concurrency=3, runs=9, loop="trio", nice=7, memory_limit=10**9, cpu_limit=60)
    spec = family.runners.spec("heavy", settings, intake=False)
    assert (spec.pool, spec.role, spec.concurrency, spec.runs, spec.loop) == ("heavy", "runner", 3, 9, "trio")
    assert (spec.nice, spec.memory_limit, spec.cpu_limit) == (7, 10**9, 60)
    assert spec.event_limit == family.runners.settings.limits.event_bytes
    assert spec.result_limit == family.runners.settings.limits.result_bytes
    assert family.runners.spec("intake", settings, intake=True).role == "intake"


async def test_a_new_runner_is_announced_once_it_exists(family: Family) -> None:
    runner = await family.bear(WAITS)
    assert family.up == [runner]
    assert family.runners.living("default") == [runner]
    assert family.runners.living("other") == []
    assert runner.child.state is ProcessState.STARTING, "until the gateway has heard its hello"
    assert family.runners.starting
    runner.child.happen(ProcessEvent.READY)
    assert not family.runners.starting
    up = runner.announcement(adopted=True)
    assert (up.spec.id, up.pid, up.adopted) == (runner.spec.id, runner.child.pid, True)
    assert up.spec.pipe_size == runner.ends.pipe_size


async def test_each_runner_gets_its_own_five_in_order(family: Family) -> None:
    seen: list[int] = []

    async def fork(specs: Sequence[RunnerSpec], fds: Sequence[int]) -> list[tuple[int, int]]:
        seen.extend(fds)
        assert len(fds) == 5 * len(specs)
        for index in range(len(specs)):
            events, output, _, faults, blobs = fds[5 * index : 5 * index + 5]
            os.write(events, f"events {index}".encode())
            os.write(output, f"output {index}".encode())
            assert "faults" in os.readlink(f"/proc/self/fd/{faults}")
            assert os.readlink(f"/proc/self/fd/{blobs}").endswith("/blobs")
        return [program(WAITS) for _ in specs]

    await family.runners.fork(fork, family.specs(3))
    for index, runner in enumerate(family.up):
        assert os.read(runner.ends.near[0], 100) == f"events {index}".encode()
        assert os.read(runner.ends.near[1], 100) == f"output {index}".encode()
        assert runner.ends.far == (seen[5 * index], seen[5 * index + 1], seen[5 * index + 2])


async def test_the_far_ends_are_the_runners_alone(family: Family) -> None:
    runner = await family.bear(WAITS)  # which did not keep them
    assert os.read(runner.ends.near[0], 1) == b"", "nobody else holds the writing end"


@pytest.mark.parametrize("error", [ForkError("no"), OSError(errno.EAGAIN, "no"), None])
async def test_a_birth_that_fails_leaves_nothing(family: Family, error: Exception | None) -> None:
    async def fork(specs: Sequence[RunnerSpec], fds: Sequence[int]) -> list[tuple[int, int]]:
        if error is not None:
            raise error
        await trio.sleep_forever()  # until cancelled
        raise AssertionError

    before = len(os.listdir("/proc/self/fd"))
    with trio.move_on_after(0.05), contextlib.suppress(ForkError, OSError):
        await family.runners.fork(fork, family.specs(3))
    assert family.up == []
    assert family.runners.all == {}
    assert len(os.listdir("/proc/self/fd")) == before + 1, "the blob directory stays for the next"


async def test_no_room_for_the_second_closes_the_first(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[room.Ends] = []

    def scarce() -> room.Ends:
        if made:
            raise OSError(errno.EMFILE, "too many open files")
        made.append(open_ends())
        return made[-1]

    async def fork(specs: Sequence[RunnerSpec], fds: Sequence[int]) -> list[tuple[int, int]]:
        raise AssertionError("nothing to fork with")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(room, "open_ends", scarce)
    with pytest.raises(OSError, match="too many"):
        await family.runners.fork(fork, family.specs(2))
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_spawned_runner_speaks_as_a_forked_one(family: Family) -> None:
    (spec,) = family.specs(1)
    family.runners.spawn(spec)
    (runner,) = family.up
    with trio.fail_after(30):
        await trio.lowlevel.wait_readable(runner.ends.near[0])
    (frame,) = read_frames(os.read(runner.ends.near[0], 65536))
    assert unpack_runner_frame(frame) == Hello(runner=spec.id, pid=runner.child.pid)


# --- death -----------------------------------------------------------------------------------------------------


async def test_a_death_is_told_with_its_cause(family: Family) -> None:
    runner = await family.wait_dead(await family.bear(LEAVES))
    assert runner.exited is not None
    assert (runner.exited.runner, runner.exited.cause.kind) == (runner.spec.id, "exit")
    assert runner.exited.cause.exit_code == 5
    assert runner.exited.cause.max_rss > 0
    assert family.runners.living("default") == []
    assert runner.spec.id in family.runners.all, "until it is drained"


async def test_what_faulthandler_wrote_is_told(family: Family) -> None:
    runner = await family.bear(WAITS)
    os.write(runner.ends.faults, b"Fatal Python error: \xff\n" + b"x" * 100_000)
    runner.child.send_signal(signal.SIGSEGV)
    await family.wait_dead(runner)
    assert runner.exited is not None
    text = runner.exited.cause.traceback
    assert text.startswith("Fatal Python error: \N{REPLACEMENT CHARACTER}\n")
    assert len(text) <= 16 * 1024, "a runner cannot fill the supervisor's memory"


async def test_what_a_dead_runner_wrote_can_still_be_read(family: Family) -> None:
    writers: list[int] = []

    async def fork(specs: Sequence[RunnerSpec], fds: Sequence[int]) -> list[tuple[int, int]]:
        writers.append(os.dup(fds[0]))
        return [program(LEAVES)]

    await family.runners.fork(fork, family.specs(1))
    os.write(writers[0], b"last words")
    seqpacket.close_all(writers)
    runner = await family.wait_dead(family.up[0])
    assert os.read(runner.ends.near[0], 100) == b"last words"


async def test_drained_lets_the_descriptors_go_and_the_runner(family: Family) -> None:
    runner = await family.wait_dead(await family.bear(LEAVES))
    near = runner.ends.near
    assert family.runners.drained(runner.spec.id) is runner
    assert family.runners.all == {}
    for fd in near:
        with pytest.raises(OSError):
            os.fstat(fd)
    assert family.runners.drained(runner.spec.id) is None


async def test_a_living_runner_cannot_be_drained(family: Family) -> None:
    runner = await family.bear(WAITS)
    assert family.runners.drained(runner.spec.id) is None
    assert os.fstat(runner.ends.near[0])
    assert family.runners.drained("nobody") is None
