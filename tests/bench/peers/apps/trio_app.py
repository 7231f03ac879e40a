"""The application that runs under hypercorn: a list of framed events per channel, a position per subscriber."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import trio

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Channel:
    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.news = trio.Event()

    def publish(self, data: bytes) -> None:
        self.events.append(b"id: %d\nevent: paced\ndata: %s\n\n" % (len(self.events) + 1, data))
        self.news.set()
        self.news = trio.Event()


channels: defaultdict[str, Channel] = defaultdict(Channel)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    channel = channels[scope["path"].rpartition("/")[2]]
    if scope["method"] == "POST":
        data = b""
        more = True
        while more:
            message = await receive()
            data += message.get("body", b"")
            more = message.get("more_body", False)
        channel.publish(data)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, channel, send)
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()


async def follow(channel: Channel, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
    position = len(channel.events)
    while True:
        while position < len(channel.events):
            body = channel.events[position]
            position += 1
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await channel.news.wait()


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
