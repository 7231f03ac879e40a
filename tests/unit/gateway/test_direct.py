"""The short ways of plain requests: they answer what the long way answers, or leave it to that."""

from __future__ import annotations

import functools
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import pytest
import trio
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import plain
from gateway.auth import Authenticator
from gateway.bounds import ServeLimits
from gateway.grants import Revocation
from gateway.serve import serve
from gateway.store.rows import RunRow
from taskkit.claims import Claims
from taskkit.tokens import TokenError
from tests.unit.gateway.fakes import KEY, StubEngine, token
from tests.unit.gateway.places import Place, Stream, place, read


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nAccept: a\r\n\r\n",
        b"GET /a/events HTTP/1.0\r\nHost: a\r\n\r\n",
        b"HEAD /events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"get /events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /events HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        b"GET /%65vents HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a/events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /runs HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET  /events HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /a/events HTTP/1.1\nHost: a\n\n",
        b"GET /a/events HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nX: \xff\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n",
        b"GET /a/events HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_plain_is_for_the_parser(data: bytes) -> None:
    assert plain.read(bytearray(data), 16_384) is None


def test_a_plain_request_is_read_as_the_parser_reads_it() -> None:
    head = b"GET /a/events?x=%41&y HTTP/1.1\r\nHOST:  a\r\nX-Y:\tone two\r\nConnection: Keep-Alive\r\n\r\n"
    request = read(head + b"GET /more")
    assert request.size == len(head)
    assert (request.path, request.query) == (b"/a/events", b"x=%41&y")
    assert request.headers == [(b"host", b"a"), (b"x-y", b"one two"), (b"connection", b"Keep-Alive")]


async def test_what_would_be_refused_is_never_direct() -> None:
    async with place() as here:
        other = here.engine.start(task="other.task")
        ended = here.engine.start()
        here.engine.end(ended)
        async with await here.open("plain"), await here.open("plain", run=other):
            narrow = token(runs=(here.run.id,), tasks=())
            mute = token(actions=("submit",))
            for bearer in (narrow, mute):
                await ask(here, here.request("plain", bearer=bearer))  # known from here on, if it is good
            cases = {
                "usual": (here.request("plain"), True),
                "a cursor": (here.request("plain", query="?after=now"), True),
                "of its own run": (here.request("plain", bearer=narrow), True),
                "of another run": (here.request("plain", run=other, bearer=narrow), False),
                "may not read": (here.request("plain", bearer=mute), False),
                "an unknown token": (here.request("plain", bearer=token()), False),
                "garbage for a token": (here.request("plain", bearer="x"), False),
                "a strange host": (here.request("plain", Host="evil.example"), False),
                "another accept": (here.request("plain", Accept="application/json"), False),
                "a bad cursor": (here.request("plain", query="?after=x"), False),
                "a bad id": (here.request("plain", Last_Event_ID="x"), False),
                "a parameter": (here.request("plain", query="?include=output"), False),
                "a ticket": (here.request("plain", query="?ticket=x"), False),
                "an origin": (here.request("plain", Origin="http://evil.example"), False),
                "an ended run": (here.request("plain", run=ended), False),
            }
            for name, (request, expected) in cases.items():
                assert (here.direct.stream_of(read(request)) is not None) == expected, name
        await here.until(subscribers=0)
        assert here.direct.stream_of(read(here.request("plain"))) is None, "nobody follows it any more"


async def ask(here: Place, request: bytes) -> None:
    client = Stream(await trio.open_tcp_stream("127.0.0.1", here.port))
    async with client:
        await client.send(request)
        await client.until(b"\r\n\r\n")


