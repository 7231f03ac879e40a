"""A client of the gateway, synchronous or asynchronous. Imports no Django.

One httpx client per process, URL and (asynchronous) event loop; `Client` itself is a light face on it. Every
asynchronous method is named like its synchronous twin with an `a` in front, and works in asyncio and in trio.
What both share (retries, resuming, errors) does no I/O and lives in `taskkit.following` or in `calls.Call`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit

import anyio
import anyio.lowlevel
import httpx

from taskkit import calls
from taskkit.errors import GatewayError
from taskkit.following import Following, Pauses, StreamEvent, refusal
from taskkit.settings import is_loopback

__all__ = ["Client", "StreamEvent", "close_clients", "get_client"]

#: Seconds for which `follow` looks for a gateway that is away: a machine's restart of the service fits in.
_FOLLOW_PATIENCE: Final = 60.0


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a gateway listens: `base` is an HTTP URL, `uds` the path of its Unix socket or None."""

    base: str
    uds: str | None

    @classmethod
    def parse(cls, url: str, uds: str | None) -> _Address:
        if url.startswith("unix:"):
            return cls("http://localhost", url.removeprefix("unix:"))
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GatewayError(f"{url!r} is no address of a gateway: write http://HOST:PORT or unix:/PATH")
        return cls(url.rstrip("/"), uds)

    def options(self) -> dict[str, Any]:
        # A proxy from the environment must not stand between a client and the gateway of its own machine.
        local = self.uds is not None or is_loopback(urlsplit(self.base).hostname or "")
        return {"base_url": self.base, "trust_env": not local, "follow_redirects": False}


_lock = threading.Lock()
_clients: dict[_Address, httpx.Client] = {}
_async_clients: anyio.lowlevel.RunVar[dict[_Address, httpx.AsyncClient]] = anyio.lowlevel.RunVar(
    "bulkhead_clients"
)


def _after_fork() -> None:
    """Forget what a child inherits: two processes on one socket would read each other's answers."""
    global _lock
    _lock = threading.Lock()  # another thread may have held the old one
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)


def _shared(address: _Address) -> httpx.Client:
    with _lock:
        client = _clients.get(address)
        if client is None:
            transport = httpx.HTTPTransport(uds=address.uds) if address.uds else None
            client = _clients[address] = httpx.Client(transport=transport, **address.options())
        return client


def _shared_async(address: _Address) -> httpx.AsyncClient:
    clients = _async_clients.get({})
    client = clients.get(address)
    if client is None:
        transport = httpx.AsyncHTTPTransport(uds=address.uds) if address.uds else None
        client = clients[address] = httpx.AsyncClient(transport=transport, **address.options())
        _async_clients.set(clients)
    return client


def close_clients() -> None:
    """Close every synchronous connection of this process; the next call opens anew."""
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()


def get_client(base_url: str, *, token: str | None = None, uds: str | None = None) -> Client:
    """Return a client of the gateway at `base_url`: `http://HOST:PORT`, or `unix:/PATH` of its socket.

    Clients of one URL share their connections within a process and an event loop; after a fork the child
    opens its own. Safe to call often, from any thread.

    Raises:
      GatewayError: the URL is none. The caller's fault.
    """
    return Client(base_url, token=token, uds=uds)


