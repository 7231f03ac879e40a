"""Clients that follow runs as browsers do: patient, late, slow, stalled, reset, page by page."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from tests.chaos.exchange import BROKEN, Exchange, ask, connect
from tests.chaos.history import History, Seen, Watch
from tests.streams import SseDecoder

#: How often each temper is drawn.
TEMPERS: Final = {"plain": 10, "late": 3, "slow": 2, "reset": 4, "stalled": 1, "pages": 2}

#: Seconds of silence after which a client tries anew. Heartbeats come every 15 s; a stopped gateway is silent.
SILENCE: Final = 20.0

#: Answers that mean: come again.
_AGAIN: Final = (429, 502, 503)


class Clients:
    """All clients of one chaos run. Each records what it saw; nothing here judges.

    Attributes:
      open: connections by client, for faults that hit clients.
      running: run by pid of its runner, from what clients saw of open runs.
      stalled_until: monotonic time until which `stall` keeps clients from reading.
    """

    def __init__(self, history: History, port: int, token: str, nursery: trio.Nursery, seed: int) -> None:
        self._history = history
        self._port = port
        self._headers = {"Authorization": f"Bearer {token}"}
        self._nursery = nursery
        self._rng = random.Random(f"clients {seed}")
        self._stalls: dict[int, float] = {}
        self._stalled: set[int] = set()
        self.open: dict[int, Exchange] = {}
        self.running: dict[int, str] = {}
        self.ended: set[str] = set()
        self.following = 0
        self.answers: Counter[int] = Counter()

    def follow(self, run: str, *, maybe_absent: bool = False) -> None:
        """Have one to three clients follow a run. `maybe_absent`: it may not have reached the gateway yet."""
        for _ in range(self._rng.choice((1, 1, 2, 3))):
            (temper,) = self._rng.choices(list(TEMPERS), list(TEMPERS.values()))
            watch = Watch(run, temper)
            self._history.watches.append(watch)
            rng = random.Random(self._rng.random())
            self._nursery.start_soon(self._live, watch, rng, maybe_absent)

    def reset_some(self, rank: float) -> int:
        """Reset a share of the open connections; return how many."""
        chosen = [it for n, it in enumerate(self.open.values()) if (n * 0.618 + rank) % 1 < 0.3]
        for exchange in chosen:
            exchange.reset()
        return len(chosen)

    def stall_some(self, rank: float, seconds: float) -> int:
        """Keep a share of the clients from reading; return how many."""
        until = trio.current_time() + seconds
        chosen = [n for n in self.open if (n * 0.618 + rank) % 1 < 0.3]
        self._stalls |= dict.fromkeys(chosen, until)
        return len(chosen)

    async def _live(self, watch: Watch, rng: random.Random, maybe_absent: bool) -> None:
        self.following += 1
        try:
            if watch.client == "late":
                await trio.sleep(rng.uniform(0.2, 4.0))
            once = self._page if watch.client == "pages" else self._stream
            await self._until_over(watch, rng, maybe_absent, once)
        finally:
            self.following -= 1

    async def _until_over(
        self,
        watch: Watch,
        rng: random.Random,
        maybe_absent: bool,
        once: Callable[[Watch, random.Random], Awaitable[int]],
    ) -> None:
        again = True
        while again:
            ended_before = watch.ended
            try:
                status = await once(watch, rng)
            except (*BROKEN, trio.ClosedResourceError):
                status = 0
            self.answers[status] += 1
            if status == 404 and maybe_absent and not watch.seen:
                status = 503
            if status == 204 and not ended_before:
                watch.problems.append(f"204 after event {_last(watch)}, before stream.end")
            elif status and status not in (200, 204, *_AGAIN):
                watch.problems.append(f"status {status} after event {_last(watch)}")
                return
            # After the end, one client in three asks once more: the answer has to be 204.
            if ended_before and status == 200:
                watch.problems.append("200 after stream.end, not 204")
            if watch.ended:
                again = not ended_before and rng.random() < 0.3 if status else again
                again = again and watch.client != "pages"
            await trio.sleep(rng.uniform(0.05, 0.4) if again else 0)

    # --- event streams -------------------------------------------------------------------------------------

    async def _stream(self, watch: Watch, rng: random.Random) -> int:
        watch.connections += 1
        last = _last(watch)
        headers = {"Accept": "text/event-stream", **self._headers}
        if last:
            headers["Last-Event-ID"] = str(last)
        small = 4096 if watch.client in ("slow", "stalled") else None
        async with await connect(self._port, buffer=small) as exchange:
            with trio.fail_after(SILENCE):
                await exchange.ask("GET", f"/api/v1/runs/{watch.run}/events", headers, b"")
            if exchange.status != 200:
                return exchange.status
            number = id(watch)
            self.open[number] = exchange
            try:
                return await self._read(watch, exchange, rng, number)
            finally:
                del self.open[number]

    async def _read(self, watch: Watch, exchange: Exchange, rng: random.Random, number: int) -> int:
        """Read to the end of the response; return its status, or 503 when that is what it said in the stream."""
        decoder = SseDecoder()
        breaks_after = rng.randint(1, 20_000) if watch.client == "reset" and watch.connections < 8 else None
        received = 0
        while True:
            await self._dawdle(watch, rng, number)
            with trio.fail_after(SILENCE):
                data = await exchange.read(4096 if watch.client == "slow" else 65536)
            if not data:
                return 200
            received += len(data)
            for event in decoder.receive(data):
                if (
                    event.type == "stream.busy"
                ):  # CONTRACT 2.3: how an overloaded gateway says 503 to EventSource
                    return 503
                self._record(watch, event.id, event.type, event.data.encode(), exchange.opened)
            if breaks_after is not None and received >= breaks_after:
                exchange.reset()
                raise ConnectionResetError

    async def _dawdle(self, watch: Watch, rng: random.Random, number: int) -> None:
        if watch.client == "slow":
            await trio.sleep(rng.uniform(0.0, 0.1))
        elif watch.client == "stalled" and number not in self._stalled and rng.random() < 0.3:
            self._stalled.add(number)
            await trio.sleep(rng.uniform(1.0, 13.0))
        until = self._stalls.pop(number, None)
        if until is not None:
            await trio.sleep_until(until)

    # --- pages ---------------------------------------------------------------------------------------------

    async def _page(self, watch: Watch, rng: random.Random) -> int:
        watch.connections += 1
        path = f"/api/v1/runs/{watch.run}/events?after={_last(watch)}&wait=2"
        opened = trio.current_time()
        headers = {"Accept": "application/json", **self._headers}
        status, page = await ask(self._port, "GET", path, headers=headers, timeout=SILENCE)
        if status != 200:
            return status
        if not isinstance(page, dict):
            watch.problems.append(f"a page that is none: {page!r:.80}")
            return status
        for event in page["events"]:
            # A page is parsed and rendered again: the product writes compact JSON without escapes of letters.
            data = json.dumps(event["data"], separators=(",", ":"), ensure_ascii=False).encode()
            self._record(watch, event["id"], event["type"], data, opened)
        if page["ended"] and not watch.ended:
            watch.problems.append(f"a page says that the run has ended, after event {_last(watch)}")
        return status

    # --- what was seen -------------------------------------------------------------------------------------

    def _record(self, watch: Watch, id: str, type: str, data: bytes, opened: float) -> None:
        if not id.isdecimal():
            watch.problems.append(f"event {type} has the id {id!r}")
            return
        digest = self._history.learn(type, data)
        watch.seen.append(Seen(int(id), type, digest, trio.current_time(), opened))
        content = self._history.contents[digest]
        if type == "run.started":
            self.running[content.pid] = watch.run
        if type == "stream.end":
            watch.ended = True
            self._end(watch.run)

    def _end(self, run: str) -> None:
        self.ended.add(run)
        for pid in [pid for pid, its in self.running.items() if its == run]:
            del self.running[pid]


def _last(watch: Watch) -> int:
    """Return the newest id that a browser would send back."""
    return watch.seen[-1].id if watch.seen else 0
