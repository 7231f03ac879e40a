"""The routes `/ws`, `/flowrra/ws`: who may come in as a WebSocket."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from gateway import dialects
from gateway.auth import TOKEN, Authenticator
from gateway.conversation import POLICY, Conversation
from gateway.describing import Description
from gateway.dialects import Updates
from gateway.face import Engine
from gateway.reading import Refusal
from gateway.resource import Resource
from taskkit.tokens import Claims, TokenError


class Sockets:
    """Serves bazis's route `/ws`, and Flowrra's `/flowrra/ws`, over one engine."""

    def __init__(self, engine: Engine, authenticator: Authenticator) -> None:
        self._engine = engine
        self._authenticator = authenticator
        self._updates = Updates()

    def routes(self) -> list[BaseRoute]:
        """Return the routes, for Starlette."""
        plain = Resource(get=needs_upgrade)
        return [
            WebSocketRoute("/ws", self.serve_channel),
            WebSocketRoute("/flowrra/ws", self.serve_flowrra),
            Route("/ws", plain),
            Route("/flowrra/ws", plain),
        ]

    async def serve_channel(self, socket: WebSocket) -> None:
        """Tell a client of its user's runs in bazis's frames, of others in Flowrra's messages as it subscribes."""
        await self._serve(socket, channel=True)

    async def serve_flowrra(self, socket: WebSocket) -> None:
        """Tell a client of every run that its token reaches, in Flowrra's messages."""
        await self._serve(socket, channel=False)

    async def _serve(self, socket: WebSocket, *, channel: bool) -> None:
        if not self._authenticator.knows_origin(socket):
            # Browsers let any page open a WebSocket, with our cookie on it; only this header tells.
            raise Refusal("wrong-origin", "this origin is not in CORS_ORIGINS; add it")
        try:
            claims = (await self._authenticator.admit(socket, "read", query_token=True)).claims
        except TokenError as error:
            if TOKEN not in socket.query_params or "authorization" in socket.headers:
                raise
            await self._turn_away(socket, error, channel)
            return

        async def verify(text: str) -> Claims:
            return self._authenticator.verify(socket, text)

        with self._authenticator.sessions.new(claims) as session:
            await socket.accept()
            conversation = Conversation(socket, self._engine, self._updates, session, verify, channel=channel)
            await conversation.run()

    async def _turn_away(self, socket: WebSocket, error: TokenError, channel: bool) -> None:
        """Tell by close code 1008, for which bazis's clients stop trying: a page sees no status of a handshake."""
        reason = "expired_token" if error.code == "expired" else "invalid_token"
        try:
            await socket.accept()
            if channel:
                await socket.send_text(dialects.error_message(reason, str(error)))
            await socket.close(POLICY, reason)
        except WebSocketDisconnect:
            pass


@Description(needs=None, answers={}, problems=("upgrade-required",))
async def needs_upgrade(request: Request) -> Response:
    """Answer a plain request."""
    raise Refusal(
        "upgrade-required",
        "this route speaks WebSocket: send `Connection: Upgrade`, `Upgrade: websocket`",
        headers={"Connection": "Upgrade", "Upgrade": "websocket"},
    )
