"""One page of a run's stream, for a client that asks again for the next."""

from __future__ import annotations

from typing import Final

import msgspec
import trio

from gateway.documents import EventPage
from gateway.fanout import Hub
from gateway.following import Follower
from gateway.leaving import Client
from gateway.rendering import parts, type_of
from gateway.selection import wants
from gateway.sse import Cursor
from gateway.store.protocol import Store
from gateway.store.rows import RunRow

#: Seconds for which a page looks for an event that it may show, though it need not wait. Half a million small events
#: are read in that time; whoever gets an empty page goes on at its `next`.
PAGE_SECONDS: Final = 1.0


async def read_page(
    store: Store,
    hub: Hub,
    run: RunRow,
    cursor: Cursor,
    client: Client,
    *,
    output: bool,
    limit: int,
    wait: float,
    types: frozenset[str] | None = None,
) -> EventPage:
    """Return a page of a stream.

    Waits up to `wait` seconds for the first event of `types`. At most `limit` events and 64 KiB of data, unless the
    first alone exceeds that. `next` is the cursor of the page that follows, behind what is not of `types` as well;
    `ended`: none will. A page that does not wait is no subscriber of the run.

    Raises:
      StoreError: the disk does not answer.
    """
    now = trio.current_time()
    with hub.attach(run.no, run.epoch, counted=wait > 0) as subscription:
        follower = Follower(store, subscription, run, cursor, output=output)
        following = follower.position
        while True:
            pieces = await follower.read()
            following = pieces[-1].id if pieces else following
            shown = [piece for piece in pieces if wants(types, type_of(piece))]
            # What is filtered out is read on through, wait or not, as long as a store may take for a page.
            patience = max(wait, PAGE_SECONDS) if pieces else wait
            over = follower.done or client.gone or subscription.closing
            if shown or over or trio.current_time() >= now + patience:
                break
            if not pieces:
                await client.wait(follower.wait, now + wait)
    told = [(piece.id, *parts(piece, run.id)[1:]) for piece in shown[:limit]]
    hub.tally.delivered += len(told)
    return {
        "events": [{"id": id, "type": type, "data": msgspec.Raw(data or b"null")} for id, type, data in told],
        "next": told[-1][0] if len(shown) > limit else following,
        "ended": follower.done and len(shown) <= limit,
    }
