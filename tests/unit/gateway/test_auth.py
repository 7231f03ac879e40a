"""Authentication: where a token may stand, which hosts are ours."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from gateway.auth import Authenticator, HostGuard, host_of, is_allowed_host
from gateway.cookies import COOKIE
from taskkit.errors import Forbidden
from taskkit.tokens import TokenError, issue
from tests.unit.gateway.fakes import StubEngine

KEY = b"k" * 32
TOKEN = issue(KEY, actions=["read"], runs="*", ttl=600, subject="ann")


def request(method: str = "GET", *headers: tuple[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    return Request({"type": "http", "method": method, "path": "/", "headers": raw, "query_string": b""})


def authenticator(*origins: str) -> Authenticator:
    return Authenticator(KEY, [], origins, desk=StubEngine())


class TestTokens:
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_a_bearer_token_counts(self, scheme: str) -> None:
        asked = request("POST", ("Authorization", f"{scheme} {TOKEN}"))
        assert authenticator().claims(asked).subject == "ann"

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_cookie_reads(self, method: str) -> None:
        asked = request(method, ("Cookie", f"other=1; {COOKIE}={TOKEN}"))
        assert authenticator().claims(asked).subject == "ann"

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    def test_a_cookie_changes_nothing(self, method: str) -> None:
        self.refused(request(method, ("Cookie", f"{COOKIE}={TOKEN}")), "missing")

    def test_a_bad_header_is_not_made_good_by_a_cookie(self) -> None:
        self.refused(
            request("GET", ("Authorization", "Bearer x"), ("Cookie", f"{COOKIE}={TOKEN}")), "malformed"
        )

    def test_no_token(self) -> None:
        self.refused(request(), "missing")
        self.refused(request("GET", ("Authorization", "Bearer ")), "missing")

    @pytest.mark.parametrize("value", ["Basic YTpi", TOKEN, f"Bearer {TOKEN} {TOKEN}", ""])
    def test_another_header(self, value: str) -> None:
        self.refused(request("GET", ("Authorization", value)), "malformed")

    def test_two_headers(self) -> None:
        header = ("Authorization", f"Bearer {TOKEN}")
        self.refused(request("GET", header, header), "malformed")

    def test_a_token_in_the_query_does_not_count(self) -> None:
        asked = request()
        asked.scope["query_string"] = f"token={TOKEN}&ticket={TOKEN}".encode()
        self.refused(asked, "missing")

    @pytest.mark.parametrize(
        ("origin", "counts"),
        [
            ("http://localhost:8888", True),
            ("https://app.example", True),
            ("https://evil.example", False),
            ("null", False),
            ("", False),
        ],
    )
    def test_a_cookie_counts_for_pages_of_this_site_and_allowed_ones(self, origin: str, counts: bool) -> None:
        asked = request(
            "GET", ("Cookie", f"{COOKIE}={TOKEN}"), ("Host", "localhost:8888"), ("Origin", origin)
        )
        if counts:
            authenticator("https://app.example").claims(asked)
        else:
            self.refused(asked, "missing", authenticator("https://app.example"))

    def test_a_cookie_that_does_not_count_is_told_the_remedy(self) -> None:
        def asked(method: str) -> Request:
            return request(
                method, ("Cookie", f"{COOKIE}={TOKEN}"), ("Host", "h"), ("Origin", "https://app.example")
            )

        with pytest.raises(TokenError, match="is not in CORS_ORIGINS"):
            authenticator().claims(asked("GET"))
        with pytest.raises(TokenError, match="GET and HEAD only"):
            authenticator().claims(asked("POST"))

    def test_require_tells_401_from_403(self) -> None:
        asked = request("POST", ("Authorization", f"Bearer {TOKEN}"))
        assert authenticator().require(asked, "read").may("read")
        with pytest.raises(Forbidden, match="'cancel'"):
            authenticator().require(asked, "cancel")
        with pytest.raises(TokenError):
            authenticator().require(request(), "read")

    def test_nothing_logs_or_tells_a_token(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        with pytest.raises(TokenError) as caught:
            authenticator().claims(request("GET", ("Authorization", f"Bearer {TOKEN}x")))
        authenticator().claims(request("GET", ("Authorization", f"Bearer {TOKEN}")))
        assert TOKEN not in caplog.text + repr(caught.value)

    def refused(self, asked: Request, code: str, by: Authenticator | None = None) -> None:
        with pytest.raises(TokenError) as caught:
            (by or authenticator()).claims(asked)
        assert caught.value.code == code


class TestHosts:
    @pytest.mark.parametrize(
        ("header", "host"),
        [
            ("localhost", "localhost"),
            ("LocalHost:8888", "localhost"),
            ("127.0.0.1:80", "127.0.0.1"),
            ("[::1]:8888", "[::1]"),
            ("example.com.", "example.com"),
            ("a b", None),
            ("evil/localhost", None),
            ("user@localhost", None),
            ("localhost:port", None),
            ("[::1", None),
            ("", None),
        ],
    )
    def test_a_host_header_is_read(self, header: str, host: str | None) -> None:
        assert host_of(header) == host

    @pytest.mark.parametrize(
        ("host", "patterns", "allowed"),
        [
            ("localhost", [], True),
            ("app.localhost", [], True),
            ("127.0.0.1", [], True),
            ("127.8.9.1", [], True),
            ("[::1]", [], True),
            ("127.evil.example", [], False),
            ("127.0.0.1.evil.example", [], False),
            ("evil.example", [], False),
            ("10.0.0.1", [], False),
            ("example.com", ["example.com"], True),
            ("example.com", ["EXAMPLE.com"], True),
            ("www.example.com", ["example.com"], False),
            ("example.com", [".example.com"], True),
            ("www.example.com", [".example.com"], True),
            ("badexample.com", [".example.com"], False),
            ("anything", ["*"], True),
            ("[2001:db8::1]", ["[2001:db8::1]"], True),
            ("", [""], True),
        ],
    )
    def test_patterns_are_djangos(self, host: str, patterns: list[str], allowed: bool) -> None:
        assert is_allowed_host(host, patterns) is allowed

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ([b"localhost:8888"], 200),
            ([b"app.example"], 200),
            ([], 200),
            ([b"evil.example"], 421),
            ([b"\xff"], 400),
            ([b"localhost", b"localhost"], 400),
        ],
    )
    async def test_the_guard(self, headers: list[bytes], status: int) -> None:
        messages = await self.guarded("http", headers)
        assert messages[0]["status"] == status
        if status != 200:
            assert (b"content-type", b"application/problem+json") in messages[0]["headers"]

    async def test_the_guard_refuses_websockets(self) -> None:
        start, _ = await self.guarded("websocket", [b"evil.example"])
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 421)

    async def test_the_guard_lets_the_lifespan_pass(self) -> None:
        assert (await self.guarded("lifespan", []))[0]["status"] == 200

    async def guarded(self, kind: str, hosts: list[bytes]) -> list[Message]:
        messages: list[Message] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> Message:
            raise AssertionError("nothing to receive")

        async def send(message: Message) -> None:
            messages.append(message)

        scope: dict[str, Any] = {"type": kind, "path": "/", "headers": [(b"host", host) for host in hosts]}
        await HostGuard(app, ["app.example"])(scope, receive, send)
        return messages
