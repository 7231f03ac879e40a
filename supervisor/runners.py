"""All runners of the tree: their descriptors from birth until the gateway has drained them."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

import msgspec
import trio

from supervisor import handover, memory
from supervisor.causes import Death, classify
from supervisor.child import Child, Exit, spawn
from supervisor.config import Config
from supervisor.handover import HeldRunner
from taskkit import failpoints, linux, seqpacket
from taskkit.lifecycle import ProcessEvent, ProcessState
from taskkit.settings import PoolSettings, Settings
from taskkit.wire.codec import pack
from taskkit.wire.framing import PIPE_SIZE
from taskkit.wire.messages import Cause, Exited, Fork, RunnerSpec, RunnerUp

logger = logging.getLogger("bulkhead.supervisor")

#: Forks: takes specs with their descriptors, returns pid and pidfd of each.
ForkFunction = Callable[[Sequence[RunnerSpec], Sequence[int]], Awaitable[list[tuple[int, int]]]]

#: Bytes of a fatal signal's traceback that are kept.
_FAULT_BYTES: Final = 16 * 1024

#: Bytes asked for the output pipe.
_OUTPUT_SIZE: Final = 64 * 1024


@dataclass(slots=True)
class Ends:
    """One runner's descriptors: the far ones go to the runner, the near ones stay here and go to each gateway."""

    near: tuple[int, int, int]
    far: tuple[int, int, int]
    faults: int
    pipe_size: int

    def close_far(self) -> None:
        """The runner has them now."""
        seqpacket.close_all(list(self.far))

    def close_near(self) -> None:
        """Nobody will read them any more."""
        seqpacket.close_all([*self.near, self.faults])


def open_ends() -> Ends:
    """Make the pipes, the socket and the fault file of one runner.

    Raises:
      OSError: EMFILE or ENFILE; nothing is left open.
    """
    opened: list[int] = []
    try:
        events = os.pipe2(os.O_CLOEXEC)
        opened += events
        output = os.pipe2(os.O_CLOEXEC)
        opened += output
        gateway_side, runner_side = linux.seqpacket_pair()
        orders = (gateway_side.detach(), runner_side.detach())
        opened += orders
        faults = os.memfd_create("bulkhead-faults", os.MFD_CLOEXEC)
        opened.append(faults)
        size = linux.set_pipe_size(events[1], PIPE_SIZE)
        linux.set_pipe_size(output[1], _OUTPUT_SIZE)
    except BaseException:
        seqpacket.close_all(opened)
        raise
    return Ends((events[0], output[0], orders[0]), (events[1], output[1], orders[1]), faults, size)


@dataclass(slots=True)
class Runner:
    """One runner.

    Attributes:
      retired: the gateway has given it its last run.
      used: the gateway has given it a run at all.
      outdated: it is of older code and is to get no further run.
      judged: it has been decided whether its pool has to wait for its death.
      ordered: cause to report when the supervisor ends it.
    """

    spec: RunnerSpec
    child: Child
    ends: Ends
    started_at: float
    retired: bool = False
    used: bool = False
    outdated: bool = False
    judged: bool = False
    ordered: str = ""
    detail: str = ""
    exited: Exited | None = None

    def retire(self) -> None:
        """It gets no further run, so another one may take its place."""
        self.retired = True
        if self.child.state is ProcessState.RUNNING:
            self.child.happen(ProcessEvent.DRAIN)

    def greeted(self) -> None:
        """It has said hello."""
        if self.child.ready() and self.retired:
            self.retire()

    def announcement(self, *, adopted: bool) -> RunnerUp:
        """The message that brings it to a gateway."""
        return RunnerUp(
            spec=self.spec,
            pid=self.child.pid,
            started_at=self.started_at,
            adopted=adopted,
            retiring=self.retired,
        )

    def hold(self) -> HeldRunner:
        """Return it for another image of this program."""
        return HeldRunner(
            child=handover.hold(self.child),
            near=self.ends.near,
            faults=self.ends.faults,
            pipe_size=self.ends.pipe_size,
            **{name: getattr(self, name) for name in _KEPT},
        )


#: What an upgrade hands over of a runner as it is.
_KEPT: Final = sorted({field.name for field in fields(Runner)} & {*HeldRunner.__struct_fields__} - {"child"})


def _of(held: HeldRunner) -> Runner:
    return Runner(
        child=held.child.child(),
        ends=Ends(held.near, (-1, -1, -1), held.faults, held.pipe_size),
        **{name: getattr(held, name) for name in _KEPT},
    )


