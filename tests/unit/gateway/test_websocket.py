"""WebSocket clients are told of every run that they may see, and of nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
import trio.testing

from gateway import conversation
from gateway.changes import MAX_WAITING
from gateway.store.rows import RunRow
from taskkit.lifecycle import RunStatus
from taskkit.settings import Settings
from tests.unit.gateway.fakes import StubEngine, app_of, client_of, token


class Client:
    """A client that speaks ASGI; what it is sent waits here unless `stuck` is set."""

    def __init__(self, path: str, **headers: str) -> None:
        parts = urlsplit(path)
        self.messages: list[dict[str, Any]] = []
        self.accepted = False
        self.status = 0
        self.body = b""
        self.code: int | None = None
        self.reason = ""
        self.stuck = False
        self.returned = False
        self._read = 0
        self._news = trio.Event()
        self._say, self._heard = trio.open_memory_channel[dict[str, Any]](100)
        self._say.send_nowait({"type": "websocket.connect"})
        sent = {"host": "testserver"} | {name.replace("_", "-"): value for name, value in headers.items()}
        self.scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "path": parts.path,
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "scheme": "ws",
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
            "subprotocols": [],
            "state": {},
            "extensions": {"websocket.http.response": {}},
        }

    async def receive(self) -> dict[str, Any]:
        return await self._heard.receive()

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        while self.stuck:
            await trio.sleep(0.1)
        match message["type"]:
            case "websocket.accept":
                self.accepted = True
            case "websocket.send":
                assert self.code is None, "a message behind the close"
                self.messages.append(json.loads(message["text"]))
            case "websocket.close":
                self.code, self.reason = message["code"], message["reason"]
            case "websocket.http.response.start":
                self.status = message["status"]
            case "websocket.http.response.body":
                self.body += message.get("body", b"")
        self.wake()

    def wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def say(self, message: Any) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self._say.send_nowait({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        self._say.send_nowait({"type": "websocket.disconnect", "code": 1001, "reason": ""})

    async def run(self, app: Any) -> None:
        await app(self.scope, self.receive, self.send)
        self.returned = True
        self.wake()

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(30):
            while not condition():
                await self._news.wait()

    async def next(self, number: int = 1) -> list[dict[str, Any]]:
        """Return the next messages."""
        await self.until(lambda: len(self.messages) >= self._read + number)
        self._read += number
        return self.messages[self._read - number : self._read]

    async def states(self, number: int) -> list[tuple[str, str]]:
        """Return id and status of the next messages, all of which must be updates."""
        found = await self.next(number)
        assert {message["type"] for message in found} == {"task.update"}
        return [(message["task"]["task_id"], message["task"]["status"]) for message in found]

    async def frames(self, number: int) -> list[tuple[str, str]]:
        """Return id and status of the next messages, all of which must be frames of the channel."""
        found = await self.next(number)
        assert {message["type"] for message in found} == {"data"}
        data = [json.loads(message["data"]) for message in found]
        return [(each["task_id"], each["status"]) for each in data]

    async def silence(self) -> None:
        """Expect that nothing more comes."""
        await trio.testing.wait_all_tasks_blocked()
        assert self.messages[self._read :] == []

    async def closed(self) -> int | None:
        await self.until(lambda: self.returned)
        return self.code


#: Time that jumps; pytest-trio has to find it among a test's own arguments.
Clock = trio.testing.MockClock


@pytest.fixture
def engine() -> StubEngine:
    """Give an engine that commits in memory."""
    return StubEngine()


def change(engine: StubEngine, run: RunRow, **changes: Any) -> RunRow:
    """Commit a change of a run, then publish it."""
    row = engine.store.rows[run.no]
    for name, value in changes.items():
        setattr(row, name, value)
    row.version += 1
    engine.changes.publish([replace(row)])
    return replace(row)


@asynccontextmanager
async def connected(
    engine: StubEngine, path: str = "/flowrra/ws", *, claims: dict[str, Any] | None = None, **headers: str
) -> AsyncIterator[Client]:
    """Give a client under way; it leaves at the end of the block."""
    async with trio.open_nursery() as nursery:
        client = Client(path, **{"authorization": f"Bearer {token(**(claims or {}))}", **headers})
        nursery.start_soon(client.run, app_of(engine))
        await client.until(lambda: client.accepted or client.returned)
        yield client
        client.leave()
        with trio.fail_after(30):
            await client.until(lambda: client.returned)


class TestAdmission:
    async def refused(self, engine: StubEngine, path: str = "/flowrra/ws", **headers: str) -> tuple[int, str]:
        client = Client(path, **headers)
        await client.run(app_of(engine))
        problem = json.loads(client.body)
        assert not client.accepted
        assert problem["status"] == client.status
        assert "secret" not in client.body.decode()
        return client.status, problem["type"].removeprefix("urn:bulkhead:problem:")

    @pytest.mark.parametrize("path", ["/ws", "/flowrra/ws"])
    async def test_without_a_token_it_is_401(self, engine: StubEngine, path: str) -> None:
        assert await self.refused(engine, path) == (401, "token-missing")
        assert await self.refused(engine, path, authorization="Bearer secret") == (401, "token-malformed")
        assert await self.refused(engine, path + "?token=x", authorization="Bearer x")

    async def test_reading_needs_its_action(self, engine: StubEngine) -> None:
        bearer = f"Bearer {token(actions=['submit', 'logs'])}"
        assert await self.refused(engine, authorization=bearer) == (403, "forbidden")
        query = token(actions=["submit"])
        assert await self.refused(engine, f"/ws?token={query}") == (403, "forbidden")

    async def test_an_unknown_path_is_404(self, engine: StubEngine) -> None:
        assert await self.refused(engine, "/nowhere/ws") == (404, "not-found")

    async def test_another_host_is_refused(self, engine: StubEngine) -> None:
        refusal = await self.refused(engine, "/ws", host="evil.example", authorization=f"Bearer {token()}")
        assert refusal == (421, "wrong-host")

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://testserver.evil.example", ""])
    @pytest.mark.parametrize("how", ["header", "query", "cookie"])
    async def test_a_page_of_another_site_is_refused(self, engine: StubEngine, origin: str, how: str) -> None:
        path = "/ws" + (f"?token={token()}" if how == "query" else "")
        headers = {
            "header": {"authorization": f"Bearer {token()}"},
            "query": {},
            "cookie": {"cookie": f"bulkhead_token={token()}"},
        }[how]
        assert await self.refused(engine, path, origin=origin, **headers) == (403, "wrong-origin")

    @pytest.mark.parametrize("origin", ["http://testserver", "https://app.example"])
    async def test_our_own_page_and_one_that_is_listed_come_in_with_a_cookie(
        self, engine: StubEngine, origin: str
    ) -> None:
        engine.settings = Settings(cors_origins=["https://app.example"])
        async with connected(
            engine, authorization="", cookie=f"bulkhead_token={token()}", origin=origin
        ) as client:
            assert not client.accepted  # an empty Authorization header is one
        client = Client("/flowrra/ws", cookie=f"bulkhead_token={token()}", origin=origin)
        client.leave()
        await client.run(app_of(engine))
        assert client.accepted

    async def test_any_origin_that_may_come_may_not_use_a_cookie(self, engine: StubEngine) -> None:
        engine.settings = Settings(cors_origins=["*"])
        origin = "https://evil.example"
        refusal = await self.refused(engine, cookie=f"bulkhead_token={token()}", origin=origin)
        assert refusal == (401, "token-missing")
        client = Client(f"/flowrra/ws?token={token()}", origin=origin)
        client.leave()
        await client.run(app_of(engine))
        assert client.accepted

    @pytest.mark.parametrize("path", ["/ws", "/flowrra/ws"])
    @pytest.mark.parametrize(
        ("bad", "reason"), [("", "invalid_token"), ("x.y.z", "invalid_token"), (None, "expired_token")]
    )
    async def test_a_page_learns_by_1008_that_its_token_is_refused(
        self, engine: StubEngine, path: str, bad: str | None, reason: str
    ) -> None:
        query = token(now=time.time() - 7200) if bad is None else bad
        client = Client(f"{path}?token={query}")
        await client.run(app_of(engine))
        assert (client.code, client.reason) == (1008, reason)
        assert [message["code"] for message in client.messages] == ([reason] if path == "/ws" else [])

    @pytest.mark.parametrize("path", ["/ws", "/flowrra/ws"])
    async def test_a_plain_request_is_told_what_is_spoken_here(self, engine: StubEngine, path: str) -> None:
        async with client_of(engine) as http:
            answer = await http.get(path)
        assert answer.status_code == 426
        assert answer.json()["type"].endswith("upgrade-required")
        assert answer.headers["upgrade"] == "websocket"


class TestUpdates:
    async def test_a_snapshot_of_open_runs_comes_first(self, engine: StubEngine) -> None:
        waiting = engine.start(status=RunStatus.READY)
        running = engine.start(status=RunStatus.RUNNING)
        engine.end(engine.start())
        async with connected(engine) as client:
            assert await client.states(2) == [(waiting.id, "pending"), (running.id, "running")]
            await client.silence()

    async def test_a_snapshot_has_every_open_run(self, engine: StubEngine) -> None:
        runs = [engine.start(status=RunStatus.READY) for _ in range(2 * conversation.PAGE)]
        async with connected(engine) as client:
            assert {id for id, _ in await client.states(len(runs))} == {run.id for run in runs}
            await client.silence()

    async def test_every_change_follows(self, engine: StubEngine) -> None:
        run = engine.start(status=RunStatus.READY, args=b"[1]")
        async with connected(engine) as client:
            await client.next()
            for status, attempt in ((RunStatus.RUNNING, 1), (RunStatus.READY, 1), (RunStatus.RUNNING, 2)):
                change(engine, run, status=status, attempt=attempt)
            change(engine, run, status=RunStatus.FAILED, error=b'{"message":"boom"}')
            found = await client.next(4)
        assert [m["task"]["status"] for m in found] == ["running", "retrying", "running", "failed"]
        assert [m["task"]["retries"] for m in found] == [0, 0, 1, 1]
        assert {tuple(m["task"]["args"]) for m in found} == {(1,)}
        assert found[-1]["task"]["error"] == "boom"

    async def test_only_what_the_token_reaches_is_told(self, engine: StubEngine) -> None:
        mine, others = engine.start(), engine.start()
        by_name = engine.start("shop.order")
        reach = {"runs": [mine.id], "tasks": ["shop.*"]}
        async with connected(engine, claims=reach) as client:
            assert {id for id, _ in await client.states(2)} == {mine.id, by_name.id}
            for run in (others, mine):
                change(engine, run, attempt=1)
            assert await client.states(1) == [(mine.id, "running")]
            client.say({"type": "subscribe", "run": [others.id, mine.id]})
            assert await client.states(1) == [(mine.id, "running")]
            assert await client.next() == [{"type": "subscribed"}]
            client.say({"type": "subscribe", "run": others.id, "after": "0"})
            (error,) = await client.next()
            assert error["code"] == "unknown-run"

    async def test_a_token_of_nothing_is_told_nothing(self, engine: StubEngine) -> None:
        run = engine.start(subject="me")
        async with connected(engine, "/ws", claims={"runs": (), "tasks": ()}) as client:
            assert await client.next() == [{"type": "subscribed"}]
            change(engine, run, attempt=1)
            await client.silence()

    async def test_a_change_within_the_snapshot_takes_nothing_back(self, engine: StubEngine) -> None:
        """The store shows what has not been published yet: what is published then is old."""
        run = engine.start(status=RunStatus.READY)
        before = replace(engine.store.rows[run.no])
        row = engine.store.rows[run.no]
        row.status, row.version = RunStatus.RUNNING, 2
        after = replace(row)
        async with connected(engine) as client:
            assert await client.states(1) == [(run.id, "running")]
            engine.changes.publish([before, after])
            change(engine, run, status=RunStatus.SUCCESSFUL)
            assert await client.states(1) == [(run.id, "success")]

    async def test_a_snapshot_waits_for_the_store(self, engine: StubEngine, autojump_clock: Clock) -> None:
        run = engine.start()
        engine.store.broken = True
        async with connected(engine) as client:
            await trio.sleep(3)
            engine.store.broken = False
            assert await client.states(1) == [(run.id, "running")]


class TestFilters:
    @pytest.mark.parametrize(
        ("wish", "wanted"),
        [
            ({"task": "demo.*"}, {1, 2}),
            ({"task": ["shop.order", "x"]}, {3}),
            ({"status": "pending"}, {2}),
            ({"user": "ann"}, {1, 3}),
            ({"user": "ann", "task": "demo.count"}, {1}),
            ({"since": "2023-11-14T22:13:21Z"}, {1, 2, 3, 4}),
        ],
    )
    async def test_a_subscription_selects(
        self, engine: StubEngine, wish: dict[str, Any], wanted: set[int]
    ) -> None:
        runs = {
            1: engine.start(subject="ann"),
            2: engine.start(status=RunStatus.READY),
            3: engine.start("shop.order", subject="ann"),
            4: engine.start("shop.order", status=RunStatus.SUCCESSFUL),
        }
        async with connected(engine) as client:
            await client.next(3)
            client.say({"type": "subscribe", **wish})
            told = {id for id, _ in await client.states(len(wanted))}
            assert told == {runs[no].id for no in wanted}
            assert await client.next() == [{"type": "subscribed"}]
            for run in runs.values():
                change(engine, run, attempt=0)
            await client.states(len(wanted - {4} if "since" not in wish else wanted))

    async def test_subscriptions_add_up_and_can_be_cleared(self, engine: StubEngine) -> None:
        one, two, three = engine.start("a"), engine.start("b"), engine.start("c")
        async with connected(engine) as client:
            await client.next(3)
            for task in ("a", "b"):
                client.say({"type": "subscribe", "task": task})
                await client.next(2)
            for run in (one, two, three):
                change(engine, run, attempt=1)
            assert await client.states(2) == [(one.id, "running"), (two.id, "running")]
            client.say({"type": "unsubscribe"})
            client.say({"type": "ping"})
            assert await client.next() == [{"type": "pong"}]
            change(engine, one, attempt=2)
            await client.silence()

    async def test_ended_runs_of_a_snapshot_are_the_newest(
        self, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(conversation, "MAX_ENDED", 2)
        monkeypatch.setattr(conversation, "PAGE", 1)
        runs = [engine.start(status=RunStatus.FAILED) for _ in range(4)]
        async with connected(engine) as client:
            client.say({"type": "subscribe", "since": "2023-01-01T00:00:00Z"})
            assert [id for id, _ in await client.states(2)] == [runs[3].id, runs[2].id]
            assert await client.next() == [{"type": "subscribed"}]

    async def test_there_is_a_limit(self, engine: StubEngine) -> None:
        async with connected(engine, "/ws") as client:
            await client.next()
            for _ in range(conversation.MAX_FILTERS):
                client.say({"type": "subscribe", "task": "none"})
                assert await client.next() == [{"type": "subscribed"}]
            client.say({"type": "subscribe"})
            (error,) = await client.next()
            assert error["code"] == "too-many"

    @pytest.mark.parametrize(
        "text", ["nonsense", "[]", '{"type":"?"}', '{"type":"subscribe","run":"no id","after":"0"}']
    )
    async def test_a_bad_message_is_answered_and_ends_nothing(self, engine: StubEngine, text: str) -> None:
        run = engine.start()
        async with connected(engine) as client:
            await client.next()
            client.say(text)
            (error,) = await client.next()
            assert error["type"] == "error"
            change(engine, run, attempt=1)
            assert await client.states(1) == [(run.id, "running")]

    async def test_bytes_are_1003(self, engine: StubEngine) -> None:
        async with connected(engine) as client:
            client._say.send_nowait({"type": "websocket.receive", "bytes": b"x"})
            assert await client.closed() == 1003


class TestEvents:
    async def test_a_run_is_followed_from_a_cursor(self, engine: StubEngine) -> None:
        run = engine.start()
        engine.emit(run, ("a", {"n": 1}), ("b", {"n": 2}))
        async with connected(engine, "/ws") as client:
            await client.next()
            client.say({"type": "subscribe", "run": run.id, "after": "1"})
            await client.until(lambda: len(client.messages) == 4)  # an update, the event, subscribed
            engine.emit(run, ("c", {"n": 3}))
            engine.end(run, result=5)
            await client.until(lambda: len(client.messages) == 6)
            assert engine.hub.subscribers(run.no) == 0
        events = [message for message in client.messages if message["type"] == "event"]
        assert [(event["id"], event["event"]) for event in events] == [
            ("2", "b"),
            ("3", "c"),
            ("4", "stream.end"),
        ]
        assert events[0] == {"type": "event", "run": run.id, "id": "2", "event": "b", "data": {"n": 2}}

    async def test_a_second_cursor_replaces_the_first(self, engine: StubEngine) -> None:
        run = engine.start()
        engine.emit(run, ("a", {}))
        async with connected(engine, "/ws") as client:
            for cursor in ("0", "now"):
                client.say({"type": "subscribe", "run": run.id, "after": cursor})
                await trio.testing.wait_all_tasks_blocked()
            assert (
                len(client.messages) == 6
            )  # subscribed; an update, the event, subscribed; the first and last again
            assert engine.hub.subscribers(run.no) == 1
            engine.emit(run, ("b", {}))
            await client.until(lambda: len(client.messages) == 7)
            client.say({"type": "unsubscribe"})
            await trio.testing.wait_all_tasks_blocked()
            assert engine.hub.subscribers(run.no) == 0
        names = [message["event"] for message in client.messages if message["type"] == "event"]
        assert names == ["a", "b"]

    async def test_a_cursor_ahead_is_reset(self, engine: StubEngine) -> None:
        run = engine.start()
        engine.emit(run, ("a", {}))
        async with connected(engine, "/ws") as client:
            client.say({"type": "subscribe", "run": run.id, "after": "9"})
            await client.until(lambda: len(client.messages) == 5)
        events = [message for message in client.messages if message["type"] == "event"]
        assert [event["event"] for event in events] == ["stream.reset", "a"]
        assert events[0]["data"] == {"from": 1, "reason": "ahead"}

    async def test_there_is_a_limit(self, engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conversation, "MAX_FOLLOWED", 1)
        one, two = engine.start(), engine.start()
        async with connected(engine, "/ws") as client:
            for run in (one, two):
                client.say({"type": "subscribe", "run": run.id, "after": "0"})
            await client.until(lambda: client.messages and client.messages[-1]["type"] == "error")
            assert client.messages[-1]["code"] == "too-many"


class TestChannel:
    async def test_a_user_is_told_of_own_runs_only(self, engine: StubEngine) -> None:
        mine, others = engine.start(subject="me", status=RunStatus.READY), engine.start(subject="you")
        async with connected(engine, "/ws") as client:
            assert await client.frames(1) == [(mine.id, "pending")]
            assert await client.next() == [{"type": "subscribed"}]
            change(engine, others, status=RunStatus.SUCCESSFUL)
            change(engine, mine, status=RunStatus.RUNNING, attempt=1)
            change(engine, mine, status=RunStatus.SUCCESSFUL)
            assert await client.frames(2) == [(mine.id, "processing"), (mine.id, "completed")]

    async def test_nobody_is_no_user(self, engine: StubEngine) -> None:
        run = engine.start(subject="")
        async with connected(engine, "/ws", claims={"subject": ""}) as client:
            assert await client.next() == [{"type": "subscribed"}]
            change(engine, run, attempt=1)
            await client.silence()

    async def test_a_token_of_one_run_shows_no_other_of_its_user(self, engine: StubEngine) -> None:
        one, other = engine.start(subject="me"), engine.start(subject="me")
        async with connected(engine, "/ws", claims={"runs": [one.id], "tasks": ()}) as client:
            assert await client.frames(1) == [(one.id, "processing")]
            await client.next()
            change(engine, other, attempt=1)
            await client.silence()

    async def test_flowrras_messages_come_with_a_subscription(self, engine: StubEngine) -> None:
        run = engine.start(subject="me")
        async with connected(engine, "/ws") as client:
            await client.next(2)
            change(engine, run, attempt=1)
            await client.frames(1)
            client.say({"type": "subscribe"})
            assert await client.states(1) == [(run.id, "running")]
            await client.next()
            change(engine, run, attempt=2)
            assert [message["type"] for message in await client.next(2)] == ["task.update", "data"]

    async def test_a_ping_is_answered(self, engine: StubEngine) -> None:
        async with connected(engine, "/ws") as client:
            client.say({"type": "ping"})
            assert await client.next(2) == [{"type": "subscribed"}, {"type": "pong"}]


class TestLife:
    @pytest.mark.parametrize("path", ["/ws", "/flowrra/ws"])
    async def test_it_ends_when_the_token_does(
        self, engine: StubEngine, autojump_clock: Clock, path: str
    ) -> None:
        async with connected(engine, path, claims={"ttl": 100.0}) as client:
            await trio.sleep(98)
            assert not client.returned
            await trio.sleep(2)
            assert (await client.closed(), client.reason) == (1008, "expired_token")
        if path == "/ws":
            assert client.messages[-1]["code"] == "expired_token"

    @pytest.mark.parametrize("ttl", [50.0, 1000.0])
    async def test_another_token_moves_the_end(
        self, engine: StubEngine, autojump_clock: Clock, ttl: float
    ) -> None:
        async with connected(engine, "/ws", claims={"ttl": 100.0}) as client:
            client.say({"token": token(ttl=ttl)})
            assert await client.next(2) == [{"type": "subscribed"}] * 2
            await trio.sleep(ttl - 2)
            assert not client.returned
            await trio.sleep(2)
            assert await client.closed() == 1008

    async def test_another_token_may_be_another_users(
        self, engine: StubEngine, autojump_clock: Clock
    ) -> None:
        mine, yours = engine.start(subject="me"), engine.start(subject="you")
        async with connected(engine, "/ws") as client:
            client.say({"type": "subscribe", "run": mine.id, "after": "0"})
            await client.next(4)
            client.say({"token": token(subject="you", runs=[yours.id], tasks=())})
            assert await client.next() == [{"type": "subscribed"}]
            change(engine, mine, attempt=1)
            change(engine, yours, attempt=1)
            assert await client.frames(1) == [(yours.id, "processing")]
            engine.emit(mine, ("secret", {}))
            await trio.testing.wait_all_tasks_blocked()
            assert engine.hub.subscribers(mine.no) == 0

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            ("x.y.z", "invalid_token"),
            ({"actions": ["logs"]}, "invalid_token"),
            ({"now": 1.0}, "expired_token"),
        ],
    )
    async def test_a_refused_token_is_1008(
        self, engine: StubEngine, autojump_clock: Clock, bad: Any, reason: str
    ) -> None:
        async with connected(engine, "/ws") as client:
            await client.next()
            client.say({"token": bad if isinstance(bad, str) else token(**bad)})
            (error,) = await client.next()
            assert (error["type"], error["code"]) == ("error", reason)
            assert (await client.closed(), client.reason) == (1008, reason)

    async def test_a_shutdown_tells_what_was_last_and_closes_with_1001(
        self, engine: StubEngine, autojump_clock: Clock
    ) -> None:
        run = engine.start()
        async with connected(engine) as client, connected(engine, "/ws") as other:
            await client.next()
            change(engine, run, status=RunStatus.SUCCESSFUL)
            engine.hub.end_streams()
            assert await client.closed() == await other.closed() == 1001
        assert client.messages[-1]["task"]["status"] == "success"

    async def test_who_comes_within_a_shutdown_is_sent_away(
        self, engine: StubEngine, autojump_clock: Clock
    ) -> None:
        engine.hub.end_streams()
        async with connected(engine) as client:
            assert await client.closed() == 1001

    async def test_an_internal_error_is_1011(
        self,
        engine: StubEngine,
        autojump_clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with connected(engine, "/ws?x=secret") as client:
            await client.next()
            monkeypatch.setattr(conversation.dialects, "parse", lambda text: 1 / 0)
            client.say("anything")
            (error,) = await client.next()
            assert error["code"] == "internal_error"
            assert await client.closed() == 1011
        assert "ZeroDivisionError" in caplog.text
        assert "secret" not in caplog.text

    async def test_it_leaves_nothing_behind(self, engine: StubEngine, autojump_clock: Clock) -> None:
        run = engine.start()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(20):
            async with connected(engine) as client:
                client.say({"type": "subscribe", "run": run.id, "after": "0"})
                await client.next(3)
                assert engine.changes.watched
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert not engine.changes.watched
        assert engine.hub.statistics()["subscribers"] == 0


class TestSlowClients:
    async def test_who_keeps_up_sees_each_state_beside_one_that_is_stuck(
        self, engine: StubEngine, autojump_clock: Clock
    ) -> None:
        run = engine.start()
        async with connected(engine) as stuck, connected(engine) as live:
            await stuck.next()
            await live.next()
            stuck.stuck = True
            for attempt in range(1, 4 * conversation.BEHIND):
                change(engine, run, attempt=attempt)
                assert await live.states(1) == [(run.id, "running")]
            stuck.stuck = False
            await trio.sleep(1)
            # The first was under way; of the others only the newest counts.
            assert [m["task"]["retries"] for m in stuck.messages[1:]] == [0, 4 * conversation.BEHIND - 2]

    async def test_one_that_is_too_far_behind_begins_anew(
        self, engine: StubEngine, autojump_clock: Clock
    ) -> None:
        open_one, ended = engine.start(subject="me"), engine.start(subject="me")
        async with connected(engine, "/ws") as client:
            client.say({"type": "subscribe"})
            await client.next(6)
            client.stuck = True
            change(engine, open_one, attempt=1)
            await trio.testing.wait_all_tasks_blocked()
            change(engine, ended, status=RunStatus.SUCCESSFUL)
            for attempt in range(MAX_WAITING):
                change(engine, open_one, attempt=attempt)
            client.stuck = False
            await client.next(2)  # of the change that was under way
            assert await client.next() == [{"type": "stream.reset", "reason": "lagged"}]
            assert await client.frames(1) == [(open_one.id, "processing")]
            assert await client.states(1) == [(open_one.id, "running")]
            await client.silence()
