"""Errors as the outside sees them: RFC 9457 problem documents, one table of their codes.

Rule 1: a code is in CODES or cannot leave.

Rule 2: what a handler did not foresee tells the client an incident number and nothing else.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, NotRequired, TypedDict

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from gateway.store.protocol import StoreError
from taskkit.errors import Forbidden, LifecycleError, SubmitError
from taskkit.tokens import TokenError

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:bulkhead:problem:"

#: Seconds after which to try again when the store cannot be written: a full or locked disk is rarely better
#: sooner, and the idempotent retry costs little.
STORE_RETRY: Final = 2.0

Handler = Callable[[Request, Exception], Awaitable[Response]]


class Code(NamedTuple):
    """Default status and title of one problem type; both are for ever."""

    status: int
    title: str


CODES: Final[Mapping[str, Code]] = {
    # 400: the request itself
    "bad-request": Code(400, "Bad request"),
    "bad-json": Code(400, "Body is no JSON object"),
    "bad-parameter": Code(400, "Bad query parameter"),
    "bad-cursor": Code(400, "Bad cursor"),
    "bad-primary-key": Code(400, "Bad primary key"),
    "bad-host": Code(400, "Bad Host header"),
    "client-gone": Code(400, "Client disconnected"),
    "ambiguous-length": Code(400, "Length of the body is ambiguous"),
    # 401, 403: the token
    "token-missing": Code(401, "Token needed"),
    "token-malformed": Code(401, "Token is malformed"),
    "token-signature": Code(401, "Token has a wrong signature"),
    "token-expired": Code(401, "Token has expired"),
    "token-audience": Code(401, "Token is for somebody else"),
    "token-claims": Code(401, "Token has unusable claims"),
    "token-use": Code(401, "Token is for another use"),
    "token-spent": Code(401, "Ticket was used"),
    "token-revoked": Code(401, "Token was revoked"),
    "forbidden": Code(403, "Forbidden"),
    "cors": Code(403, "Not allowed across origins"),
    "wrong-origin": Code(403, "Origin is not served here"),
    # 404 … 431: the thing asked for
    "not-found": Code(404, "Not found"),
    "unknown-run": Code(404, "Run not found"),
    "unknown-task": Code(404, "Task not found"),
    "unknown-row": Code(404, "Task not found"),
    "unknown-runner": Code(404, "Runner not found"),
    "unknown-schedule": Code(404, "Schedule not found"),
    "method-not-allowed": Code(405, "Method not allowed"),
    "not-acceptable": Code(406, "Not acceptable"),
    "slow-body": Code(408, "Body too slow"),
    "idempotency-conflict": Code(409, "Idempotency key was used with another body"),
    "run-finished": Code(409, "Run has finished"),
    "run-open": Code(409, "Run has not finished"),
    "schedule-conflict": Code(409, "Schedule is another's, or the code's"),
    "not-started": Code(409, "Task has not been started"),
    "ambiguous-model": Code(409, "Several apps have such a model"),
    "not-incremental": Code(409, "Store cannot be made smaller while it is open"),
    "too-many-revocations": Code(409, "Too many revocations"),
    "result-expired": Code(410, "Result was removed"),
    "too-large": Code(413, "Body too large"),
    "too-many-runs": Code(413, "Too many runs on one connection"),
    "unsupported-media-type": Code(415, "Unsupported media type"),
    "wrong-host": Code(421, "Host is not served here"),
    "invalid-submission": Code(422, "Submission is invalid"),
    "invalid-arguments": Code(422, "Arguments do not fit the task"),
    "upgrade-required": Code(426, "WebSocket needed"),
    "queue-full": Code(429, "Queue is full"),
    "too-many-failures": Code(429, "Too many invalid tokens"),
    "too-many-streams": Code(429, "Too many streams of one token"),
    "headers-too-large": Code(431, "Request head too large"),
    # 5xx: us
    "internal": Code(500, "Internal error"),
    "not-implemented": Code(501, "Not implemented"),
    "not-writable": Code(503, "Not writable now"),
    "unavailable": Code(503, "Not available now"),
    "too-many-connections": Code(503, "Too many connections"),
    "http-version": Code(505, "HTTP version not supported"),
}

#: Headers that come with every problem of a status, each with its meaning.
HEADERS: Final[Mapping[int, Mapping[str, str]]] = {
    401: {"WWW-Authenticate": "The scheme, with what was wrong with the token (RFC 6750 §3)."},
    403: {"WWW-Authenticate": "The scheme, with `insufficient_scope` (RFC 6750 §3.1)."},
    405: {"Allow": "The methods that there are."},
    426: {"Upgrade": "`websocket`."},
    429: {"Retry-After": "Whole seconds until the same request may succeed."},
    503: {"Retry-After": "Whole seconds until the same request may succeed."},
}


class Problem(TypedDict):
    """An error (RFC 9457); `errors` has a message per field, `run` the id to send the same again with."""

    type: str
    title: str
    status: int
    detail: str
    instance: NotRequired[str]
    errors: NotRequired[dict[str, str]]
    retry_after: NotRequired[float]
    run: NotRequired[str]
    parameter: NotRequired[str]
    max_bytes: NotRequired[int]
    incident: NotRequired[str]
    index: NotRequired[int]


#: Codes for a bare HTTP status, as Starlette's router and hypercorn's parser raise it.
_BY_STATUS: Final[Mapping[int, str]] = {
    400: "bad-request",
    403: "forbidden",
    404: "not-found",
    405: "method-not-allowed",
    406: "not-acceptable",
    413: "too-large",
    415: "unsupported-media-type",
    426: "upgrade-required",
    431: "headers-too-large",
    500: "internal",
    501: "not-implemented",
    503: "unavailable",
    505: "http-version",
}


def code_of(status: int) -> str:
    """Return the general code of an HTTP error status."""
    return _BY_STATUS.get(status, "bad-request" if status < 500 else "internal")


def document(
    status: int,
    code: str,
    detail: str,
    *,
    title: str | None = None,
    instance: str | None = None,
    **extra: Any,
) -> bytes:
    """Return a problem document as JSON; `extra` are further members, those that are None are left out.

    Raises:
      KeyError: `code` is not in CODES. A bug of the caller.
    """
    members: dict[str, Any] = {
        "type": TYPE_PREFIX + code,
        "title": title or CODES[code].title,
        "status": status,
        "detail": detail,
        "instance": instance,
        **extra,
    }
    shown = {name: value for name, value in members.items() if value is not None}
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def problem(
    status: int | None,
    code: str,
    detail: str,
    *,
    title: str | None = None,
    instance: str | None = None,
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> Response:
    """Return a problem as a response. A `status` of None takes the one of CODES.

    Raises:
      KeyError: `code` is not in CODES. A bug of the caller.
    """
    used = CODES[code].status if status is None else status
    body = document(used, code, detail, title=title, instance=instance, **extra)
    return Response(
        body,
        used,
        # An error of now must not be served from a cache later.
        {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(headers or {})},
        media_type=MEDIA_TYPE,
    )


def from_submit_error(error: SubmitError, instance: str | None = None) -> Response:
    """Return the problem of a submission that cannot become a run."""
    headers = {}
    if (seconds := _retry_after(error)) is not None:
        # The header counts whole seconds (RFC 9110 §10.2.3); the member keeps the fraction.
        headers["Retry-After"] = str(math.ceil(seconds))
    if isinstance(error, Forbidden):
        headers["WWW-Authenticate"] = challenge("insufficient_scope", str(error))
    return problem(error.status, error.code, str(error), instance=instance, headers=headers, **_told(error))


def of_submit_error(error: SubmitError, instance: str, **extra: Any) -> bytes:
    """Return the same problem as a document, for an answer that holds others beside it."""
    return document(error.status, error.code, str(error), instance=instance, **_told(error), **extra)


def _told(error: SubmitError) -> dict[str, Any]:
    """Return the further members of the problem of a submission."""
    return {"errors": error.errors or None, "retry_after": _retry_after(error), "run": error.run}


def _retry_after(error: SubmitError) -> float | None:
    """Return seconds to come back after: whatever passes by itself says some."""
    passes = error.status in (429, 503)
    return STORE_RETRY if passes and error.retry_after is None else error.retry_after


def from_token_error(error: TokenError, instance: str | None = None) -> Response:
    """Return the 401 of a token that is absent or not valid."""
    # RFC 6750 §3.1: a request without any token gets a challenge without an error code.
    value = challenge() if error.code == "missing" else challenge("invalid_token", str(error))
    return problem(
        401, f"token-{error.code}", str(error), instance=instance, headers={"WWW-Authenticate": value}
    )


def challenge(error: str | None = None, description: str = "") -> str:
    """Return the value of WWW-Authenticate (RFC 6750 §3)."""
    parts = ['Bearer realm="bulkhead"']
    if error is not None:
        # error_description may hold %x20-21 / %x23-5B / %x5D-7E only.
        plain = "".join(c if " " <= c <= "~" and c not in '"\\' else "'" for c in description)
        parts += [f'error="{error}"', f'error_description="{plain}"']
    return ", ".join(parts)


async def _on_submit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SubmitError)
    return from_submit_error(error, request.url.path)


async def _on_token_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TokenError)
    return from_token_error(error, request.url.path)


def _asked(request: HTTPConnection) -> str:
    """Return what was asked for, without the query, which may hold a token. A WebSocket begins with a GET."""
    return f"{request.scope.get('method', 'GET')} {request.url.path}"


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = code_of(error.status_code)
    # Starlette's own detail is only the status's phrase once more.
    told = error.detail != http.client.responses.get(error.status_code)
    detail = error.detail if told else _asked(request)
    return problem(error.status_code, code, detail, instance=request.url.path, headers=error.headers)


async def _on_lifecycle_error(request: Request, error: Exception) -> Response:
    return problem(None, "run-finished", str(error), instance=request.url.path)


async def _on_store_error(request: Request, error: Exception) -> Response:
    logger.warning("the store does not answer %s: %s", _asked(request), error)
    return problem(
        None,
        "not-writable",
        "the store cannot be used now; the same request may succeed later",
        instance=request.url.path,
        headers={"Retry-After": str(math.ceil(STORE_RETRY))},
        retry_after=STORE_RETRY,
    )


async def _on_client_gone(request: Request, error: Exception) -> Response:
    # Nobody reads this: the client closed its side inside its own request.
    return problem(None, "client-gone", "the connection ended inside the body", instance=request.url.path)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    """Answer 500. The exception goes on to the server, which logs its traceback, with our note in it."""
    incident = secrets.token_hex(8)
    error.add_note(f"incident {incident}")
    logger.error("incident %s: %s in %s %s", incident, type(error).__name__, request.method, request.url.path)
    return problem(
        None,
        "internal",
        f"something went wrong here; the gateway's log has it as incident {incident}",
        instance=request.url.path,
        incident=incident,
    )


#: For `Starlette(exception_handlers=…)`. Starlette looks a class up along its MRO, so bases cover subclasses.
exception_handlers: Final[Mapping[Any, Handler]] = {
    SubmitError: _on_submit_error,
    TokenError: _on_token_error,
    HTTPException: _on_http_exception,
    LifecycleError: _on_lifecycle_error,
    StoreError: _on_store_error,
    ClientDisconnect: _on_client_gone,
    Exception: _on_unforeseen,
}
