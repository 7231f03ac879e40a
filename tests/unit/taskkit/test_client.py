"""The client against a scripted gateway on a real socket: retries, resuming, errors, both spellings."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from taskkit import calls, connections
from taskkit.client import Client, close_clients, get_client
from taskkit.errors import GatewayError, RunCrashed, RunFailed, RunLost, RunTimedOut, RunWasCancelled
from taskkit.following import StreamEvent

RUN = "0190b5a0-0000-7000-8000-000000000001"


def document(status: int, body: dict[str, Any], **headers: str) -> Callable[[Handler], None]:
    """Answer with a JSON document."""

    def answer(handler: Handler) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def stream(data: bytes, *, broken: bool = False) -> Callable[[Handler], None]:
    """Answer with a stream that ends cleanly, or in the middle of a chunk."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if data else b"")
        handler.wfile.write(b"ff\r\nhalf" if broken else b"0\r\n\r\n")
        handler.close_connection = broken

    return answer


def hang_up(handler: Handler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def no_content(handler: Handler) -> None:
    """Answer with 204."""
    handler.send_response(204)
    handler.end_headers()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: Server

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.requests.append(Request(self.command, self.path, dict(self.headers), body))
        self.server.script.pop(0)(self)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers request after request as scripted."""

    script: list[Callable[[Handler], None]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    daemon_threads = True

    def serve(self, family: int, address: Any) -> str:
        self.address_family = family
        socketserver.TCPServer.__init__(self, address, Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{self.server_address[1]}" if family == socket.AF_INET else f"unix:{address}"

    def get_request(self) -> tuple[socket.socket, Any]:
        request, _ = super().get_request()
        return request, ("peer", 0)


@pytest.fixture(autouse=True)
def fast_and_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("taskkit.following.FIRST_PAUSE", 0.001)
    monkeypatch.setattr("taskkit.following.LONGEST_PAUSE", 0.01)
    yield
    close_clients()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    close_clients()
    server.shutdown()
    server.server_close()


@pytest.fixture
def gateway(server: Server) -> Client:
    return get_client(server.serve(socket.AF_INET, ("127.0.0.1", 0)), token="secret-token")


def event(number: int, kind: str = "progress", **data: Any) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


END = event(3, "stream.end", status="SUCCESSFUL", result=42)


def test_submit_sends_task_arguments_token_and_a_key(gateway: Client, server: Server) -> None:
    server.script = [document(202, {"id": RUN})]
    assert gateway.submit("demo.count", [1], {"n": 2}, priority=5, pool=None)["id"] == RUN
    (request,) = server.requests
    assert request.body == {"task": "demo.count", "args": [1], "kwargs": {"n": 2}, "priority": 5}
    assert request.headers["Authorization"] == "Bearer secret-token"
    assert request.headers["Idempotency-Key"]


def test_a_submit_whose_answer_was_lost_is_repeated_under_the_same_key(
    gateway: Client, server: Server
) -> None:
    server.script = [
        hang_up,
        document(503, {"detail": "unknown"}, Retry_After="0"),
        document(200, {"id": RUN}),
    ]
    assert gateway.submit("demo.count")["id"] == RUN
    assert len({request.headers["Idempotency-Key"] for request in server.requests}) == 1
    assert len(server.requests) == 3


def test_a_cancel_whose_answer_was_lost_is_not_repeated(gateway: Client, server: Server) -> None:
    server.script = [hang_up]
    with pytest.raises(GatewayError, match="no answer"):
        gateway.cancel(RUN, grace=1.5)
    assert server.requests[0].body == {"grace": 1.5}


def test_a_refusal_is_an_error_with_its_problem(gateway: Client, server: Server) -> None:
    server.script = [document(422, {"detail": "bad arguments", "errors": {"n": "is required"}})]
    with pytest.raises(GatewayError, match="n: is required") as caught:
        gateway.submit("demo.count")
    assert caught.value.problem["status"] == 422
    assert "secret-token" not in str(caught.value) + repr(gateway)


def test_nobody_there_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PATIENCE", 0.05)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(GatewayError, match="bulkhead status"):
            get_client(url).runs()


def test_an_answer_that_is_no_json_object_is_an_error(gateway: Client, server: Server) -> None:
    server.script = [stream(b"hello")]
    with pytest.raises(GatewayError, match="JSON object"):
        gateway.tasks()


@pytest.mark.parametrize("url", ["", "localhost:8888", "ftp://x", "http://"])
def test_a_wrong_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(GatewayError, match="http://HOST:PORT"):
        get_client(url)


def test_follow_resumes_where_a_connection_broke(gateway: Client, server: Server) -> None:
    server.script = [
        stream(b"retry: 1\n\n" + event(1, step=1) + event(2, step=2)[:-1], broken=True),
        hang_up,
        document(502, {}),
        stream(event(2, step=2)),
        stream(END),
    ]
    events = list(gateway.follow(RUN))
    assert [(e.id, e.type) for e in events] == [("1", "progress"), ("2", "progress"), ("3", "stream.end")]
    assert [r.headers.get("Last-Event-ID") for r in server.requests] == [None, "1", "1", "1", "2"]


def test_follow_from_behind_the_end_is_empty(gateway: Client, server: Server) -> None:
    server.script = [no_content]
    assert list(gateway.follow(RUN, after="3")) == []


@pytest.mark.parametrize("word", ["latest", "now"])
def test_joining_words_become_a_cursor_before_the_stream_begins(
    gateway: Client, server: Server, word: str
) -> None:
    events = [{"id": "7", "type": "progress", "data": {"step": 7}}] if word == "latest" else []
    page = {"events": events, "next": "7", "ended": False}
    server.script = [hang_up, document(200, page), stream(b"", broken=True), stream(event(8) + END)]
    seen = [event.id for event in gateway.follow(RUN, after=word, types=["progress"])]
    assert seen == [event["id"] for event in events] + ["8", "3"]
    assert server.requests[1].path == f"/api/v1/runs/{RUN}/events?after={word}&types=progress"
    assert server.requests[1].headers["Accept"] == "application/json"
    assert [r.headers.get("Last-Event-ID") for r in server.requests] == [None, None, "7", "7"]


def test_joining_a_run_that_has_ended_is_empty(gateway: Client, server: Server) -> None:
    server.script = [document(200, {"events": [], "next": "9", "ended": True})]
    assert list(gateway.follow(RUN, after="now")) == []


def test_a_busy_gateway_is_obeyed_and_not_mentioned(gateway: Client, server: Server) -> None:
    server.script = [stream(b"retry: 300\nevent: stream.busy\ndata: {}\n\n"), stream(event(1) + END)]
    started = time.monotonic()
    assert [event.id for event in gateway.follow(RUN)] == ["1", "3"]
    assert time.monotonic() - started >= 0.3


def test_a_reset_is_passed_on_and_is_the_cursor(gateway: Client, server: Server) -> None:
    reset = event(41, "stream.reset", **{"from": 42, "reason": "trimmed"})
    server.script = [stream(reset, broken=True), stream(event(42) + END)]
    events = list(gateway.follow(RUN, after="7"))
    assert [event.type for event in events] == ["stream.reset", "progress", "stream.end"]
    assert events[0].data == {"from": 42, "reason": "trimmed"}
    assert [r.headers["Last-Event-ID"] for r in server.requests] == ["7", "41"]


class Tokens:
    """Returns a new token each time that it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> str:
        self.asked += 1
        return f"token-{self.asked}"

    async def wait(self) -> str:
        """Return the next one later."""
        await anyio.lowlevel.checkpoint()
        return self()


EXPIRED = document(401, {"detail": "the token has expired"})


def test_an_expired_token_is_renewed_in_calls_and_streams(server: Server) -> None:
    tokens = Tokens()
    client = get_client(server.serve(socket.AF_INET, ("127.0.0.1", 0)), token=tokens)
    server.script = [EXPIRED, document(202, {"id": RUN}), stream(event(1)), EXPIRED, stream(event(2) + END)]
    client.submit("demo.count")
    assert [event.id for event in client.follow(RUN)] == ["1", "2", "3"]
    sent = [request.headers["Authorization"].removeprefix("Bearer token-") for request in server.requests]
    assert sent == ["1", "2", "2", "2", "3"]
    server.script = [EXPIRED, EXPIRED]
    with pytest.raises(GatewayError, match="expired"):
        client.status(RUN)


async def test_the_token_of_asynchronous_calls_may_be_waited_for(server: Server) -> None:
    tokens = Tokens()
    client = get_client(server.serve(socket.AF_INET, ("127.0.0.1", 0)), token=tokens.wait)
    server.script = [EXPIRED, document(202, {"id": RUN}), EXPIRED, stream(END)]
    await client.asubmit("demo.count")
    async with aclosing(client.afollow(RUN)) as events:
        assert [event.id async for event in events] == ["3"]
    await client.aclose()
    assert tokens.asked == 3
    with pytest.raises(GatewayError, match="plain function"):
        get_client(client.base_url, token=Tokens().wait).runs()


def test_many_followers_keep_nobody_waiting(gateway: Client, server: Server) -> None:
    server.script = [stream(event(1))] * 120 + [document(200, {})]
    followers = [gateway.follow(RUN) for _ in range(120)]
    assert {next(follower).id for follower in followers} == {"1"}
    assert gateway.runs() == {}
    for follower in followers:
        follower.close()  # type: ignore[attr-defined]


def test_follow_of_a_run_that_is_not_there_raises(gateway: Client, server: Server) -> None:
    server.script = [document(404, {"detail": "no such run"})]
    with pytest.raises(GatewayError, match="no such run"):
        next(gateway.follow(RUN))


def test_follow_asks_where_the_gateway_is_after_a_failure(server: Server, gateway: Client) -> None:
    server.script = [stream(event(1), broken=True), stream(event(2)), stream(END)]
    asked: list[str] = []

    def locate() -> str | None:
        asked.append("")
        return gateway.base_url

    with socket.create_server(("127.0.0.1", 0)) as taken:
        elsewhere = get_client(f"http://127.0.0.1:{taken.getsockname()[1]}")
    events = list(elsewhere.follow(RUN, locate=locate))
    assert [e.id for e in events] == ["1", "2", "3"]
    assert len(asked) == 2, "a stream that ended cleanly is no failure"


def test_what_locate_raises_ends_the_following(server: Server, gateway: Client) -> None:
    server.script = [hang_up]

    def locate() -> str | None:
        raise LookupError("the tree has stopped")

    with pytest.raises(LookupError):
        list(gateway.follow(RUN, locate=locate))


def test_follow_gives_up_after_its_patience(gateway: Client, server: Server) -> None:
    server.script = [hang_up] * 1000
    with pytest.raises(GatewayError, match="did not come back"):
        next(gateway.follow(RUN, patience=0.05))


def test_result_polls_until_the_end(gateway: Client, server: Server) -> None:
    running, done = {"status": "RUNNING"}, {"status": "SUCCESSFUL", "result": 42}
    server.script = [document(202, running), document(202, running), document(200, done)]
    assert gateway.result(RUN) == 42
    assert server.requests[0].headers["Prefer"] == "wait=30"


def test_result_times_out_without_changing_anything(gateway: Client, server: Server) -> None:
    server.script = [document(202, {"status": "RUNNING"})]
    with pytest.raises(TimeoutError):
        gateway.result(RUN, timeout=0)
    assert [request.method for request in server.requests] == ["GET"]


@pytest.mark.parametrize(
    ("status", "ending", "expected"),
    [
        ("FAILED", "raised", RunFailed),
        ("FAILED", "crashed", RunCrashed),
        ("FAILED", "timed_out", RunTimedOut),
        ("FAILED", "lost", RunLost),
        ("CANCELLED", None, RunWasCancelled),
        ("FAILED", None, RunFailed),
    ],
)
def test_result_of_a_run_that_failed_raises_how(
    gateway: Client, server: Server, status: str, ending: str | None, expected: type[Exception]
) -> None:
    attempts = [{"ending": "raised"}, {"ending": ending}] if ending else []
    snapshot = {"id": RUN, "status": status, "error": {"message": "it broke"}, "attempts": attempts}
    server.script = [document(200, {"status": status, "error": {}}), document(200, snapshot)]
    with pytest.raises(expected, match="it broke") as caught:
        gateway.result(RUN)
    assert type(caught.value) is expected
    assert caught.value.snapshot == snapshot  # type: ignore[attr-defined]


def test_lines_are_what_the_run_printed(gateway: Client, server: Server) -> None:
    server.script = [
        stream(event(1, "log", text="eins") + event(2, "progress", value="zwei"), broken=True),
        stream(event(3, "log", text="drei ü\nvier\n") + event(4, "other", n=1) + END),
    ]
    assert list(gateway.lines(RUN)) == ["eins", "zwei", "drei ü", "vier"]
    assert [request.path for request in server.requests] == [f"/api/v1/runs/{RUN}/events?include=log"] * 2


def test_a_unix_socket_is_an_address(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server.script = [document(200, {"tasks": []}), document(200, {"runners": []})]
    assert get_client(server.serve(socket.AF_UNIX, path)).tasks() == {"tasks": []}
    assert get_client("http://localhost", uds=path).runners() == {"runners": []}


def test_a_proxy_of_the_environment_does_not_stand_before_loopback(
    gateway: Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server.script = [document(200, {})]
    assert gateway.runs(limit=3) == {}
    assert server.requests[0].path == "/api/v1/runs?limit=3"


def test_clients_of_one_url_share_a_connection_and_a_fork_opens_its_own(
    gateway: Client, server: Server
) -> None:
    server.script = [document(200, {})] * 2
    gateway.runs()
    shared = connections.shared(gateway._address)
    assert connections.shared(Client(gateway.base_url)._address) is shared
    child = os.fork()
    if child == 0:
        os._exit(0 if connections._clients == {} and not connections._lock.locked() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert connections.shared(gateway._address) is shared


async def _use(gateway: Client) -> tuple[dict[str, Any], list[StreamEvent], Any]:
    answer = await gateway.asubmit("demo.count", kwargs={"n": 2})
    async with aclosing(gateway.afollow(RUN)) as events:
        seen = [event async for event in events]
    result = await gateway.aresult(RUN)
    await gateway.aclose()
    return answer, seen, result


SCRIPT = [
    hang_up,
    document(202, {"id": RUN}),
    stream(event(1, step=1), broken=True),
    stream(event(2, step=2) + END),
    document(200, {"status": "SUCCESSFUL", "result": 42}),
]


async def test_the_asynchronous_twins_in_trio(gateway: Client, server: Server) -> None:
    server.script = list(SCRIPT)
    answer, seen, result = await _use(gateway)
    assert (answer["id"], [e.id for e in seen], result) == (RUN, ["1", "2", "3"], 42)


def test_the_asynchronous_twins_in_asyncio_again_and_again(gateway: Client, server: Server) -> None:
    for _ in range(2):  # each asyncio.run is another event loop: a connection of the first must not be used
        server.script = list(SCRIPT)
        answer, seen, result = asyncio.run(_use(gateway))
        assert (answer["id"], [e.id for e in seen], result) == (RUN, ["1", "2", "3"], 42)


def test_every_call_has_its_twin() -> None:
    names = {name for name in vars(Client) if not name.startswith("_")}
    plain = {name for name in names if f"a{name}" in names}
    assert plain >= {"submit", "follow", "lines", "result", "cancel", "status", "runs", "tasks", "close"}
    assert names == plain | {f"a{name}" for name in plain}


def moved(url: str) -> Callable[[Handler], None]:
    """Send the client to the same path elsewhere."""

    def answer(handler: Handler) -> None:
        handler.send_response(307)
        handler.send_header("Location", url + handler.path)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.fixture
def elsewhere() -> Iterator[tuple[Server, str]]:
    server = Server()
    yield server, server.serve(socket.AF_INET, ("127.0.0.1", 0))
    close_clients()
    server.shutdown()
    server.server_close()


def test_a_call_goes_to_the_node_that_has_the_run(
    server: Server, gateway: Client, elsewhere: tuple[Server, str]
) -> None:
    other, url = elsewhere
    server.script = [moved(url)]
    other.script = [document(202, {"id": RUN})]
    assert gateway.cancel(RUN, grace=2) == {"id": RUN}
    [asked] = other.requests
    assert (asked.method, asked.path, asked.body) == ("POST", f"/api/v1/runs/{RUN}/cancel", {"grace": 2})
    assert asked.headers["Authorization"] == "Bearer secret-token"


def test_nobody_is_sent_around_for_ever(
    server: Server, gateway: Client, elsewhere: tuple[Server, str]
) -> None:
    other, url = elsewhere
    server.script = [moved(url)] * 9
    other.script = [moved(gateway.base_url)] * 9
    with pytest.raises(GatewayError) as caught:
        gateway.status(RUN)
    assert caught.value.problem["status"] == 307
    assert len(server.requests) + len(other.requests) == calls.MOVES + 1


def test_a_stream_goes_on_at_the_node_that_has_the_run_by_now(
    server: Server, gateway: Client, elsewhere: tuple[Server, str]
) -> None:
    other, url = elsewhere
    server.script = [stream(event(1)), moved(url)]
    other.script = [stream(event(2) + event(3, "stream.end"))]
    assert [one.id for one in gateway.follow(RUN)] == ["1", "2", "3"]
    assert other.requests[0].headers["Last-Event-ID"] == "1"


async def test_so_it_does_asynchronously(
    server: Server, gateway: Client, elsewhere: tuple[Server, str]
) -> None:
    other, url = elsewhere
    server.script = [moved(url), moved(url)]
    other.script = [document(200, {"id": RUN}), stream(event(1, "stream.end"))]
    assert await gateway.astatus(RUN) == {"id": RUN}
    async with aclosing(gateway.afollow(RUN)) as events:
        assert [one.type async for one in events] == ["stream.end"]
    await connections.aclose(connections.Address.parse(url))
    await gateway.aclose()


def test_a_node_that_has_died_is_not_insisted_on(server: Server, gateway: Client) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
        server.script = [moved(gone), document(200, {"id": RUN})]
        assert gateway.status(RUN) == {"id": RUN}
        server.script = [moved(gone), stream(event(1, "stream.end"))]
        assert [one.type for one in gateway.follow(RUN)] == ["stream.end"]
