"""The ASGI application: every route behind its guards."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import Api
from gateway.auth import Authenticator, HostGuard, TicketCookies
from gateway.background import BackgroundRoutes
from gateway.face import Engine
from gateway.finding import Elsewhere, on_elsewhere
from gateway.metrics import Metrics
from gateway.openapi import OpenApi
from gateway.problems import exception_handlers, problem
from gateway.reading import Refusal, on_refusal
from gateway.retention import Retention
from gateway.script import Script
from gateway.seed import SeedRoutes
from gateway.sessions import TooManyStreams, on_too_many_streams
from gateway.tally import DoorTally
from gateway.websocket import Sockets


def build_app(
    engine: Engine, authenticator: Authenticator, retention: Retention, door: DoorTally | None = None
) -> ASGIApp:
    """Return the application that serves `engine`; `door` is counted by the server.

    The guards are plain ASGI: Starlette's BaseHTTPMiddleware puts a queue into every response, which hides a
    client's leaving from a stream.
    """
    handlers = {
        **exception_handlers,
        Refusal: on_refusal,
        TooManyStreams: on_too_many_streams,
        Elsewhere: on_elsewhere,
    }
    routes = all_routes(engine, authenticator, retention, door or DoorTally())
    inner = Starlette(routes=routes, exception_handlers=handlers)
    # A path with a slash too many is unknown, like any other; a redirect is one more shape for clients to
    # handle.
    inner.router.redirect_slashes = False
    inner.router.default = _unknown
    app: ASGIApp = inner
    if engine.settings.cors_origins:
        app = _with_cors(app, engine.settings.cors_origins)
    return HostGuard(TicketCookies(app), authenticator.allowed_hosts)


class _Cors(CORSMiddleware):
    """Starlette's, with a problem document for what it refuses: a preflight that asks for too much."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer one preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        kept = {
            name: value for name, value in response.headers.items() if name.startswith(("access-", "vary"))
        }
        detail = bytes(response.body).decode().replace("Disallowed CORS", "not allowed across origins:")
        return problem(None, "cors", f"{detail}; see CORS_ORIGINS", headers=kept)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 404, also to a WebSocket, for which Starlette has a bare 403."""
    raise HTTPException(404)


def all_routes(
    engine: Engine, authenticator: Authenticator, retention: Retention, door: DoorTally
) -> list[BaseRoute]:
    """Return every route that there is, its own description the last."""
    routes: list[BaseRoute] = [
        *Api(engine, authenticator, retention).routes(),
        *SeedRoutes(engine, authenticator).routes(),
        *BackgroundRoutes(engine, authenticator).routes(),
        *Script().routes(),
        *Sockets(engine, authenticator).routes(),
        Metrics(engine, authenticator, retention, door).route(),
    ]
    return [*routes, OpenApi(engine, authenticator, routes).route()]


def _with_cors(app: ASGIApp, origins: list[str]) -> ASGIApp:
    return _Cors(
        app,
        allow_origins=origins,
        # Cookies and a wildcard do not go together (WHATWG Fetch, CORS protocol).
        allow_credentials="*" not in origins,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer"],
        expose_headers=["Location", "Retry-After", "Idempotency-Replayed", "Preference-Applied"],
    )
