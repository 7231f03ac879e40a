"""Problems: every error of ours has one shape, and nothing but that shape leaves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.problems import CODES, MEDIA_TYPE, TYPE_PREFIX, code_of, document, exception_handlers, problem
from gateway.store.protocol import StoreError
from taskkit import errors
from taskkit.errors import Forbidden, InvalidArguments, LifecycleError, NotWritable, QueueFull, SubmitError
from taskkit.tokens import TokenError, TokenProblem


def subclasses(cls: type[SubmitError]) -> Iterator[type[SubmitError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from subclasses(sub)


async def answer_to(error: Exception, method: str = "GET") -> httpx.Response:
    """Return what a client gets when a route raises `error`."""

    async def fail(request: Request) -> Response:
        raise error

    app = Starlette(
        routes=[Route("/fail", fail, methods=["GET", "POST"])], exception_handlers=dict(exception_handlers)
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, "/fail?ticket=secret")


def checked(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, Any] = answer.json()
    assert answer.status_code == body["status"] == status
    assert body["type"] == TYPE_PREFIX + code
    assert body["title"] == CODES[code].title
    assert body["detail"]
    return body


class TestMapping:
    @pytest.mark.parametrize("cls", list(subclasses(SubmitError)))
    async def test_every_submit_error_is_a_problem(self, cls: type[SubmitError]) -> None:
        assert (cls.code, cls.status) == (cls.code, CODES[cls.code].status)
        body = checked(await answer_to(cls("why")), cls.status, cls.code)
        assert body["detail"] == "why"
        assert body["instance"] == "/fail"
        assert not {"errors", "run"} & body.keys()
        assert ("retry_after" in body) == (cls.status in (429, 503)), "whatever passes by itself says when"

    async def test_errors_by_field_are_shown(self) -> None:
        error = InvalidArguments("2 arguments do not fit", errors={"n": "must be a number", "x": "unknown"})
        assert checked(await answer_to(error), 422, "invalid-arguments")["errors"] == error.errors

    async def test_when_to_try_again_is_shown_twice(self) -> None:
        answer = await answer_to(QueueFull("10,000 runs wait", retry_after=1.2))
        assert answer.headers["retry-after"] == "2"
        assert checked(answer, 429, "queue-full")["retry_after"] == 1.2

    async def test_the_run_to_retry_with_is_shown(self) -> None:
        answer = await answer_to(NotWritable("disk full", run="an-id", retry_after=1))
        assert checked(answer, 503, "not-writable")["run"] == "an-id"

    async def test_forbidden_names_the_scope(self) -> None:
        answer = await answer_to(Forbidden("the token does not allow 'submit'"))
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]

    @pytest.mark.parametrize("code", get_args(TokenProblem))
    async def test_every_token_error_is_a_401(self, code: TokenProblem) -> None:
        answer = await answer_to(TokenError(code, 'a "quoted"\nreason'))
        checked(answer, 401, f"token-{code}")
        challenge = answer.headers["www-authenticate"]
        assert challenge.startswith('Bearer realm="bulkhead"')
        assert ("error=" in challenge) is (code != "missing")
        assert '"quoted"' not in challenge

    async def test_a_run_that_has_ended_is_a_conflict(self) -> None:
        checked(await answer_to(LifecycleError("the run has ended")), 409, "run-finished")

    async def test_a_store_that_does_not_answer_is_unavailable(self) -> None:
        answer = await answer_to(StoreError("/var/lib/secret: disk full"))
        assert "secret" not in answer.text
        assert answer.headers["retry-after"] == "2"
        checked(answer, 503, "not-writable")

    async def test_a_client_that_left_is_no_incident(self, caplog: pytest.LogCaptureFixture) -> None:
        checked(await answer_to(ClientDisconnect()), 400, "client-gone")
        assert "incident" not in caplog.text

    async def test_no_route(self) -> None:
        app = Starlette(exception_handlers=dict(exception_handlers))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            body = checked(await client.get("/nowhere"), 404, "not-found")
        assert body["detail"] == "GET /nowhere"

    async def test_a_method_that_is_not_allowed_names_those_that_are(self) -> None:
        answer = await answer_to(RuntimeError(), "DELETE")
        checked(answer, 405, "method-not-allowed")
        assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}

    @pytest.mark.parametrize("status", [400, 403, 404, 405, 406, 413, 415, 418, 431, 500, 501, 503])
    async def test_any_http_exception_is_a_problem(self, status: int) -> None:
        checked(await answer_to(HTTPException(status, "why")), status, code_of(status))

    async def test_what_nobody_foresaw_tells_an_incident_only(self, caplog: pytest.LogCaptureFixture) -> None:
        error = ZeroDivisionError("secret")
        answer = await answer_to(error)
        body = checked(answer, 500, "internal")
        assert "secret" not in answer.text
        assert "ZeroDivisionError" not in answer.text
        (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
        assert f"incident {body['incident']}: ZeroDivisionError in GET /fail" in record.getMessage()
        assert error.__notes__ == [f"incident {body['incident']}"]
        assert "secret" not in record.getMessage()


class TestDocuments:
    def test_every_code_has_an_error_status_and_a_title(self) -> None:
        for code, (status, title) in CODES.items():
            assert 400 <= status < 600
            assert title
            assert code == code.lower()
        assert errors.SubmitError.code in CODES

    def test_an_unknown_code_cannot_leave(self) -> None:
        with pytest.raises(KeyError):
            problem(400, "made-up", "detail")

    def test_members_that_are_none_are_left_out(self) -> None:
        body = json.loads(document(404, "unknown-run", "no such run", run=None, hint="x"))
        assert body == {
            "type": "urn:bulkhead:problem:unknown-run",
            "title": "Run not found",
            "status": 404,
            "detail": "no such run",
            "hint": "x",
        }

    def test_text_that_is_no_unicode_is_shown_all_the_same(self) -> None:
        assert json.loads(document(400, "bad-parameter", "cursor \udc80"))["detail"] == "cursor ?"

    def test_title_and_headers_can_be_given(self) -> None:
        answer = problem(None, "unknown-row", "no row 7", title="Task not found", headers={"Vary": "Accept"})
        assert answer.status_code == 404
        assert answer.headers["vary"] == "Accept"
        assert answer.headers["content-type"] == MEDIA_TYPE
