"""One chaos run from the first process to the verdict."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from taskkit import linux
from tests.chaos import aftermath
from tests.chaos.checker import TERMINAL, check, recovery
from tests.chaos.clients import Clients
from tests.chaos.django_link import DjangoLink
from tests.chaos.exchange import BROKEN, ask
from tests.chaos.faults import Saboteur
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.plan import KINDS, Kind, make_plan
from tests.chaos.report import Report
from tests.chaos.world import World, descriptors_of
from tests.processes import open_descriptors

#: Runs submitted a second: what two cores perform beside the harness while they are attacked.
LOAD_RATE: Final = 6.0

#: Seconds that everything may take to come to rest. A run that was lost four times waits 60 s for its next attempt.
SETTLE_SECONDS: Final = 90.0

#: Seconds for clients to reach the end of their streams; a stalled one sleeps 13.
_CATCH_UP_SECONDS: Final = 40.0

#: Seconds for Django's database to hear of everything.
_PROJECT_SECONDS: Final = 20.0

#: Seconds for a tree that has just started to look after its files.
_TIDY_SECONDS: Final = 10.0

#: Descriptors that a gateway may have more at the end: readers of the store are opened as they are needed.
_SPARE_DESCRIPTORS: Final = 16


@dataclass(kw_only=True)
class Options:
    """What a chaos run is made of.

    Attributes:
      say: is told what happens, line by line.
      keep_log: where to copy the tree's log to when something broke.
    """

    seed: int
    seconds: float = 60.0
    rate: float = 2.0
    load: float = LOAD_RATE
    runners: int = 6
    kinds: Sequence[Kind] = KINDS
    say: Callable[[str], None] = print
    keep_log: Path | None = None
    remarks: list[str] = field(default_factory=list)


async def chaos(options: Options) -> Report:
    """Attack a tree as `options` say; return the report. Leaves nothing behind."""
    linux.set_subreaper()  # whatever loses its parent is ours to see, and to collect
    history = History()
    descriptors = open_descriptors()
    world = World(history, options.runners)
    try:
        return await _Chaos(options, history, world, descriptors).run()
    finally:
        if options.keep_log is not None and world.log.exists():
            options.keep_log.write_bytes(world.log.read_bytes())
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(world.close)


class _Chaos:
    """The steps of one run."""

    def __init__(
        self, options: Options, history: History, world: World, descriptors: set[tuple[int, str]]
    ) -> None:
        self._options = options
        self._history = history
        self._world = world
        self._descriptors = descriptors
        self._django = DjangoLink(world.tree.environment())
        self._token = world.tree.token(ttl=int(options.seconds) + 3600)
        self._clients: Clients
        self._load: Load
        self._at_rest: dict[str, int] = {}

    async def run(self) -> Report:
        options, world = self._options, self._world
        await world.start()
        async with trio.open_nursery() as background:
            background.start_soon(self._collect_orphans)
            background.start_soon(world.keep)
            background.start_soon(self._django.run)
            async with trio.open_nursery() as nursery:
                self._clients = Clients(self._history, world.port, self._token, nursery, options.seed)
                self._load = Load(
                    self._history, self._clients, self._django, world.port, self._token, nursery, options.seed
                )
                await trio.sleep(1.0)
                self._at_rest = self._count()
                missed = await self._attack()
                settled = await self._settle()
                nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await self._end()
            background.cancel_scope.cancel()
        return self._judge(missed, settled)

    async def _attack(self) -> int:
        options = self._options
        plan = make_plan(options.seed, options.seconds, options.rate, self._possible())
        saboteur = Saboteur(self._history, self._world, self._clients, self._load, self._django, options.say)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._load.run, options.load)
            await saboteur.run(plan, options.seconds)
            nursery.cancel_scope.cancel()
        return saboteur.missed

    def _possible(self) -> list[Kind]:
        """Return the kinds that can be injected here; what cannot is remarked."""
        kinds = list(self._options.kinds)
        if not self._world.disk.mounted and (left_out := [it for it in kinds if it.name == "full-disk"]):
            kinds.remove(left_out[0])
            self._options.remarks.append(
                "full-disk was left out: mounting is not allowed here; full-file (RLIMIT_FSIZE) was not"
            )
        return kinds

    async def _collect_orphans(self) -> None:
        """Collect what the death of a supervisor has made our child, as init would."""
        while True:
            await trio.sleep(0.1)
            for pid in linux.children() - self._world.harness_children - self._django.pids:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  (does not wait)

    def _count(self) -> dict[str, int]:
        pids = self._world.pids("gateway")
        return {
            "processes": sum(len(self._world.pids(role)) for role in ("gateway", "zygote", "courier")),
            "descriptors of the gateway": sum(map(descriptors_of, pids)),
            "descriptors of the supervisor": sum(map(descriptors_of, self._world.pids("supervisor"))),
        }

    # --- coming to rest ------------------------------------------------------------------------------------

    async def _settle(self) -> float:
        """Wait until nothing is open any more; return how long that took. What stays open is the judge's."""
        began = trio.current_time()
        self._options.say("the attack is over; everything may come to rest")
        with trio.move_on_after(SETTLE_SECONDS):
            while not await self._is_at_rest():
                await trio.sleep(0.25)
        settled = trio.current_time() - began
        if settled >= SETTLE_SECONDS:
            self._options.remarks += [f"not at rest: {line}" for line in await self._diagnosis()]
        with trio.move_on_after(_CATCH_UP_SECONDS):
            while self._clients.following:
                await trio.sleep(0.1)
        with trio.move_on_after(_PROJECT_SECONDS):
            while not self._agrees():
                await trio.sleep(0.2)
        self._history.shown = await self._list_runs()
        await trio.sleep(0.5)
        self._compare_counts()
        return settled

    async def _diagnosis(self) -> list[str]:
        """Return what supervisor and gateway say about a tree that does not come to rest."""
        lines = [f"submissions under way: {self._load.under_way}, tree up: {self._world.up}"]
        try:
            status = await trio.to_thread.run_sync(self._world.tree.status)
            lines += [
                f"{it.name} ({it.kind}): {it.state}, pid {it.pid}, {it.age:.0f} s old, {it.last}"
                for it in status.children
            ]
        except (AssertionError, OSError) as error:
            lines.append(f"the supervisor does not answer: {error!r:.300}")
        return [*lines, f"gateway: {await self._get('/api/v1/stats')}"]

    async def _is_at_rest(self) -> bool:
        if self._load.under_way or not self._world.up:
            return False
        with contextlib.suppress(OSError):  # sqlite3.Error: the file may be away for another moment
            if aftermath.pending_outbox(self._world.database):
                return False
        states = await self._list_runs("READY") | await self._list_runs("RUNNING")
        return not states and self._world.up

    async def _list_runs(self, status: str = "") -> dict[str, str]:
        """Return the states of all runs as the API lists them; a run named "" when it does not answer."""
        found: dict[str, str] = {}
        query, cursor = f"status={status}&" if status else "", ""
        for _ in range(1_000):
            path = f"/api/v1/runs?{query}limit=200{f'&cursor={cursor}' if cursor else ''}"
            page = await self._get(path)
            if page is None:
                return {"": "no answer"}
            found |= {run["id"]: run["status"] for run in page["runs"]}
            cursor = page.get("next") or ""
            if not cursor:
                return found
        return found

    async def _get(self, path: str) -> Any:
        for _ in range(20):
            with contextlib.suppress(*BROKEN):
                headers = {"Authorization": f"Bearer {self._token}"}
                status, answer = await ask(self._world.port, "GET", path, headers=headers)
                if status == 200:
                    return answer
            await trio.sleep(0.25)
        return None

    def _agrees(self) -> bool:
        """Whether Django's database has heard of the end of every run."""
        projected = aftermath.read_projection(self._world.database)
        return all(projected.get(run) in TERMINAL for run in self._clients.ended)

    def _compare_counts(self) -> None:
        now = self._count()
        for what, before in self._at_rest.items():
            spare = 0 if what == "processes" else _SPARE_DESCRIPTORS
            if not before <= now[what] + spare or now[what] > before + spare:
                self._history.troubles.append(f"{what} at rest: {before} before, {now[what]} after")

    async def _end(self) -> None:
        world, history = self._world, self._history
        history.projected = aftermath.read_projection(world.database)
        try:
            codes = [await world.stop()]
            # What a killed runner had written and not yet named is nobody's: the next start removes it.
            await world.start()
            with trio.move_on_after(_TIDY_SECONDS):
                while not ((await self._get("/api/v1/stats")) or {}).get("retention", {}).get("passes"):
                    await trio.sleep(0.1)
            codes.append(await world.stop())
            history.troubles += [f"exit code {code} after SIGTERM" for code in codes if code]
        except AssertionError as error:
            history.troubles.append(str(error).splitlines()[0][:500])
        await trio.sleep(0.3)

    def _judge(self, missed: int, settled: float) -> Report:
        options, world, history = self._options, self._world, self._history
        # Before the store is read: even a reader makes files beside it.
        history.troubles += aftermath.leftovers(world, self._descriptors, open_descriptors())
        if orphans := aftermath.orphaned_blobs(world.state_dir):
            history.troubles.append(f"{orphans} large values that nothing refers to were left")
        aftermath.read_own_notes(world.notes, history)
        aftermath.read_store(world.state_dir, history)
        remarks = [*options.remarks, *self._remarks()]
        return Report(
            seed=options.seed,
            seconds=options.seconds,
            rate=options.rate,
            verdict=check(history),
            hits=history.hits,
            missed=missed,
            recovery=recovery(history),
            settled=settled,
            remarks=remarks,
        )

    def _remarks(self) -> list[str]:
        world = self._world
        log = world.log.read_text(errors="replace")
        found = [
            f"supervisor exits: {world.exits}",
            f"answers to submissions: {dict(sorted(self._load.answers.items()))}",
            f"answers to clients: {dict(sorted(self._clients.answers.items()))} (0: broken connection)",
            f"at rest before: {self._at_rest}",
            f"tracebacks in the log: {log.count('Traceback (most recent')}",
        ]
        return found + [f"a start failed: {line}" for line in world.failed_starts[:10]]