async def test_a_token_has_as_many_streams_as_it_may_either_way() -> None:
    async with place() as here:
        sessions = here.direct._authenticator.sessions
        async with await here.open("direct"):
            await here.until(riders=1)
            claims = Claims("me", 9e9, "", frozenset({"read"}), "*", ())
            assert sessions.has_room(claims)
            sessions._limit = 1
            assert here.direct.stream_of(read(here.request("plain"))) is None
            client = Stream(await trio.open_tcp_stream("127.0.0.1", here.port))
            async with client:
                await client.send(here.request("plain"))
                await client.until(b"stream.busy")


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, without anything."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[int]:
    """Serve an application; give the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with trio.open_nursery() as nursery:
            limits, shutdown = ServeLimits(), trio.Event()
            run = functools.partial(serve, limits=limits, shutdown=shutdown, grace=0.1, state={"a": 1})
            await nursery.start(run, app, [listener])
            yield listener.getsockname()[1]
            nursery.cancel_scope.cancel()


async def test_many_requests_at_once_leave_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    many, taken, most = 200, 0, 0
    really = plain.read

    def read(data: bytearray, size: int) -> plain.Request | None:
        nonlocal taken, most
        taken += 1
        most = max(most, taken)
        return really(data, size)

    async def turn() -> None:
        nonlocal taken
        while True:
            await trio.lowlevel.checkpoint()
            taken = 0

    monkeypatch.setattr(plain, "read", read)
    async with served(nothing) as port, trio.open_nursery() as others:
        async with Stream(await trio.open_tcp_stream("127.0.0.1", port)) as client:
            others.start_soon(turn)
            await client.send(b"GET /a/events HTTP/1.1\r\nHost: localhost\r\n\r\n" * many + HEALTH)
            await client.to_end()
            assert client.received.count(b"HTTP/1.1 204") == many + 1
            assert most <= 2
        others.cancel_scope.cancel()


def test_a_token_that_is_known_is_over_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine()
    auth = Authenticator(KEY, [], desk=engine)
    text = token(ttl=60.0)
    assert auth.known(text) is None
    known = auth.verify(HTTPConnection({"type": "http"}), text)
    assert auth.known(text) is known
    assert auth.verify(HTTPConnection({"type": "http"}), text) is known
    monkeypatch.setattr("time.time", lambda: known.expires_at)
    assert auth.known(text) is None
    with pytest.raises(TokenError):
        auth.verify(HTTPConnection({"type": "http"}), text)


# --- the same answer either way ---------------------------------------------------------------------------------------

#: What is asked for. RUN becomes the id of a run with two events, OTHER that of one of another task.
TARGETS = (
    "/api/v1/runs/OTHER/events",
    "/api/v1/runs/00000000-0000-7000-8000-000000000000/events",
    "/api/v1/runs/x/events",
    "/api/v1/runs/RUN/events/",
    "/api/v1/runs//RUN/events",
    "/api/v1/runs/RUN/../RUN/events",
    "/api/v1/runs/RUN/%65vents",
    "/api/v1/runs/RUN",
    "/api/v1/events",
    "/events",
    "http://localhost/api/v1/runs/RUN/events",
    "//evil.example/api/v1/runs/RUN/events",
    "/api/v1/runs/RUN/events#x",
)
QUERIES = (
    *(
        "?",
        "?after=0",
        "?after=1",
        "?after=2",
        "?after=now",
        "?after=latest",
        "?after=999",
        "?after=e1-1",
        "?after=1.1",
    ),
    *(
        "?after=",
        "?after=-1",
        "?after=x",
        "?after=NOW",
        "?after=1&after=2",
        "?after=%31",
        "?after=1&types=a",
        "?last_event_id=1",
    ),
    *(
        "?types=a",
        "?types=",
        "?include=log",
        "?include=x",
        "?limit=1",
        "?ticket=x",
        "?token=x",
        "?x=y",
        "?after=1?",
        "??",
    ),
)
HEADERS: dict[str, tuple[str, ...]] = {
    "Host": (
        *(
            "LOCALHOST",
            "localhost:1",
            "127.0.0.1",
            "127.0.0.1.evil.example",
            "[::1]",
            "testserver",
            "testserver.",
        ),
        *("evil.example", "localhost@evil.example", "localhost/x", "a b", "localhost:x", "x" * 300),
    ),
    "Accept": (
        "*/*",
        "text/*",
        "text/event-stream;q=0.5",
        "Text/Event-Stream",
        "application/json",
        "image/png",
        "x",
    ),
    "Authorization": (
        *(
            "Bearer GOOD",
            "bearer GOOD",
            "Bearer  GOOD",
            "Bearer GOOD x",
            "Basic GOOD",
            "GOOD",
            "Bearer",
            "Bearer x",
        ),
        *(
            "Bearer NEW",
            "Bearer NARROW",
            "Bearer MUTE",
            "Bearer OVER",
            "Bearer REVOKED",
            "Bearer OWN",
            "Bearer GOOx",
        ),
    ),
    "Last-Event-ID": ("1", "2", "7", "x", "-1", "e0-1", "1.1", "01", "1 ", "9" * 40),
    "Origin": ("http://localhost", "http://friend.example", "http://evil.example", "null"),
    "Cookie": ("a=b", "bulkhead=x"),
    "Connection": ("keep-alive", "Keep-Alive", "close", "x, close", "upgrade", "te"),
    "Content-Length": ("0", "3", "x", "-1"),
    "Transfer-Encoding": ("chunked", "identity", "gzip"),
    "Expect": ("100-continue", "x"),
    "Upgrade": ("h2c", "websocket", "x"),
    "Keep-Alive": ("timeout=5",),
    "X-Forwarded-For": ("1.2.3.4",),
    "X-Forwarded-Host": ("evil.example",),
    "Forwarded": ("for=1.2.3.4;host=evil.example",),
    "X-HTTP-Method-Override": ("DELETE",),
    "Accept-Encoding": ("gzip",),
    "X": ("x" * 9_000, "x" * 17_000, "a\tb", "\xff", "a\0b", "a\rb", "", " ", '"'),
    "X Y": ("a",),
    "X:": ("a",),
    "X\xff": ("a",),
}
LINES = (
    *(
        "HEAD TARGET HTTP/1.1",
        "POST TARGET HTTP/1.1",
        "get TARGET HTTP/1.1",
        "DELETE TARGET HTTP/1.1",
        "GET TARGET HTTP/1.0",
    ),
    *(
        "OPTIONS TARGET HTTP/1.1",
        "GET TARGET HTTP/1.2",
        "GET TARGET HTTP/2.0",
        "GET TARGET",
        "GET  TARGET HTTP/1.1",
    ),
    *(
        "GET TARGET  HTTP/1.1",
        " GET TARGET HTTP/1.1",
        "GET TARGET HTTP/1.1 ",
        "GET TARGET http/1.1",
        "\r\nGET TARGET HTTP/1.1",
    ),
)


#: What is asked behind each of them on the same connection.
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@dataclass
class Ask:
    """A request, made of its usual parts but for some."""

    line: str = "GET TARGET HTTP/1.1"
    target: str = "/api/v1/runs/RUN/events"
    query: str = ""
    headers: list[tuple[str, str]] = field(
        default_factory=lambda: [
            ("Host", "localhost"),
            ("Accept", "text/event-stream"),
            ("Authorization", "Bearer GOOD"),
        ]
    )
    newline: str = "\r\n"

    def change(self, rng: random.Random) -> None:
        """Change one thing."""
        match rng.randrange(10):
            case 0:
                self.line = rng.choice(LINES)
            case 1:
                self.target = rng.choice(TARGETS)
            case 2 | 3:
                self.query = rng.choice(QUERIES)
            case 4:
                del self.headers[rng.randrange(len(self.headers)) :][:1]
            case 5:
                self.headers.append(rng.choice(self.headers))
            case 6 if rng.random() < 0.2:
                self.newline = rng.choice(["\n", "\r\n ", " \r\n", "\t\r\n", "\r"])
            case _:
                name = rng.choice(list(HEADERS))
                kept = [pair for pair in self.headers if pair[0] != name or rng.random() < 0.1]
                self.headers = [*kept, (name, rng.choice(HEADERS[name]))]
                if rng.random() < 0.2:
                    rng.shuffle(self.headers)

    def render(self, words: Mapping[str, str]) -> bytes:
        """Return its bytes."""
        lines = [self.line.replace("TARGET", self.target + self.query)]
        lines += [f"{name}: {value}" for name, value in self.headers]
        text = self.newline.join([*lines, "", ""])
        return re.sub(r"\b[A-Z]{3,7}\b", lambda word: words.get(word[0], word[0]), text).encode("latin-1")


def single_changes() -> list[Ask]:
    """Return requests of which one thing is unusual, or nothing."""
    usual = Ask()
    asks = [usual, *(Ask(line=line) for line in LINES), *(Ask(target=target) for target in TARGETS)]
    asks += [Ask(query=query) for query in QUERIES]
    for name, values in HEADERS.items():
        others = [pair for pair in usual.headers if pair[0] != name]
        asks += [Ask(headers=[*others, (name, value)]) for value in values]
        asks += [Ask(headers=others), Ask(headers=[*usual.headers, (name, values[0])])]
    return asks


def answers(data: bytes) -> list[Any]:
    """Return what was answered, one after the other, without what differs from one time to the next."""
    found: list[Any] = []
    while data:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        client.receive_data(b"")
        body, events = b"", []
        while not isinstance(event := client.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.Response | h11.InformationalResponse):
                kept = sorted(
                    pair for pair in event.headers.raw_items() if pair[0].lower() not in (b"date", b"vary")
                )
                kept += sorted(
                    {
                        (b"vary", one)
                        for name, value in event.headers
                        if name == b"vary"
                        for one in value.split(b", ")
                    }
                )
                events.append((event.status_code, event.reason, event.http_version, kept))
        body = re.sub(rb"retry: [0-9]+|[0-9a-f-]{36}", b"*", body)
        found.append((events, body))
        data = client.trailing_data[0]
    return found


class Twice:
    """The same requests asked in both ways."""

    def __init__(self, here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = here
        self._monkeypatch = monkeypatch
        self._read = plain.read
        self._tokens = {
            "GOOD": here.bearer,
            "MUTE": token(actions=("submit",)),
            "OVER": token(now=time.time() - 7200),
            "REVOKED": token(subject="gone"),
            "OWN": token(runs="own"),
        }
        self.plain = self.direct = 0

    async def begin(self) -> None:
        """Have those tokens known that can be."""
        for name in ("GOOD", "REVOKED", "OWN", "MUTE"):
            await ask(self.here, self.here.request("plain", bearer=self._tokens[name]))
        await self.here.engine.revoke(Revocation("sub", "gone", time.time() + 60))

    async def compare(self, request: Ask) -> None:
        """Ask both ways if there are two, each time a fresh run that somebody else follows."""
        if (
            self._read(bytearray(request.render(self._words(self.here.run, self.here.run))), 16_384)
            is not None
        ):
            self.plain += 1
            short = await self._answers(request, self._counted)
            long = await self._answers(request, lambda *_: None)
            assert short == long, f"{request}:\n{short}\n{long}"

    def _words(self, run: RunRow, other: RunRow) -> dict[str, str]:
        narrow = token(runs=(run.id,), tasks=())
        return {**self._tokens, "RUN": run.id, "OTHER": other.id, "NEW": token(), "NARROW": narrow}

    async def _answers(self, request: Ask, read: Any) -> list[Any]:
        here = self.here
        run, other = runs = here.engine.start(), here.engine.start(task="other.task")
        here.engine.emit(run, ("a", 1), ("b", 2))
        async with await here.open("plain", run=run, query="?after=now"):
            await here.until(riders=1)
            with self._monkeypatch.context() as patch:
                patch.setattr(plain, "read", read)
                async with Stream(await trio.open_tcp_stream("127.0.0.1", here.port)) as client:
                    await client.send(request.render(self._words(*runs)) + HEALTH)
                    await client.until(b"\r\n\r\n")
                    if re.match(rb"(?is)HTTP/1.1 200 .*text/event-stream.*\r\n\r\n", client.received):
                        await here.until(subscribers=2)
                    here.engine.emit(run, ("a", 3))
                    here.engine.end(run)
                    here.engine.end(other)
                    await client.to_end()
        await here.until(subscribers=0)
        return answers(client.received)

    def _counted(self, data: bytearray, most: int) -> plain.Request | None:
        request = self._read(data, most)
        self.direct += request is not None and self.here.direct.stream_of(request) is not None
        return request


async def test_a_request_is_answered_alike_either_way(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    async with place(origins=["http://friend.example"]) as here:
        twice = Twice(here, monkeypatch)
        await twice.begin()
        for request in single_changes():
            await twice.compare(request)
        for _ in range(150):
            request = Ask()
            for _ in range(rng.randint(1, 4)):
                request.change(rng)
            await twice.compare(request)
        assert twice.plain > 100, "most of them have no second way: the test says little"
        assert twice.direct > 20


async def test_an_application_sees_the_same_request_either_way(
    monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append({key: value for key, value in scope.items() if key not in ("state", "client")})
        seen[-1]["version"] = scope["state"]["peer"].http_version
        seen[-1]["state"] = {key: value for key, value in scope["state"].items() if key != "peer"}
        seen[-1]["body"] = await receive()
        await nothing(scope, receive, send)

    words = {"RUN": "x", "OTHER": "y", "GOOD": "token"}
    asks = [one for one in single_changes() if plain.read(bytearray(one.render(words)), 16_384)]
    assert len(asks) > 50
    async with served(app) as port:
        for read in (plain.read, lambda *_: None):
            with monkeypatch.context() as patch:
                patch.setattr(plain, "read", read)
                async with Stream(await trio.open_tcp_stream("127.0.0.1", port)) as client:
                    await client.send(b"".join(one.render(words) for one in asks) + HEALTH)
                    await client.to_end()
    half = len(seen) // 2
    assert len(seen) == 2 * len(asks) + 2
    assert seen[:half] == seen[half:]
