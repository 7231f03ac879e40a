"""The file that the gateway serves to browsers: for everybody, with a tag to ask for news by."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

import gateway
from gateway.problems import exception_handlers
from gateway.reading import Refusal, on_refusal
from gateway.script import Script, has_tag

FILE = Path(gateway.__path__[0]) / "tasks.js"


async def ask(method: str = "GET", query: str = "", **headers: str) -> httpx.Response:
    """Ask for the file without any token."""
    app = Starlette(routes=Script().routes(), exception_handlers={**exception_handlers, Refusal: on_refusal})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.request(method, f"/tasks.js{query}", headers=named)


async def test_everybody_gets_the_file_as_javascript() -> None:
    response = await ask(Origin="https://elsewhere.example")
    assert response.status_code == 200
    assert response.content == FILE.read_bytes()
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_who_has_it_is_told_so_and_nothing_more() -> None:
    tag = (await ask()).headers["etag"]
    again = await ask(If_None_Match=tag)
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    assert again.headers["access-control-allow-origin"] == "*"
    assert (await ask(If_None_Match='"another"')).status_code == 200


async def test_head_has_no_body_and_other_methods_are_refused() -> None:
    head = await ask("HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(FILE.stat().st_size)
    refused = await ask("POST")
    assert refused.status_code == 405
    assert refused.headers["content-type"] == "application/problem+json"
    assert (await ask(query="?v=1")).status_code == 400


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", False),
        ('"a"', True),
        ('W/"a"', True),
        ('"b", W/"a"', True),
        ("*", True),
        ('"b"', False),
        ("a", False),
    ],
)
def test_tags_are_compared_weakly(header: str, expected: bool) -> None:
    assert has_tag(header, '"a"') is expected