@dataclass(slots=True)
class Runners:
    """The runners by id, from birth until drained.

    Args:
      on_up, on_exit: told synchronously.
    """

    config: Config
    settings: Settings
    state_dir: Path
    nursery: trio.Nursery
    on_up: Callable[[Runner], None]
    on_exit: Callable[[Runner], None]
    all: dict[str, Runner] = field(default_factory=dict)
    _prefix: str = field(default_factory=lambda: secrets.token_hex(3))
    _count: int = 0
    _blobs: int = -1
    _generation: int = 0
    _oom: memory.OomCounter = field(default_factory=memory.OomCounter)

    def spec(self, pool: str, settings: PoolSettings, *, intake: bool) -> RunnerSpec:
        """Return the spec of the next runner of a pool; with `intake` it saves rows instead of performing runs."""
        self._count += 1
        return RunnerSpec(
            id=f"{self._prefix}-{self._count}",
            pool=pool,
            role="intake" if intake else "runner",
            concurrency=settings.concurrency,
            runs=settings.runs,
            loop=settings.loop,
            nice=settings.nice,
            memory_limit=settings.memory_limit,
            cpu_limit=settings.cpu_limit,
            event_limit=self.settings.limits.event_bytes,
            result_limit=self.settings.limits.result_bytes,
        )

    @property
    def starting(self) -> bool:
        """Whether some runner has not said hello yet."""
        return any(runner.child.state is ProcessState.STARTING for runner in self.all.values())

    def living(self, pool: str) -> list[Runner]:
        """Return the runners of a pool that have not died."""
        return [r for r in self.all.values() if r.spec.pool == pool and r.exited is None]

    async def fork(self, fork: ForkFunction, specs: Sequence[RunnerSpec]) -> None:
        """Have a zygote fork these runners, all by one order, and announce them.

        Raises:
          ForkError: they did not come about; nothing is left behind.
          OSError: no descriptors are left.
        """
        generation = self._generation
        made: list[Ends] = []
        born: list[tuple[int, int]] = []
        try:
            for _ in specs:
                made.append(open_ends())  # noqa: PERF401 - those made so far are closed when the next one fails
            ready = [_with_size(spec, ends) for spec, ends in zip(specs, made, strict=True)]
            fds = [fd for ends in made for fd in (*ends.far, ends.faults, self._blob_directory())]
            failpoints.hit("fork.ordered")
            born = await fork(ready, fds)
            failpoints.hit("fork.born")
        except BaseException:
            seqpacket.close_all([pidfd for _, pidfd in born])
            for ends in made:
                ends.close_far()
                ends.close_near()
            raise
        for spec, ends, (pid, pidfd) in zip(ready, made, born, strict=True):
            self._register(spec, ends, Child(spec.id, pid, pidfd, group=True), generation)

    def spawn(self, spec: RunnerSpec) -> None:
        """Start one runner by exec, for pools whose libraries do not survive a fork.

        Raises:
          OSError: no descriptors or processes are left.
        """
        ends = open_ends()
        spec = _with_size(spec, ends)
        try:
            child = spawn_role(
                self.config,
                f"{spec.role} {spec.id}",
                Fork(ask=0, runners=[spec]),
                (*ends.far, ends.faults, self._blob_directory()),
            )
        except BaseException:
            ends.close_far()
            ends.close_near()
            raise
        self._register(spec, ends, child, self._generation)

    def _blob_directory(self) -> int:
        if self._blobs == -1:
            self._blobs = os.open(self.state_dir / "blobs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self._blobs

    def _register(self, spec: RunnerSpec, ends: Ends, child: Child, generation: int) -> None:
        ends.close_far()
        outdated = generation != self._generation  # the code was exchanged while it was born
        runner = Runner(spec, child, ends, time.time(), retired=outdated, outdated=outdated)
        self.all[spec.id] = runner
        self.nursery.start_soon(self._await_death, runner)
        failpoints.hit("runner.registered")
        self.on_up(runner)

    def keep(self, held: Sequence[HeldRunner]) -> None:
        """Go on with the runners of the image before; the gateway knows them."""
        for runner in map(_of, held):
            self.all[runner.spec.id] = runner
            if runner.exited is None:
                self.nursery.start_soon(self._await_death, runner)

    async def _await_death(self, runner: Runner) -> None:
        left = await runner.child.wait()
        runner.exited = Exited(runner=runner.spec.id, cause=self._cause(runner, left))
        failpoints.hit("runner.reaped")
        self.on_exit(runner)

    def _cause(self, runner: Runner, left: Exit) -> Cause:
        faults = linux.read_from_start(runner.ends.faults, _FAULT_BYTES).decode("utf-8", "replace")
        return classify(
            Death(
                status=left.status,
                max_rss=left.max_rss,
                cpu=left.cpu,
                ordered=runner.ordered,
                detail=runner.detail,
                faults=faults,
                oom_kills=self._oom.since_last(),
                memory_pressure=memory.is_scarce(),
                cpu_limit=runner.spec.cpu_limit,
            )
        )

    def outdate(self) -> list[str]:
        """The code has been exchanged: no runner that exists, or is being born, gets a further run.

        Return the ids of those that live.
        """
        self._generation += 1
        living = [runner for runner in self.all.values() if runner.exited is None]
        for runner in living:
            runner.outdated = True
            runner.retire()
        return [runner.spec.id for runner in living]

    def drained(self, id: str) -> Runner | None:
        """The gateway has committed and consumed everything of a dead runner: let its descriptors go."""
        runner = self.all.get(id)
        if runner is None or runner.exited is None:
            return None
        failpoints.hit("runner.drained")
        del self.all[id]
        runner.ends.close_near()
        return runner

    def close(self) -> None:
        """Let go of every descriptor."""
        for runner in self.all.values():
            runner.ends.close_near()
        self.all.clear()
        if self._blobs != -1:
            os.close(self._blobs)
            self._blobs = -1


def _with_size(spec: RunnerSpec, ends: Ends) -> RunnerSpec:
    return msgspec.structs.replace(spec, pipe_size=ends.pipe_size)


def spawn_role(config: Config, name: str, order: Fork, fds: Sequence[int]) -> Child:
    """Start a child by exec that becomes what `order` says."""
    ours, theirs = linux.seqpacket_pair()
    options = {
        "settings_module": config.settings_module,
        "path": list(config.path),
        "supervisor": os.getpid(),
        "name": name,
    }
    with ours, theirs:
        # Before the child exists: the packet waits in its socket while it imports the project.
        seqpacket.send(ours, pack(order), tuple(fds))
        return spawn(
            name,
            "taskkit.zygote.spawned",
            [str(theirs.fileno()), json.dumps(options)],
            [theirs.fileno()],
            session=True,
        )
