"""Streams that wait without a task, over real sockets: what happens to them is what happens to any stream."""

from __future__ import annotations

import os
import random
import re

import pytest
import trio
import trio.testing

from gateway.broadcast import Seat
from gateway.grants import Revocation
from taskkit.lifecycle import RunStatus
from tests.unit.gateway.fakes import token
from tests.unit.gateway.places import KINDS, Stream, place, read


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_who_waits_has_no_task(kind: str) -> None:
    async with place() as here:
        before, clients = tasks(), [await here.open(kind) for _ in range(20)]
        await here.until(riders=20)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert tasks() == before
        for client in clients:
            await client.__aexit__()
        await here.until(riders=0, subscribers=0)


async def test_history_then_live_then_the_end(kind: str) -> None:
    async with place() as here:
        here.engine.emit(here.run, ("a", 1), ("a", 2))
        async with await here.open(kind) as client:
            await here.until(riders=1)
            here.engine.emit(here.run, ("a", 3))
            await client.until(b"id: 3\n")
            here.engine.end(here.run)
            await client.until(b"stream.end")
            if kind == "old":
                await client.to_end()
            else:
                await client.until(b"\r\n0\r\n\r\n")
            assert client.ids == [1, 2, 3, 4]
            await here.until(riders=0, subscribers=0)


async def test_the_connection_serves_the_next_request_behind_a_stream() -> None:
    async with place() as here:
        async with await here.open("direct") as client:
            await here.until(riders=1)
            await client.send(here.request("plain", query="?after=1"))  # pipelined, while it rides
            here.engine.end(here.run)
            await client.until(b"HTTP/1.1 204 ")
            await client.send(here.request("parsed", query="?after=1"))
            await client.until(b"HTTP/1.1 204 ")


async def test_what_comes_of_a_body_while_its_stream_rides_is_no_request() -> None:
    async with place() as here:
        body = here.request("plain", query="?after=1")
        async with await here.open("plain", Content_Length=str(len(body) + 1)) as client:
            await here.until(riders=1)
            await client.send(body)
            here.engine.end(here.run)
            await client.to_end()
            assert client.received.count(b"HTTP/1.1 ") == 1
            assert client.received.endswith(b"\r\n0\r\n\r\n")


async def test_a_client_that_leaves_frees_its_place(kind: str) -> None:
    async with place() as here:
        before = len(os.listdir("/proc/self/fd"))
        for leaving in ("close", "reset"):
            client = await here.open(kind)
            await here.until(riders=1)
            if leaving == "reset":
                client.reset()
            else:
                await client.__aexit__()
            await here.until(riders=0, subscribers=0)
        with trio.fail_after(5):
            while here.door.open or len(os.listdir("/proc/self/fd")) > before:
                await trio.sleep(0.005)


async def test_a_stream_ends_with_its_token(kind: str) -> None:
    async with place() as here:
        here.bearer = token(ttl=2.0)
        async with await here.open(kind) as client:
            await here.until(riders=1)
            with trio.fail_after(5):
                while not client.received.endswith(b"0\r\n\r\n"):
                    part = await client._stream.receive_some()
                    client.received += part
                    if not part:
                        break
            await here.until(riders=0, subscribers=0)


async def test_a_stream_ends_when_its_token_is_taken_back(kind: str) -> None:
    async with place() as here:
        here.bearer = token(subject="somebody")
        async with await here.open(kind) as client, await here.open(kind, bearer=token()) as other:
            await here.until(riders=2)
            await here.engine.revoke(Revocation("sub", "somebody", 4_000_000_000.0))
            here.direct._authenticator.sessions.end_revoked()
            await here.until(riders=1)
            here.engine.emit(here.run, ("a", 1))
            await other.until(b"id: 1\n")
            assert b"id: 1\n" not in client.received
        assert here.direct.stream_of(read(here.request("plain"))) is None


async def test_a_token_that_is_taken_back_on_the_way_to_the_seat_counts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place() as here:
        broadcast = here.engine.hub.broadcast
        board = broadcast.board

        def late(seat: Seat, fd: int) -> None:
            for sessions in here.direct._authenticator.sessions._open.values():
                for session in sessions:
                    session.end()
            board(seat, fd)

        client = await here.open(kind)
        await here.until(riders=1)
        monkeypatch.setattr(broadcast, "board", late)
        async with client, await here.open(kind):
            await here.until(riders=0, subscribers=0)


async def test_a_shutdown_ends_streams_with_the_time_to_come_back(kind: str) -> None:
    async with place() as here:
        async with await here.open(kind) as client:
            await here.until(riders=1)
            here.engine.hub.end_streams()
            here.shutdown.set()
            await client.to_end()
            assert len(re.findall(rb"retry: \d+", client.body)) == 2


async def test_a_shutdown_resets_what_is_left(kind: str) -> None:
    async with place(grace=0.05) as here:
        async with await here.open(kind) as client:
            await here.until(riders=1)
            here.shutdown.set()
            with pytest.raises(trio.BrokenResourceError):
                await client.to_end()


async def test_everything_comes_once_whatever_the_client_takes(kind: str, rng: random.Random) -> None:
    total = 400
    async with place() as here:

        async def read_slowly(client: Stream) -> None:
            with trio.fail_after(20):
                while b"stream.end" not in client.received:
                    client.received += await client._stream.receive_some(rng.randint(1, 200_000))
                    await trio.sleep(rng.random() * 0.01)

        clients = [await here.open(kind) for _ in range(3)]
        async with trio.open_nursery() as readers:
            for client in clients:
                readers.start_soon(read_slowly, client)
            for number in range(total):
                here.engine.emit(here.run, ("a", "x" * rng.randint(0, 20_000)))
                if number % 7 == 0:
                    await trio.sleep(rng.random() * 0.005)
            here.engine.end(here.run)
        for client in clients:
            assert client.ids == list(range(1, total + 2))
            await client.__aexit__()


async def test_a_run_that_ended_is_asked_for_in_the_store() -> None:
    async with place() as here:
        async with await here.open("direct") as client:
            await here.until(riders=1)
            assert here.engine.hub.followed(here.run.id) is not None
            here.engine.end(here.run, RunStatus.FAILED)
            assert here.engine.hub.followed(here.run.id) is None
            await client.until(b"stream.end")
