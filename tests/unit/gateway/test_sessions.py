"""Streams per token: counted exactly, ended when the token is taken back."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from gateway.grants import Revocation
from gateway.sessions import Sessions, TooManyStreams
from taskkit.settings import LimitSettings, Settings
from taskkit.tokens import Claims, verify
from tests.unit.gateway.fakes import KEY, Exchange, StubEngine, app_of, token


def claims(id: str = "j", subject: str = "ann") -> Claims:
    return Claims(subject, 1e12, id, frozenset({"read"}), "*", ())


def test_a_token_has_so_many_and_gets_its_places_back() -> None:
    sessions = Sessions(2)
    with sessions.new(claims()), sessions.new(claims()):
        with pytest.raises(TooManyStreams), sessions.new(claims()):
            raise AssertionError("never reached")
        with sessions.new(claims("k")):
            assert len(sessions) == 3
    assert len(sessions) == 0
    with sessions.new(claims()):
        assert len(sessions) == 1


def test_tokens_without_an_id_count_by_subject() -> None:
    sessions = Sessions(1)
    with sessions.new(claims("")), sessions.new(claims("", "bob")), sessions.new(claims("ann")):
        with pytest.raises(TooManyStreams), sessions.new(claims("")):
            raise AssertionError("never reached")


def test_the_revoked_are_ended_once_and_the_others_are_not() -> None:
    revoked: set[str] = set()
    sessions = Sessions(9, lambda one: one.id in revoked)
    told: list[str] = []
    with sessions.new(claims("a")) as a, sessions.new(claims("b")) as b:
        a.on_end(partial(told.append, "a"))
        revoked.add("a")
        assert sessions.end_revoked() == 1
        assert sessions.end_revoked() == 0
        assert (a.ended.is_set(), b.ended.is_set(), told) == (True, False, ["a"])


def test_a_token_that_was_revoked_before_its_stream_began_ends_at_once() -> None:
    sessions, told = Sessions(9, lambda _: True), []
    with sessions.new(claims()) as session:
        assert session.ended.is_set()
        session.on_end(lambda: told.append(1))
    assert told == [1]


# --- over HTTP


def limited(streams: int) -> StubEngine:
    return StubEngine(settings=Settings(limits=LimitSettings(streams_per_token=streams)))


async def test_an_event_stream_too_many_is_told_when_to_come_back() -> None:
    engine = limited(1)
    app, bearer = app_of(engine), f"Bearer {token()}"
    run = engine.start()
    path = f"/api/v1/runs/{run.id}/events"
    async with trio.open_nursery() as nursery:
        first = Exchange(path, authorization=bearer, accept="text/event-stream")
        nursery.start_soon(first.run, app)
        await first.until(b"retry:")
        busy = Exchange(path, authorization=bearer, accept="text/event-stream")
        await busy.run(app)
        assert busy.status == 200
        assert busy.events == [("", "stream.busy", '{"reason":"streams_per_token","limit":1}')]
        assert 5_000 <= int(busy.body.partition(b"\n")[0].removeprefix(b"retry: ")) <= 15_000
        refused = Exchange(path, authorization=bearer, accept="application/x-ndjson")
        await refused.run(app)
        assert (refused.status, refused.headers["retry-after"]) == (429, "5")
        assert refused.headers["content-type"] == "application/problem+json"
        other = Exchange(path, authorization=f"Bearer {token()}", accept="text/event-stream")
        nursery.start_soon(other.run, app)
        await other.until(b"retry:")
        first.leave()
        await first.until()
        again = Exchange(path, authorization=bearer, accept="text/event-stream")
        nursery.start_soon(again.run, app)
        await again.until(b"retry:")
        engine.end(run)
        await again.until()


async def test_places_are_released_however_a_stream_ends() -> None:
    engine = limited(3)
    app, bearer = app_of(engine), f"Bearer {token()}"
    run = engine.start()
    path = f"/api/v1/runs/{run.id}/events"
    for _ in range(20):
        async with trio.open_nursery() as nursery:
            streams = [Exchange(path, authorization=bearer) for _ in range(3)]
            for stream in streams:
                nursery.start_soon(stream.run, app)
            for stream in streams:
                await stream.until(b"retry:")
            streams[0].leave()
            await streams[0].until()
            nursery.cancel_scope.cancel()  # the others: as a connection that is aborted
    with trio.move_on_after(1) as scope:
        scope.cancel()  # cancelled at its very first checkpoint
        await Exchange(path, authorization=bearer).run(app)
    async with trio.open_nursery() as nursery:
        streams = [Exchange(path, authorization=bearer) for _ in range(3)]
        for stream in streams:
            nursery.start_soon(stream.run, app)
        for stream in streams:
            await stream.until(b"retry:")
            assert b"stream.busy" not in stream.body
        nursery.cancel_scope.cancel()


async def test_a_revocation_ends_the_stream_in_its_order_and_says_nothing() -> None:
    engine = StubEngine()
    app, text = app_of(engine), token()
    run = engine.start()
    path = f"/api/v1/runs/{run.id}/events"
    async with trio.open_nursery() as nursery:
        stream = Exchange(path, authorization=f"Bearer {text}")
        nursery.start_soon(stream.run, app)
        engine.emit(run, ("tick", {"n": 1}))
        await stream.until(b"tick")
        operator = Exchange("/api/v1/tokens/revoke", "POST", content_length="0")
        operator.receive = body_of(b'{"jti":"%s"}' % verify(KEY, text).id.encode())  # type: ignore[method-assign]
        operator.scope["headers"] = [
            (name, value) for name, value in operator.scope["headers"] if name != b"content-length"
        ]
        await operator.run(app)
        assert b'"ended_streams":1' in operator.body
        await stream.until()
        assert stream.ended
        assert stream.events[-1][1] == "tick"
        back = Exchange(path, authorization=f"Bearer {text}")
        await back.run(app)
        assert (back.status, b"token-revoked" in back.body) == (401, True)


async def test_a_revocation_that_comes_between_request_and_stream_counts() -> None:
    engine = StubEngine()
    app, text = app_of(engine), token(subject="ann")
    run = engine.start()
    stream = Exchange(f"/api/v1/runs/{run.id}/events", authorization=f"Bearer {text}")
    read = engine.store.run

    async def revoked_meanwhile(id: str) -> object:
        await engine.revoke(Revocation("sub", "ann", 1e12))
        return await read(id)

    engine.store.run = revoked_meanwhile  # type: ignore[assignment, method-assign]
    with trio.fail_after(5):
        await stream.run(app)
    assert stream.ended


def body_of(data: bytes) -> object:
    """Return an ASGI `receive` that gives one body."""
    sent = False

    async def receive() -> dict[str, object]:
        nonlocal sent
        if sent:
            await trio.sleep_forever()
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    return receive
