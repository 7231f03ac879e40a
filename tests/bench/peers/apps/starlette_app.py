"""The application that runs under uvicorn: a queue per client, an EventSourceResponse from a generator."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Queue = asyncio.Queue[dict[str, str]]

listeners: defaultdict[str, set[Queue]] = defaultdict(set)
counts: defaultdict[str, int] = defaultdict(int)


async def follow(channel: str, queue: Queue) -> AsyncIterator[dict[str, str]]:
    listeners[channel].add(queue)
    try:
        while True:
            yield await queue.get()
    finally:
        listeners[channel].discard(queue)


async def stream(request: Request) -> EventSourceResponse:
    return EventSourceResponse(follow(request.path_params["channel"], asyncio.Queue()))


async def publish(request: Request) -> Response:
    channel = request.path_params["channel"]
    counts[channel] += 1
    event = {"id": str(counts[channel]), "event": "paced", "data": (await request.body()).decode()}
    for queue in listeners[channel]:
        queue.put_nowait(event)
    return Response(status_code=204)


app = Starlette(
    routes=[Route("/stream/{channel}", stream), Route("/publish/{channel}", publish, methods=["POST"])]
)
