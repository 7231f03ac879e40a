"""Each guard taken out of a tree, in a scenario that passes with it: the judge has to find the harm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest
import trio

from taskkit import linux
from tests import helpers
from tests.chaos.arming import Armed, signal_process
from tests.chaos.mutation.mutants import MUTANTS
from tests.chaos.scenario import SETTLE_SECONDS, Case, Sort
from tests.chaos.world import free_port

#: Seconds for everything to end in a scenario without its guard: what a mutant has lost never does.
PATIENCE: Final = 6.0

#: Where the mutated modules are loaded from.
FOLDER: Final = Path(__file__).parent / "mutation"

TICKS: Final = Sort("chaos_ticks", 60, 0.02)
SHORT: Final = Sort("chaos_ticks", 3)


# --- scenarios: each returns what the judge cannot know -----------------------------------------------------------


async def killed_while_speaking(case: Case, armed: Armed, point: str) -> list[str]:
    """The gateway dies at a moment of a run that a client sees already."""
    it = case.submit(TICKS)
    await case.until_seen(it, 5)
    return await _killed_at(armed, point)


async def killed_at_the_end(case: Case, armed: Armed, point: str) -> list[str]:
    """The gateway dies in the round in which a run ends."""
    it = case.submit(Sort("chaos_ticks", 10, 0.05))
    await case.until_seen(it, 3)
    return await _killed_at(armed, point)


async def killed_at_birth(case: Case, armed: Armed, point: str) -> list[str]:
    """The gateway dies in a round that a submission leads to."""
    armed.arm(point, "kill")
    case.submit(SHORT)
    await trio.to_thread.run_sync(armed.await_act, point)
    return []


async def courier_killed(case: Case, armed: Armed, point: str) -> list[str]:
    """The courier dies at a moment of an outbox entry."""
    armed.arm(point, "kill")
    case.submit(Sort("chaos_ticks", 3, way="django"))
    await trio.to_thread.run_sync(armed.await_act, point)
    return []


async def forged(case: Case, armed: Armed, point: str) -> list[str]:
    """A task writes frames with a token that is not its own."""
    case.submit(Sort("chaos_forges", 5))
    return []


async def supervisor_stopped(case: Case, armed: Armed, point: str) -> list[str]:
    """A runner dies, and for a while nobody says of what."""
    armed.arm(point, "stop")
    it = case.submit(Sort("chaos_segfaults", 3, expected=frozenset({"FAILED"})))
    pid = await trio.to_thread.run_sync(armed.await_act, point)
    await trio.sleep(0.5)
    signal_process(pid, signal.SIGCONT)
    await case.until(lambda: it.run in case.clients.ended, PATIENCE, "the end of the run")
    status, snapshot = await case.ask("GET", f"/api/v1/runs/{it.run}")
    endings = [attempt["ending"] for attempt in snapshot["attempts"]] if status == 200 else []
    return [] if endings == ["crashed"] else [f"wrong ending: a segfault is told as {endings}"]


async def killed_with_a_full_pipe(case: Case, armed: Armed, point: str) -> list[str]:
    """A runner is killed that has said more than one round holds, while nobody listened."""
    it = case.submit(
        Sort("chaos_ticks", 5_000, expected=frozenset({"FAILED"}), options=(("max_attempts", 1),))
    )
    await case.until_seen(it, 5)
    runner = next(pid for pid, run in case.clients.running.items() if run == it.run)
    gateway = armed.pid("gateway")
    signal_process(gateway, signal.SIGSTOP)
    await trio.sleep(0.3)  # it fills its pipe: 256 KiB
    signal_process(runner, signal.SIGKILL)
    await trio.sleep(0.2)
    signal_process(gateway, signal.SIGCONT)
    return []


async def gateway_stopped(case: Case, armed: Armed, point: str) -> list[str]:
    """A gateway stands still for good."""
    it = case.submit(TICKS)
    await case.until_seen(it, 5)
    signal_process(armed.pid("gateway"), signal.SIGSTOP)
    await case.be_healthy(4.0)
    return []


async def supervisor_killed(case: Case, armed: Armed, point: str) -> list[str]:
    """The supervisor dies, and another begins."""
    it = case.submit(TICKS)
    await case.until_seen(it, 5)
    signal_process(armed.tree.pid, signal.SIGKILL)
    armed.tree.process.wait()
    await trio.to_thread.run_sync(armed.revive)
    return []


async def gateway_left_behind(case: Case, armed: Armed, point: str) -> list[str]:
    """The gateway of a supervisor that was killed stands still while another tree begins, then goes on."""
    it = case.submit(Sort("chaos_ticks", 400, 0.01))
    await case.until_seen(it, 5)
    left = armed.pid("gateway")
    size = armed.log.stat().st_size
    signal_process(left, signal.SIGSTOP)
    await trio.sleep(0.1)  # the runner goes on speaking
    signal_process(armed.tree.pid, signal.SIGKILL)
    armed.tree.process.wait()
    armed.move()
    case.move()
    armed.arm(point, "stop")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, armed.revive)
        with trio.move_on_after(4.0):  # with the lock, it comes to this moment only when the other has left
            while not armed.acted(point):
                await trio.sleep(0.02)
        signal_process(left, signal.SIGCONT)
        with trio.move_on_after(4.0):
            while _lives(left):
                await trio.sleep(0.02)
        pid = await trio.to_thread.run_sync(armed.await_act, point)
        signal_process(pid, signal.SIGCONT)
    said = armed.log.read_bytes()[size:].decode(errors="replace")
    return [f"two writers: {line}" for line in said.splitlines() if "IntegrityError" in line][:1]


async def second_supervisor(case: Case, armed: Armed, point: str) -> list[str]:
    """Somebody starts another tree on the same state directory."""
    it = case.submit(TICKS)
    await case.until_seen(it, 5)
    command = [*armed.tree.command(), "--bind", f"127.0.0.1:{free_port()}"]
    environment = armed.tree.environment()

    def start() -> int | None:
        with (armed.folder / "second.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=helpers.ROOT
            )
            try:
                return process.wait(4.0)
            except subprocess.TimeoutExpired:
                return None
            finally:
                process.kill()
                process.wait()

    code = await trio.to_thread.run_sync(start)
    return [] if code == 3 else [f"two supervisors: the second one left with {code}, not with exit code 3"]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def _killed_at(armed: Armed, point: str) -> list[str]:
    armed.arm(point, "kill")
    await trio.to_thread.run_sync(armed.await_act, point)
    return []


# --- which scenario needs which guard -----------------------------------------------------------------------------

Scenario = Callable[[Case, Armed, str], Awaitable[list[str]]]


class Trial(NamedTuple):
    """A scenario that harms a tree without one guard.

    Attributes:
      point: the moment it arms.
      rule: the promise that is broken then; see tests/chaos/checker.py.
    """

    scenario: Scenario
    point: str
    rule: str


TRIALS: Final = {
    "plain read": Trial(killed_while_speaking, "decided.event", "undelivered"),
    "no source row": Trial(killed_while_speaking, "consumed.event", "undelivered"),
    "no skipping": Trial(killed_while_speaking, "committed.event", "duplicate"),
    "no store lock": Trial(gateway_left_behind, "gateway.opened", "two writers"),
    "no state lock": Trial(second_supervisor, "", "two supervisors"),
    "no fence": Trial(forged, "", "changed"),
    "no kill and confirm": Trial(gateway_stopped, "", "trouble"),
    "Start before assignment": Trial(killed_at_birth, "decided.assign", "ghost"),
    "broadcast before commit": Trial(killed_at_the_end, "decided.end", "changed"),
    "answer before commit": Trial(killed_at_birth, "decided.accept", "lost"),
    "EOF as the end": Trial(supervisor_stopped, "runner.reaped", "wrong ending"),
    "death as the end": Trial(killed_with_a_full_pipe, "", "undelivered"),
    "Start not repeated": Trial(killed_at_birth, "committed.assign", "never ended"),
    "nothing is lost": Trial(supervisor_killed, "", "never ended"),
    "outbox settled unanswered": Trial(courier_killed, "courier.read", "lost"),
}


async def judge(armed: Armed, trial: Trial, seed: str, patience: float) -> list[str]:
    """Return the broken promises of one trial on one tree; what takes longer than `patience` seconds is broken."""
    async with trio.open_nursery() as nursery:
        case = Case(armed, nursery, seed)
        extra = await trial.scenario(case, armed, trial.point)
        await case.settle(patience)
        nursery.cancel_scope.cancel()
    return [*extra, *case.violations()]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Armed]:
    """Give a tree with all its guards."""
    linux.set_subreaper()
    with Armed() as running:
        yield running
        assert running.stop() == 0


def mutated(name: str) -> Armed:
    """Return a tree without one of its guards; not started."""
    path = os.pathsep.join((os.fspath(FOLDER), os.fspath(helpers.ROOT)))
    return Armed(env={"PYTHONPATH": path, "BULKHEAD_MUTANT": name})


def test_every_mutant_has_its_trial() -> None:
    assert TRIALS.keys() == MUTANTS.keys()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fits(name: str) -> None:
    """So that a guard that was moved is found in a moment, and not by a tree that does not start."""
    for change in MUTANTS[name]:
        source = (helpers.ROOT / change.module.replace(".", "/")).with_suffix(".py").read_text()
        assert source.count(change.old) == 1, f"{change.module}: {change.old!r}"


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_judge_misses_no_guard(guarded: Armed, name: str) -> None:
    trial = TRIALS[name]
    began = time.monotonic()
    sound = await judge(guarded, trial, name, SETTLE_SECONDS)
    assert sound == [], "\n".join([*sound, "", guarded.tree.tail(3000)])
    halfway = time.monotonic()
    with mutated(name) as armed:
        broken = await judge(armed, trial, name, PATIENCE)
        log = armed.tree.tail(3000)
    print(f"{name}: {halfway - began:.1f} s with, {time.monotonic() - halfway:.1f} s without: {broken[:4]}")
    assert any(it.startswith(f"{trial.rule}:") for it in broken), "\n".join([*broken, "", log])
