"""A runner's life: say hello, take orders, perform them, leave."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass

import anyio
import msgspec
from anyio.abc import TaskGroup

from taskkit import failpoints
from taskkit.errors import RunCancelled, SubmitError, TaskkitError, TaskTimeout
from taskkit.registry import TaskDefinition
from taskkit.runner import capture, databases
from taskkit.runner.attempt import Attempt, conclude, perform_async, perform_sync
from taskkit.runner.emitter import LOST_DESCRIPTORS, Emitter
from taskkit.runner.encode import failure_of
from taskkit.runner.leftovers import end_children
from taskkit.runner.limits import limit_memory
from taskkit.runner.orders import Orders
from taskkit.runner.rehearsal import rehearse
from taskkit.wire.messages import Create, Created, Finished, GivenBack, Hello, RunnerSpec, Start, Started


@dataclass(frozen=True, slots=True)
class Ends:
    """A runner's descriptors: events and output (write ends), orders (socket), blobs (directory)."""

    events: int
    output: int
    orders: int
    blobs: int


class Runner:
    """One process that performs attempts.

    Args:
      spec: what the supervisor wants of it.
      ends: its descriptors, already at their final numbers.
      tasks: the catalogue as this process imported it.
    """

    def __init__(self, spec: RunnerSpec, ends: Ends, tasks: dict[str, TaskDefinition]) -> None:
        self._spec = spec
        self._tasks = tasks
        self._emitter = Emitter(ends.events, spec.pipe_size, ends.blobs)
        self._orders = Orders(
            socket.socket(fileno=ends.orders), lambda token: self._emitter.send(GivenBack(token=token))
        )
        self._done = 0

    def run(self) -> int:
        """Work until retired; return the exit code."""
        if max(self._spec.runs, self._spec.concurrency) > 1 or self._spec.role == "intake":
            databases.watch()
        try:
            failpoints.hit("runner.hello")
            self._emitter.send(Hello(runner=self._spec.id, pid=os.getpid()))
            if self._spec.concurrency > 1:
                anyio.run(self._serve_shared, backend=self._spec.loop)
            else:
                if self._spec.role == "runner":
                    rehearse(self._spec, self._orders)
                self._serve_single()
        except OSError:
            return LOST_DESCRIPTORS  # user code has closed what we speak through; the supervisor names it
        return 0

    # --- one attempt at a time -----------------------------------------------------------------------------

    def _serve_single(self) -> None:
        while self._done < self._spec.runs:
            order = self._orders.next()
            if order is None:
                return
            if isinstance(order, Create):
                self._emitter.send(self._create(order))
                databases.release()
                continue
            self._done += 1
            self._attempt_alone(order)
            if self._done < self._spec.runs:
                end_children()
                databases.release()

    def _attempt_alone(self, start: Start) -> None:
        began = time.monotonic()
        attempt = self._begin(start)
        if isinstance(attempt, Finished):
            self._end(attempt)
            return
        if attempt.is_async:
            finished = anyio.run(self._alone_in_loop, attempt, backend=attempt.loop)
        else:
            try:
                with self._orders.interrupting(start.token, self._emitter):
                    finished = perform_sync(attempt)
            except RunCancelled:  # it came after the task's last line
                finished = attempt.gave_in()
            except TaskTimeout as error:  # so did this
                finished = conclude(attempt, error)
        self._end(msgspec.structs.replace(finished, seconds=time.monotonic() - began))

    async def _alone_in_loop(self, attempt: Attempt) -> Finished:
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as group:
            group.start_soon(self._cancel_when_told, {attempt.token: scope})
            finished = await perform_async(attempt, scope)
            await databases.arelease()
            group.cancel_scope.cancel()
        return finished

    async def _cancel_when_told(self, scopes: dict[str, anyio.CancelScope]) -> None:
        while not self._orders.closed:
            for token, scope in scopes.items():
                if self._orders.is_cancelled(token):
                    scope.cancel()
            await self._orders.wait()

    # --- a shared pool: many asynchronous attempts in one process ------------------------------------------

    async def _serve_shared(self) -> None:
        scopes: dict[str, anyio.CancelScope] = {}
        async with anyio.create_task_group() as group:
            while self._done < self._spec.runs:
                order = self._orders.next_nowait()
                self._cancel_told(
                    scopes
                )  # before waiting: the cancellation may have come with the order before
                if order is None and self._leaving:  # not before: the last order comes with the word to leave
                    break
                if order is None:
                    await self._orders.wait()
                elif isinstance(order, Start):
                    self._done += 1
                    self._start_shared(group, order, scopes)
            while scopes and not self._orders.closed:
                self._cancel_told(scopes)
                with anyio.move_on_after(1):
                    await self._orders.wait()

    @property
    def _leaving(self) -> bool:
        return self._orders.retired or self._orders.closed

    def _cancel_told(self, scopes: dict[str, anyio.CancelScope]) -> None:
        for token in self._orders.cancelled(scopes.keys()):
            scopes[token].cancel()

    def _start_shared(self, group: TaskGroup, start: Start, scopes: dict[str, anyio.CancelScope]) -> None:
        attempt = self._begin(start)
        if isinstance(attempt, Finished):
            self._end(attempt)
            return
        scopes[start.token] = anyio.CancelScope()
        group.start_soon(self._attempt_shared, attempt, scopes)

    async def _attempt_shared(self, attempt: Attempt, scopes: dict[str, anyio.CancelScope]) -> None:
        capture.attempt_token.set(attempt.token)
        try:
            self._end(await perform_async(attempt, scopes[attempt.token]))
        finally:
            del scopes[attempt.token]
        if not scopes:
            await databases.arelease()

    # --- what both have in common --------------------------------------------------------------------------

    def _begin(self, start: Start) -> Attempt | Finished:
        """Say `Started`, then return the attempt, or its end when it cannot begin."""
        if self._spec.concurrency == 1:
            capture.begin(start.token)
        failpoints.hit("runner.starting")
        self._emitter.send(Started(token=start.token))
        failpoints.hit("runner.started")
        definition = self._tasks.get(start.task)
        if definition is None:
            missing = TaskkitError(f"the code of this runner has no task {start.task!r}; reload it")
            return Finished(token=start.token, ending="raised", failure=failure_of(missing))
        attempt = Attempt(start, definition, self._emitter, self._spec, self._orders.mail(start.token))
        try:
            limit_memory(start.memory_limit or self._spec.memory_limit)
        except (OSError, ValueError) as error:
            return conclude(attempt, error)
        return attempt

    def _end(self, finished: Finished) -> None:
        if self._spec.concurrency == 1:
            capture.end(finished.token)
        else:
            capture.finish_lines(finished.token)
        self._orders.forget(finished.token)
        self._emitter.finished(finished)

    def _create(self, order: Create) -> Created:
        # Imported here: only intake runners need Django's form of validation.
        from taskkit.intake import save

        try:
            return save(self._tasks[order.task], order.fields, order.submission, ask=order.ask)
        except SubmitError as error:
            if error.errors:
                return Created(ask=order.ask, errors=error.errors)
            return Created(ask=order.ask, failure=failure_of(error))
        except Exception as error:
            return Created(ask=order.ask, failure=failure_of(error))


def close_connections() -> None:
    """Close the database's connections properly: a server logs a broken one as an error of the client's."""
    from django.db import connections

    with contextlib.suppress(Exception):
        connections.close_all()
