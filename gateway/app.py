"""The ASGI application: every route behind its guards."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway.api import Api
from gateway.auth import Authenticator, HostGuard
from gateway.face import Engine
from gateway.metrics import Metrics
from gateway.openapi import OpenApi
from gateway.problems import Handler, exception_handlers
from gateway.reading import Refusal, on_refusal
from gateway.retention import Retention
from gateway.seed import SeedRoutes
from gateway.tally import DoorTally
from taskkit.tokens import TokenError


def build_app(
    engine: Engine, authenticator: Authenticator, retention: Retention, door: DoorTally | None = None
) -> ASGIApp:
    """Return the application that serves `engine`; `door` is counted by the server and here.

    The guards are plain ASGI: Starlette's BaseHTTPMiddleware puts a queue into every response, which hides a
    client's leaving from a stream.
    """
    door = door or DoorTally()
    handlers = {**exception_handlers, Refusal: on_refusal}
    handlers[TokenError] = _counted(handlers[TokenError], door)
    inner = Starlette(routes=all_routes(engine, authenticator, retention, door), exception_handlers=handlers)
    # A path with a slash too many is unknown, like any other; a redirect is one more shape for clients to
    # handle.
    inner.router.redirect_slashes = False
    app: ASGIApp = inner
    if engine.settings.cors_origins:
        app = _with_cors(app, engine.settings.cors_origins)
    return HostGuard(app, authenticator.allowed_hosts)


def all_routes(
    engine: Engine, authenticator: Authenticator, retention: Retention, door: DoorTally
) -> list[Route]:
    """Return every route that there is, its own description the last."""
    routes = [
        *Api(engine, authenticator, retention).routes(),
        *SeedRoutes(engine, authenticator).routes(),
        Metrics(engine, authenticator, retention, door).route(),
    ]
    return [*routes, OpenApi(engine, authenticator, routes).route()]


def _counted(handler: Handler, door: DoorTally) -> Handler:
    """Return `handler`, which answers requests without a valid token, with a count of them."""

    async def on_token_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, TokenError)
        door.bad_tokens[error.code] += 1
        return await handler(request, error)

    return on_token_error


def _with_cors(app: ASGIApp, origins: list[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        # Cookies and a wildcard do not go together (WHATWG Fetch, CORS protocol).
        allow_credentials="*" not in origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer"],
        expose_headers=["Location", "Retry-After", "Idempotency-Replayed", "Preference-Applied"],
    )
