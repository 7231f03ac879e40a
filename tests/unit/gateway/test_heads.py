"""Which heads are refused, and what the others come to."""

from __future__ import annotations

import h11
import pytest

from gateway import heads


def request(
    target: str = "/x", *headers: tuple[str, str], method: str = "GET", version: str = "1.1"
) -> h11.Request:
    return h11.Request(
        method=method, target=target, headers=[("Host", "here"), *headers], http_version=version.encode()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (request(), None),
        (request(version="1.0"), None),
        (request(version="1.2"), "http-version"),
        (request(version="2.0"), "http-version"),
        (request("/" + "x" * 1000), "headers-too-large"),
        (request("/x", ("X", "x" * 1000)), "headers-too-large"),
        (request("/x", *[("X", "")] * 200), "headers-too-large"),
        (request("/x", ("Content-Length", "5")), None),
        (request("/x", ("Transfer-Encoding", "chunked")), None),
        (request("/x", ("Content-Length", "5"), ("Transfer-Encoding", "chunked")), "ambiguous-length"),
        (request("/x", ("Transfer-Encoding", "chunked"), ("Content-Length", "5")), "ambiguous-length"),
        (request("/x", ("Transfer-Encoding", "chunked"), version="1.0"), "ambiguous-length"),
        (request(method="get"), "not-implemented"),
        (request(method="M-SEARCH"), None),
    ],
)
def test_refusals(head: h11.Request, code: str | None) -> None:
    assert heads.refusal(head, 1000) == code


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        ("/x?y#z", "/x?y#z", "here"),
        ("//there/x", "//there/x", "here"),
        ("http://there/x?y", "/x?y", "there"),
        ("HTTPS://there:81", "/", "there:81"),
        ("http://[::1]:81?y", "/?y", "[::1]:81"),
    ],
)
def test_targets_become_paths(target: str, path: str, host: str) -> None:
    found = heads.in_origin_form(request(target, ("X", "y")))
    assert found is not None
    assert found.target.decode() == path
    assert list(found.headers) == [(b"host", host.encode()), (b"x", b"y")]


@pytest.mark.parametrize(
    "target", ["x", "*", "host:443", "ftp://there/x", "http:///x", "http://me@there/x", "?x"]
)
def test_other_targets_are_none(target: str) -> None:
    assert heads.in_origin_form(request(target)) is None


def test_a_star_is_for_options() -> None:
    assert heads.in_origin_form(request("*", method="OPTIONS")) is not None


def test_a_header_is_taken_out() -> None:
    plain = request("/x", ("A", "b"))
    assert heads.without(plain, b"upgrade") is plain
    assert heads.without(request("/x", ("Upgrade", "h2c"), ("A", "b")), b"upgrade").headers == plain.headers


def parser(data: bytes) -> heads.Parser:
    found = heads.Parser(h11.SERVER)
    found.receive_data(data)
    return found


def test_behind_the_last_request_comes_nothing() -> None:
    last = parser(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n\0garbage")
    assert isinstance(last.next_event(), h11.Request)
    assert isinstance(last.next_event(), h11.EndOfMessage)
    assert last.next_event() is h11.NEED_DATA
    assert last.is_through


def test_behind_any_other_request_comes_another() -> None:
    two = parser(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\0garbage")
    assert isinstance(two.next_event(), h11.Request)
    assert isinstance(two.next_event(), h11.EndOfMessage)
    assert two.next_event() is h11.PAUSED
    assert not two.is_through