class Client:
    """Submits and follows runs.

    Its methods raise GatewayError for a refusal (`problem` has the document) and for a gateway that does not
    answer.

    What may be repeated safely is repeated for a while by itself, so a gateway's restart goes unnoticed.

    Args:
      base_url: see `get_client`.
      token: JWT sent as Bearer; it is never logged.
      uds: path of the gateway's Unix socket; `base_url` then only names the host.
    """

    def __init__(self, base_url: str, *, token: str | None = None, uds: str | None = None) -> None:
        self.base_url = base_url
        self._address = _Address.parse(base_url, uds)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __repr__(self) -> str:
        return f"Client({self.base_url!r})"

    # --- one request ----------------------------------------------------------------------------------------

    def _send(self, call: calls.Call) -> httpx.Response:
        request = call.request()
        request["headers"].update(self._headers)
        pauses = Pauses(calls.PATIENCE, time.monotonic())
        while True:
            try:
                response = _shared(self._address).request(**request)
            except httpx.TransportError as error:
                time.sleep(call.after_failure(error, pauses, self.base_url))
                continue
            pause = call.after_answer(response, pauses)
            if pause is None:
                return response
            time.sleep(pause)

    async def _asend(self, call: calls.Call) -> httpx.Response:
        request = call.request()
        request["headers"].update(self._headers)
        pauses = Pauses(calls.PATIENCE, time.monotonic())
        while True:
            try:
                response = await _shared_async(self._address).request(**request)
            except httpx.TransportError as error:
                await anyio.sleep(call.after_failure(error, pauses, self.base_url))
                continue
            pause = call.after_answer(response, pauses)
            if pause is None:
                return response
            await anyio.sleep(pause)

    # --- submit, cancel, look -------------------------------------------------------------------------------

    def submit(
        self,
        task: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Submit a run; return `{id, status, task, urls, token}` once it is on disk.

        Args:
          fields: of a model task, instead of `args` and `kwargs`.
          idempotency_key: makes this the same submission as an earlier one with the same key and body.
          options: `pool`, `priority`, `run_after`, `timeout`, `max_attempts`, `metadata`, `tags`.
        """
        return calls.document(
            self._send(calls.submit_call(task, args, kwargs, fields, idempotency_key, options))
        )

    async def asubmit(
        self,
        task: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Submit a run: see `submit`."""
        return calls.document(
            await self._asend(calls.submit_call(task, args, kwargs, fields, idempotency_key, options))
        )

    def cancel(self, run: str, *, grace: float | None = None) -> dict[str, Any]:
        """Ask a run to stop, and return its snapshot; `grace` seconds later it is terminated.

        Raises:
          GatewayError: among others with status 409, when the run has ended.
        """
        return calls.document(self._send(calls.cancel_call(run, grace)))

    async def acancel(self, run: str, *, grace: float | None = None) -> dict[str, Any]:
        """Ask a run to stop: see `cancel`."""
        return calls.document(await self._asend(calls.cancel_call(run, grace)))

    def status(self, run: str) -> dict[str, Any]:
        """Return the run's snapshot."""
        return calls.document(self._send(calls.Call(path=calls.run_path(run))))

    async def astatus(self, run: str) -> dict[str, Any]:
        """Return the run's snapshot."""
        return calls.document(await self._asend(calls.Call(path=calls.run_path(run))))

    def replay(self, run: str, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Perform an ended run again, as a new one with the same arguments; return what `submit` returns.

        Raises:
          GatewayError: among others with status 409, when the run has not ended.
        """
        return calls.document(self._send(calls.replay_call(run, idempotency_key)))

    async def areplay(self, run: str, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Perform an ended run again: see `replay`."""
        return calls.document(await self._asend(calls.replay_call(run, idempotency_key)))

    def runs(self, **filters: Any) -> dict[str, Any]:
        """Return a page of runs, newest first; `filters`: status, task, tag, since, until, limit, cursor."""
        return calls.document(self._send(calls.runs_call(filters)))

    async def aruns(self, **filters: Any) -> dict[str, Any]:
        """Return a page of runs: see `runs`."""
        return calls.document(await self._asend(calls.runs_call(filters)))

    def runners(self) -> dict[str, Any]:
        """Return the runner processes; needs a token with the action `operate`."""
        return calls.document(self._send(calls.Call(path="/api/v1/runners")))

    async def arunners(self) -> dict[str, Any]:
        """Return the runner processes: see `runners`."""
        return calls.document(await self._asend(calls.Call(path="/api/v1/runners")))

    def end_runner(self, runner: str, *, now: bool) -> dict[str, Any]:
        """Have a runner finish what it has and leave, or end it `now`: then its runs are lost.

        Needs a token with the action `operate`.
        """
        return calls.document(self._send(calls.operate_call("runners", runner, "kill" if now else "drain")))

    async def aend_runner(self, runner: str, *, now: bool) -> dict[str, Any]:
        """Have a runner leave: see `end_runner`."""
        call = calls.operate_call("runners", runner, "kill" if now else "drain")
        return calls.document(await self._asend(call))

    def reset_task(self, task: str) -> dict[str, Any]:
        """Let the runs of a task go that is held back; needs a token with the action `operate`."""
        return calls.document(self._send(calls.operate_call("tasks", task, "reset")))

    async def areset_task(self, task: str) -> dict[str, Any]:
        """Let the runs of a held task go: see `reset_task`."""
        return calls.document(await self._asend(calls.operate_call("tasks", task, "reset")))

    def tasks(self) -> dict[str, Any]:
        """Return the catalogue of tasks."""
        return calls.document(self._send(calls.Call(path="/api/v1/tasks")))

    async def atasks(self) -> dict[str, Any]:
        """Return the catalogue of tasks."""
        return calls.document(await self._asend(calls.Call(path="/api/v1/tasks")))

    def task(self, name: str) -> dict[str, Any]:
        """Return one task of the catalogue."""
        return calls.document(self._send(calls.Call(path=f"/api/v1/tasks/{quote(name, safe='')}")))

    async def atask(self, name: str) -> dict[str, Any]:
        """Return one task of the catalogue."""
        return calls.document(await self._asend(calls.Call(path=f"/api/v1/tasks/{quote(name, safe='')}")))

    def vacuum(self) -> dict[str, Any]:
        """Give free pages of the store back to the disk for some seconds; needs the action `operate`.

        Returns `{freed_bytes, free_bytes, file_bytes, incremental, seconds}`; `free_bytes` is what is left to do.
        """
        return calls.document(self._send(calls.vacuum_call()))

    async def avacuum(self) -> dict[str, Any]:
        """Give free pages of the store back to the disk: see `vacuum`."""
        return calls.document(await self._asend(calls.vacuum_call()))

    def revoke(self, *, jti: str | None = None, sub: str | None = None) -> dict[str, Any]:
        """Take back the token with this `jti`, or all that the subject `sub` has until now; needs the action `operate`.

        Their streams end. Returns `{jti or sub, at, ended_streams}`.
        """
        return calls.document(self._send(calls.revoke_call(jti, sub)))

    async def arevoke(self, *, jti: str | None = None, sub: str | None = None) -> dict[str, Any]:
        """Take tokens back: see `revoke`."""
        return calls.document(await self._asend(calls.revoke_call(jti, sub)))

    # --- result ---------------------------------------------------------------------------------------------

    def result(self, run: str, *, timeout: float | None = None) -> Any:
        """Wait until the run has ended; return what it returned.

        Raises:
          RunError: it did not succeed; the subclass says how it ended, `snapshot` has the rest.
          TimeoutError: it has not ended within `timeout` seconds. Nothing has changed; ask again.
        """
        deadline = calls.deadline_after(timeout)
        while True:
            response = self._send(calls.result_call(run, calls.poll(deadline)))
            if calls.still_running(response, deadline, run):
                continue
            if calls.succeeded(answer := calls.document(response)):
                return answer.get("result")
            raise calls.error_of(self.status(run))

    async def aresult(self, run: str, *, timeout: float | None = None) -> Any:
        """Wait until the run has ended; return what it returned: see `result`."""
        deadline = calls.deadline_after(timeout)
        while True:
            response = await self._asend(calls.result_call(run, calls.poll(deadline)))
            if calls.still_running(response, deadline, run):
                continue
            if calls.succeeded(answer := calls.document(response)):
                return answer.get("result")
            raise calls.error_of(await self.astatus(run))

    # --- streams --------------------------------------------------------------------------------------------

    def _stream(self, run: str, following: Following) -> dict[str, Any]:
        headers = {**following.headers(), **self._headers}
        path, params = calls.run_path(run, "/events"), following.params()
        return {"method": "GET", "url": path, "params": params, "headers": headers, "timeout": calls.SILENCE}

    def follow(
        self,
        run: str,
        *,
        after: str = "",
        patience: float = _FOLLOW_PATIENCE,
        locate: Callable[[], str | None] | None = None,
    ) -> Iterator[StreamEvent]:
        """Yield the run's events, from the first or from `after`, until and including `stream.end`.

        A lost connection is opened again where it broke: every event comes once, in order. Leaving the loop
        closes the connection and does not touch the run; read to the end, the connection is used again.

        Args:
          after: cursor (`StreamEvent.id`), or "latest" (newest event, then live) or "now" (only what is new).
          patience: seconds to look for a gateway that is away.
          locate: called before each new try after a failure; returns the gateway's URL if it may be another
            by now, else None. What it raises ends the following. In `afollow` it must not block.

        Raises:
          GatewayError: the gateway refuses, or was away for longer than `patience`.
        """
        following = Following(after, patience=patience, now=time.monotonic())
        address = self._address
        while not following.ended:
            clean = False
            try:
                with _shared(address).stream(**self._stream(run, following)) as response:
                    if _is_stream(following, response):
                        for data in response.iter_raw():
                            yield from following.receive_data(data, time.monotonic())
                        clean = True
                    elif following.is_refusal(response.status_code):
                        raise refusal(response.status_code, response.read(), str(response.url))
            except httpx.TransportError:
                clean = False
            if not following.ended:
                time.sleep(following.pause(time.monotonic(), clean=clean))
                address = address if clean else _located(locate, address)

    async def afollow(
        self,
        run: str,
        *,
        after: str = "",
        patience: float = _FOLLOW_PATIENCE,
        locate: Callable[[], str | None] | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """Yield the run's events: see `follow`. Leave it early only under `contextlib.aclosing`."""
        following = Following(after, patience=patience, now=time.monotonic())
        address = self._address
        while not following.ended:
            clean = False
            try:
                async with _shared_async(address).stream(**self._stream(run, following)) as response:
                    if _is_stream(following, response):
                        async for data in response.aiter_raw():
                            for event in following.receive_data(data, time.monotonic()):
                                yield event
                        clean = True
                    elif following.is_refusal(response.status_code):
                        raise refusal(response.status_code, await response.aread(), str(response.url))
            except httpx.TransportError:
                clean = False
            if not following.ended:
                await anyio.sleep(following.pause(time.monotonic(), clean=clean))
                address = address if clean else _located(locate, address)

    def lines(self, run: str) -> Iterator[str]:
        """Yield what the run printed, line by line without line breaks, until it has ended.

        Plain text has no cursors: a lost connection raises.

        Raises:
          GatewayError: the gateway refuses (the token needs the action `logs`) or the connection is lost.
        """
        headers = {"Accept": "text/plain", "Accept-Encoding": "identity", **self._headers}
        path = calls.run_path(run, "/events")
        try:
            with _shared(self._address).stream(
                "GET", path, headers=headers, timeout=calls.SILENCE
            ) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read(), str(response.url))
                yield from response.iter_lines()
        except httpx.TransportError as error:
            calls.unreachable(error, self.base_url)

    # --- end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections that this process has to this URL; the next call opens anew."""
        with _lock:
            client = _clients.pop(self._address, None)
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close the connections that this event loop has to this URL; the next call opens anew."""
        client = _async_clients.get({}).pop(self._address, None)
        if client is not None:
            with contextlib.suppress(httpx.TransportError):
                await client.aclose()


def _located(locate: Callable[[], str | None] | None, before: _Address) -> _Address:
    url = None if locate is None else locate()
    return before if url is None else _Address.parse(url, None)


def _is_stream(following: Following, response: httpx.Response) -> bool:
    head = response.headers
    kind, again = head.get("content-type", ""), head.get("retry-after")
    return following.answered(response.status_code, kind, again, time.monotonic())
