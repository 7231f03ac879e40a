"""The merge over a real engine with a real store: whatever happens in a round, nothing is passed by."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from gateway import merging
from gateway.fanout import Entry
from gateway.merging import Merger
from gateway.sse import Cursor
from gateway.store.rows import Mix
from tests.unit.gateway.gate import PATIENCE, Gate, HandRunner, gate


@asynccontextmanager
async def merger(g: Gate, mix: Mix, after: int = 0) -> AsyncIterator[Merger]:
    with merging.merging(
        g.store, g.hub, g.engine.changes, mix, Cursor(offset=after), reaches=lambda run: True
    ) as made:
        yield made


async def follow(merger: Merger, got: list[tuple[int, int]]) -> None:
    """Add what is read to `got`, as (position, run), for ever."""
    while True:
        pieces = await merger.read()
        for piece in pieces:
            assert isinstance(piece, Entry)
            got.append((piece.row.pos, piece.row.run))
        if not pieces:
            await merger.wait()


async def everything(g: Gate) -> list[tuple[int, int]]:
    """Return (position, run) of all events in the store."""
    return sorted(
        await g.store.look(lambda connection: connection.execute("SELECT pos, run FROM event").fetchall())
    )


async def test_runs_accepted_and_ended_at_any_moment_are_all_there(
    tmp_path: Path, rng: random.Random
) -> None:
    """Cancelled in the round that accepts them, or later, while clients of their tag come at any moment."""
    async with gate(tmp_path) as g:
        got: list[tuple[int, list[tuple[int, int]]]] = []

        async def live_and_die() -> None:
            for _ in range(10):
                run = await g.submit(tags=("t",))
                await trio.sleep(rng.choice([0, 0, 0.001]))
                await g.engine.cancel(run, 0.0)

        async def watch() -> None:
            await trio.sleep(rng.uniform(0, 0.1))
            after = rng.choice([0, g.hub.horizon])
            seen: list[tuple[int, int]] = []
            got.append((after, seen))
            async with merger(g, Mix(tags=("t",)), after) as one:
                await follow(one, seen)

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(watch)
                async with trio.open_nursery() as lives:
                    for _ in range(6):
                        lives.start_soon(live_and_die)
                whole = await everything(g)
                assert len(whole) == 60
                while any(seen != [one for one in whole if one[0] > after] for after, seen in got):
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()


async def test_what_several_runners_say_comes_by_position(tmp_path: Path, rng: random.Random) -> None:
    runners = [HandRunner(f"r{number}") for number in range(3)]
    try:
        async with gate(tmp_path) as g:
            running = []
            for runner in runners:
                runner.up(g.engine)
                runner.hello()
                running.append(await g.ran(runner, tags=("t",)))
            named = tuple(run.no for run, _ in running[:2])
            seen: list[tuple[int, int]] = []
            tagged: list[tuple[int, int]] = []
            with trio.fail_after(PATIENCE):
                async with (
                    merger(g, Mix(runs=named)) as one,
                    merger(g, Mix(tags=("t",))) as other,
                    trio.open_nursery() as nursery,
                ):
                    nursery.start_soon(follow, one, seen)
                    nursery.start_soon(follow, other, tagged)
                    for n in range(200):
                        number = rng.randrange(3)
                        runners[number].tick(running[number][1], *[n] * rng.choice([1, 5]))
                        await trio.sleep(rng.choice([0, 0, 0.002]))
                    for runner, (run, token) in zip(runners, running, strict=True):
                        runner.finish(token)
                        await g.ended(run)
                    whole = await everything(g)
                    while tagged != whole or seen != [one for one in whole if one[1] in named]:
                        await trio.sleep(0.01)
                    nursery.cancel_scope.cancel()
    finally:
        for runner in runners:
            runner.close()


async def test_another_gateway_continues_at_the_cursor(tmp_path: Path) -> None:
    async with gate(tmp_path) as g:
        for _ in range(3):
            await g.engine.cancel(await g.submit(tags=("t",)), 0.0)
        horizon = g.hub.horizon
    async with gate(tmp_path) as g:
        assert g.hub.horizon == horizon == 3
        async with merger(g, Mix(tags=("t",)), 1) as one:
            pieces = await one.read()
            assert [piece.row.pos for piece in pieces if isinstance(piece, Entry)] == [2, 3]
            assert one.cursor == "3"
            await g.engine.cancel(await g.submit(tags=("t",)), 0.0)
            assert len(await one.read()) == 1
            assert one.cursor == "4"
