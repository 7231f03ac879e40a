"""Tickets, revocation, expiry, bounds over a real tree; then a search for everything secret that it may have kept."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from taskkit import tokens
from tests.helpers import RawResponse, Tree, eventually, raw_get

SSE = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    """Give a tree with room for two streams of a token."""
    limits = {
        "streams_per_token": 2,
        "stop_grace_seconds": 3.0,
        "cancel_grace_seconds": 1.0,
        "kill_grace_seconds": 0.5,
    }
    with Tree(runners=4, env={"TASKKIT_LIMITS": json.dumps(limits)}) as tree:
        yield tree


@pytest.fixture(scope="module")
def run(tree: Tree) -> Iterator[str]:
    """Give a run that speaks until the end of the module."""
    id = tree.submit("proj.count", n=100_000, delay=0.05)["id"]
    yield id
    tree.http.post(f"/api/v1/runs/{id}/cancel", json={})
    tree.wait(id)


def key(tree: Tree) -> bytes:
    return tokens.load_key(tree.state_dir / "key")


def events_url(tree: Tree, run: str, query: str = "") -> str:
    return f"{tree.url}/api/v1/runs/{run}/events{query}"


def first_event(stream: RawResponse) -> str:
    """Return the id of the next event."""
    return next(iter(stream.events())).id


def ticket_of(tree: Tree, bearer: str, **wish: Any) -> str:
    answer = httpx.post(
        f"{tree.url}/api/v1/tickets",
        json=wish,
        headers={"Authorization": f"Bearer {bearer}"},
        trust_env=False,
    )
    assert answer.status_code == 201, answer.text
    return str(answer.json()["ticket"])


def cookie_of(stream: RawResponse) -> str:
    return stream.headers["set-cookie"].partition(";")[0]


def test_an_event_source_lives_on_one_ticket(tree: Tree, run: str) -> None:
    """What a browser does: the same URL again and again, the cookie of the first answer, Last-Event-ID."""
    bearer = tree.token(runs="*")
    url = events_url(tree, run, f"?ticket={ticket_of(tree, bearer, runs=[run], session=60)}")
    with raw_get(url, headers=SSE) as stream:
        assert stream.status == 200
        assert f"Path=/api/v1/runs/{run}/events; HttpOnly; SameSite=Lax" in stream.headers["set-cookie"]
        cookie, last = cookie_of(stream), first_event(stream)
    with raw_get(url, headers=SSE) as stranger:
        assert (stranger.status, json.loads(stranger.read())["type"][-11:]) == (401, "token-spent")
    with raw_get(url, headers=SSE | {"Cookie": cookie, "Last-Event-ID": last}) as stream:
        assert first_event(stream) == str(int(last) + 1)
    with raw_get(f"{tree.url}/api/v1/runs", headers={"Cookie": cookie}) as narrowed:
        assert [one["id"] for one in json.loads(narrowed.read())["runs"]] == [run]
    with raw_get(
        events_url(tree, run).replace("events", "cancel"), method="POST", headers={"Cookie": cookie}
    ) as post:
        assert post.status == 401
    with raw_get(events_url(tree, run), token=cookie.partition("=")[2]) as as_bearer:
        assert as_bearer.status == 401


def test_a_used_ticket_stays_used_when_the_gateway_is_killed(tree: Tree, run: str) -> None:
    url = events_url(tree, run, f"?ticket={tokens.issue_ticket(key(tree), runs='*', subject='t')}")
    with raw_get(url, headers=SSE) as stream:
        cookie, _ = cookie_of(stream), first_event(stream)
        # The stream has begun, so the ticket's use is committed.
        tree.kill("gateway", signal.SIGKILL)

    def asked(**headers: str) -> int | None:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            raw_get(url, headers=SSE | headers) as answer,
        ):
            return answer.status
        return None

    assert eventually(asked, 20, "the next gateway") == 401
    assert asked(Cookie=cookie) == 200


def test_a_revocation_ends_the_stream_at_once_for_good(tree: Tree, run: str) -> None:
    bearer = tree.token(runs="*", subject="leaver")
    url = events_url(tree, run, f"?ticket={ticket_of(tree, bearer)}")
    with (
        raw_get(events_url(tree, run), token=bearer, headers=SSE) as first,
        raw_get(url, headers=SSE) as second,
    ):
        cookie = cookie_of(second)
        first_event(first), first_event(second)
        with tree.stream(run) as another:
            answer = tree.http.post("/api/v1/tokens/revoke", json={"sub": "leaver"})
            assert (answer.status_code, answer.json()["ended_streams"]) == (200, 2)
            for stream in (first, second):
                assert all(event.type != "stream.end" for event in stream.events()), "it ends in its order"
            first_event(another), first_event(another)
    for headers in ({"Authorization": f"Bearer {bearer}"}, {"Cookie": cookie}):
        with raw_get(url, headers=SSE | headers) as back:
            assert (back.status, b"token-revoked" in back.read()) == (401, True)
    fresh = tree.token(runs="*", subject="leaver")
    assert raw_status(events_url(tree, run), fresh) == 200


def raw_status(url: str, bearer: str, **headers: str) -> int:
    with raw_get(url, token=bearer, headers=SSE | headers) as answer:
        return answer.status


def test_a_revocation_outlives_a_restart_of_the_gateway(tree: Tree) -> None:
    bearer = tree.token(runs="*")
    id = tokens.verify(key(tree), bearer).id
    assert tree.http.post("/api/v1/tokens/revoke", json={"jti": id}).status_code == 200
    tree.operate("restart-gateway", timeout=30)
    with raw_get(f"{tree.url}/api/v1/runs", token=bearer) as answer:
        assert (answer.status, b"token-revoked" in answer.read()) == (401, True)


def test_a_stream_ends_with_its_token(tree: Tree, run: str) -> None:
    bearer = tree.token(runs="*", ttl=2)
    expires_at = tokens.verify(key(tree), bearer).expires_at
    with raw_get(events_url(tree, run), token=bearer, headers=SSE) as stream:
        types = {event.type for event in stream.events()}
        assert "stream.end" not in types
    assert 0 <= time.time() - expires_at < 5, "it ended, and not before its time"
    with raw_get(events_url(tree, run), token=bearer, headers=SSE) as back:
        assert (back.status, b"token-expired" in back.read()) == (401, True)


def test_a_token_has_so_many_streams(tree: Tree, run: str) -> None:
    bearer = tree.token(runs="*")
    with (
        raw_get(events_url(tree, run), token=bearer, headers=SSE) as first,
        raw_get(events_url(tree, run, f"?ticket={ticket_of(tree, bearer)}"), headers=SSE) as second,
    ):
        first_event(first), first_event(second)
        with raw_get(events_url(tree, run), token=bearer, headers=SSE) as third:
            assert (third.status, [event.type for event in third.events()]) == (200, ["stream.busy"])
            assert 5_000 <= third.decoder.retries[0] <= 15_000
        with raw_get(
            events_url(tree, run), token=bearer, headers={"Accept": "application/x-ndjson"}
        ) as plain:
            assert (plain.status, plain.headers["retry-after"]) == (429, "5")
    # A place is free when the gateway has seen that its client has gone.
    eventually(lambda: _opens(tree, run, bearer), 5, "a place")


def _opens(tree: Tree, run: str, bearer: str) -> bool:
    with raw_get(events_url(tree, run), token=bearer, headers=SSE) as stream:
        return next(iter(stream.events())).type != "stream.busy"


def test_the_eleventh_bad_token_is_429(tree: Tree) -> None:
    # From an address of its own: every one in 127.0.0.0/8 is this machine.
    transport = httpx.HTTPTransport(local_address="127.0.0.9")
    with httpx.Client(transport=transport, base_url=tree.url) as client:
        bad = {"Authorization": "Bearer nonsense"}
        answers = [
            client.get("/api/v1/runs", headers=bad | {"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(12)
        ]
        assert [answer.status_code for answer in answers] == [401] * 10 + [429] * 2
        assert answers[-1].json()["type"] == "urn:bulkhead:problem:too-many-failures"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        good = {"Authorization": f"Bearer {tree.token(runs='*')}"}
        assert client.get("/api/v1/runs", headers=good).status_code == 200
    assert tree.http.get("/api/v1/runs").status_code == 200


# --- what must not be found anywhere


_addresses = itertools.count()


def raw_request(tree: Tree, head: str) -> bytes:
    """Send bytes as they are, from an address that has not failed yet; return the answer."""
    parts, n = urlsplit(tree.url), next(_addresses)
    source = f"127.1.{n // 250}.{1 + n % 250}", 0
    with socket.create_connection((parts.hostname, parts.port), 10, source) as sock:
        sock.sendall(head.encode("utf-8", "surrogateescape"))
        sock.shutdown(socket.SHUT_WR)
        found = b""
        while data := sock.recv(65536):
            found += data
        return found


def present(tree: Tree, *texts: str) -> None:
    """Pass texts in every way there is, well formed or not, to routes that are and are not."""
    for text in texts:
        for head in heads_of(text):
            with contextlib.suppress(OSError):  # a reset is an answer, too
                raw_request(tree, head)


def heads_of(text: str) -> list[str]:
    """Return heads of requests that have the text somewhere."""
    heads = [
        f"GET /api/v1/runs?{name}={text} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        for name in ("ticket", "token", "x", f"{text}&ticket", "ticket=%ff&ticket")
    ]
    heads += [
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{header}\r\nConnection: close\r\n\r\n"
        for method, path in (
            ("GET", "/api/v1/runs"),
            ("POST", "/api/v1/runs"),
            ("GET", "/nowhere"),
            ("BREW", "/"),
        )
        for header in (
            f"Authorization: Bearer {text}",
            f"Authorization: Basic {text}",
            f"Authorization: {text}",
            f"Authorization: Bearer {text} {text}",
            f"Authorization: Bearer {text}\xff\x01",
            f"Authorization Bearer {text}",
            f"Cookie: bulkhead_token={text}",
            f"Cookie: bulkhead_token={text}; bulkhead_session_a={text}; {text}",
            f"X-Token: {text}",
        )
    ]
    heads += [
        f"GET /ws?token={text} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        f"GET /api/v1/runs?ticket={text} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        f"GET /api/v1/runs?ticket={text} HTTP/9.9\r\nHost: localhost\r\n\r\n",
        f"GET /api/v1/runs?ticket={text}\r\n\r\n",
        f"{text}\r\n\r\n",
    ]
    return heads


def test_no_token_ticket_or_cookie_is_kept_anywhere(tree: Tree) -> None:
    signed = key(tree)
    good = tree.token(runs="*")
    ticket, used = (tokens.issue_ticket(signed, runs="*", subject="t") for _ in range(2))
    with raw_get(f"{tree.url}/api/v1/runs?ticket={used}") as answer:
        session = cookie_of(answer).partition("=")[2]
    texts = [good, ticket, used, session, tree.submit("proj.boom")["token"]]
    present(tree, good, ticket, session)
    assert (
        tree.http.post("/api/v1/tokens/revoke", json={"jti": tokens.verify(signed, good).id}).status_code
        == 200
    )
    present(tree, good)
    files = [path for path in tree.state_dir.rglob("*") if path.is_file() and path.name != "key"]
    kept = {path.name: path.read_bytes() for path in files}
    assert {"tree.log", "store.sqlite3", "store.sqlite3-wal"} <= set(kept)
    jti = tokens.read_ticket(signed, used).id.encode()
    assert any(jti in data for data in kept.values()), "this search finds what is there"
    # The signature is the part that nobody can make up.
    secrets = [text.rpartition(".")[2].encode() for text in texts] + [
        (tree.state_dir / "key").read_bytes().strip()
    ]
    assert [(name, secret) for name, data in kept.items() for secret in secrets if secret in data] == []
