"""A client of the gateway, synchronous or asynchronous. Imports no Django.

`Client` is a light face on connections that a process shares (`taskkit.connections`). Every asynchronous method is
named like its synchronous twin with an `a` in front, and works in asyncio and in trio. What both share (retries,
resuming, errors) does no I/O and lives in `taskkit.following` or in `taskkit.calls`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final
from urllib.parse import quote

import anyio
import httpx

from taskkit import calls, connections
from taskkit.connections import Address, close_clients, received, shared, shared_async
from taskkit.credentials import Credentials, TokenSource
from taskkit.following import Following, StreamEvent, page_events, printed, refusal, run_path
from taskkit.schedule_client import ScheduleCalls

__all__ = ["Client", "StreamEvent", "close_clients", "get_client"]

#: Seconds for which `follow` looks for a gateway that is away: a machine's restart of the service fits in.
_FOLLOW_PATIENCE: Final = 60.0


def get_client(base_url: str, *, token: str | TokenSource | None = None, uds: str | None = None) -> Client:
    """Return a client of the gateway at `base_url`: `http://HOST:PORT`, or `unix:/PATH` of its socket.

    Clients of one URL share their connections within a process and an event loop; after a fork the child
    opens its own. Safe to call often, from any thread.

    Raises:
      GatewayError: the URL is none. The caller's fault.
    """
    return Client(base_url, token=token, uds=uds)


class Client(ScheduleCalls):
    """Submits and follows runs.

    Its methods raise GatewayError for a refusal (`problem` has the document) and for a gateway that does not
    answer.

    What may be repeated safely is repeated for a while by itself, so a gateway's restart goes unnoticed.

    Args:
      base_url: see `get_client`.
      token: JWT sent as Bearer, never logged; or a callable that returns one, asked for the first and whenever the
        gateway refuses the last. For asynchronous calls it may be a coroutine function.
      uds: path of the gateway's Unix socket; `base_url` then only names the host.
    """

    def __init__(
        self, base_url: str, *, token: str | TokenSource | None = None, uds: str | None = None
    ) -> None:
        self.base_url = base_url
        self._address = Address.parse(base_url, uds)
        self._credentials = Credentials(token)

    def __repr__(self) -> str:
        return f"Client({self.base_url!r})"

    # --- one request ----------------------------------------------------------------------------------------

    def _send(self, call: calls.Call) -> httpx.Response:
        tries = calls.Tries(call, self.base_url, self._credentials)
        address = self._address
        while True:
            request = call.request(self._credentials.headers())
            try:
                response = shared(address).request(**request)
                if (other := tries.moved(connections.moved(address, response))) is not None:
                    address = other
                    continue
                pause = tries.answered(response)
            except httpx.TransportError as error:
                address, pause = self._address, tries.failed(error)
            if pause is None:
                return response
            time.sleep(pause)

    async def _asend(self, call: calls.Call) -> httpx.Response:
        tries = calls.Tries(call, self.base_url, self._credentials)
        address = self._address
        while True:
            request = call.request(await self._credentials.aheaders())
            try:
                response = await shared_async(address).request(**request)
                if (other := tries.moved(connections.moved(address, response))) is not None:
                    address = other
                    continue
                pause = tries.answered(response)
            except httpx.TransportError as error:
                address, pause = self._address, tries.failed(error)
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

    def input(
        self,
        run: str,
        name: str,
        data: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Tell a run something, which its task takes from `current_run().inbox(name)`.

        Raises:
          GatewayError: among others with status 409, when the run has ended.
        """
        return calls.document(self._send(calls.input_call(run, name, data or {}, idempotency_key)))

    async def ainput(
        self,
        run: str,
        name: str,
        data: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Tell a run something: see `input`."""
        return calls.document(await self._asend(calls.input_call(run, name, data or {}, idempotency_key)))

    def status(self, run: str) -> dict[str, Any]:
        """Return the run's snapshot."""
        return calls.document(self._send(calls.Call(path=run_path(run))))

    async def astatus(self, run: str) -> dict[str, Any]:
        """Return the run's snapshot."""
        return calls.document(await self._asend(calls.Call(path=run_path(run))))

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

    def follow(
        self,
        run: str,
        *,
        after: str = "",
        types: Sequence[str] = (),
        include_log: bool = False,
        patience: float = _FOLLOW_PATIENCE,
        locate: Callable[[], str | None] | None = None,
    ) -> Iterator[StreamEvent]:
        """Yield the run's events, from the first or from `after`, until and including `stream.end`.

        A lost connection is opened again where it broke: every event comes once, in order. Leaving the loop
        closes the connection and does not touch the run; read to the end, the connection is used again.

        Args:
          after: cursor (`StreamEvent.id`), or "latest" (newest event, then live) or "now" (only what is new).
          types: names of the events wanted; `stream.*` always come. By default all.
          include_log: whether what the run prints comes as well, as events `log`; the token needs the action `logs`.
          patience: seconds to look for a gateway that is away.
          locate: called before each new try after a failure; returns the gateway's URL if it may be another
            by now, else None. What it raises ends the following. In `afollow` it must not block.

        Raises:
          GatewayError: the gateway refuses, or was away for longer than `patience`.
        """
        if after in ("latest", "now"):
            page = calls.document(self._send(calls.page_call(run, after, types, include_log)))
            yield from page_events(page)
            if page["ended"]:
                return
            after = page["next"]
        following = Following(
            run, after, types=types, output=include_log, patience=patience, now=time.monotonic()
        )
        home = address = self._address
        while not following.ended:
            request = following.request(self._credentials.headers())
            other = None
            try:
                with shared(address).stream(**request, timeout=calls.SILENCE) as response:
                    if (other := connections.moved(address, response)) is not None:
                        following.moved()
                    elif following.answered(response.status_code, response.headers, time.monotonic()):
                        for data in response.iter_raw():
                            yield from following.receive_data(data, time.monotonic())
                    elif following.is_refusal(response.status_code, self._credentials):
                        raise refusal(response.status_code, response.read(), str(response.url))
            except httpx.TransportError:
                following.lost = True
                address = home
            if not following.ended:
                time.sleep(following.pause(time.monotonic()))
                if other is not None:
                    address = other
                elif address is home:
                    home = address = _located(locate, home, following)

    async def afollow(
        self,
        run: str,
        *,
        after: str = "",
        types: Sequence[str] = (),
        include_log: bool = False,
        patience: float = _FOLLOW_PATIENCE,
        locate: Callable[[], str | None] | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the run's events: see `follow`. Leave it early only under `contextlib.aclosing`."""
        if after in ("latest", "now"):
            page = calls.document(await self._asend(calls.page_call(run, after, types, include_log)))
            for event in page_events(page):
                yield event
            if page["ended"]:
                return
            after = page["next"]
        following = Following(
            run, after, types=types, output=include_log, patience=patience, now=time.monotonic()
        )
        home = address = self._address
        while not following.ended:
            request = following.request(await self._credentials.aheaders())
            other = None
            try:
                async with shared_async(address).stream(**request, timeout=calls.SILENCE) as response:
                    if (other := connections.moved(address, response)) is not None:
                        following.moved()
                    elif following.answered(response.status_code, response.headers, time.monotonic()):
                        async with received(response) as chunks:
                            async for data in chunks:
                                for event in following.receive_data(data, time.monotonic()):
                                    yield event
                    elif following.is_refusal(response.status_code, self._credentials):
                        raise refusal(response.status_code, await response.aread(), str(response.url))
            except httpx.TransportError:
                following.lost = True
                address = home
            if not following.ended:
                await anyio.sleep(following.pause(time.monotonic()))
                if other is not None:
                    address = other
                elif address is home:
                    home = address = _located(locate, home, following)

    def lines(self, run: str, **options: Any) -> Iterator[str]:
        """Yield what the run printed, or yielded as text, line by line without line breaks, until it has ended.

        Args:
          options: `patience` and `locate` of `follow`, which this is.

        Raises:
          GatewayError: the gateway refuses (the token needs the action `logs`), or was away for too long.
        """
        for event in self.follow(run, include_log=True, **options):
            yield from printed(event)

    async def alines(self, run: str, **options: Any) -> AsyncGenerator[str, None]:
        """Yield what the run printed: see `lines`. Leave it early only under `contextlib.aclosing`."""
        async with aclosing(self.afollow(run, include_log=True, **options)) as events:
            async for event in events:
                for line in printed(event):
                    yield line

    # --- end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections that this process has to this URL; the next call opens anew."""
        connections.close(self._address)

    async def aclose(self) -> None:
        """Close the connections that this event loop has to this URL; the next call opens anew."""
        await connections.aclose(self._address)


def _located(locate: Callable[[], str | None] | None, before: Address, following: Following) -> Address:
    url = None if locate is None or not following.lost else locate()
    return before if url is None else Address.parse(url)
