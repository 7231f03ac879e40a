"""A real runner: forked as a zygote would, at real ends, spoken to as a gateway does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from django.db import connections

from gateway.output import Line, OutputParser
from supervisor.runners import open_ends
from taskkit import linux, seqpacket
from taskkit.schema import parameters_of
from taskkit.wire.codec import pack, unpack_runner_frame
from taskkit.wire.framing import max_frame, read_frames
from taskkit.wire.messages import (
    Cancel,
    Event,
    Finished,
    Hello,
    Order,
    Progress,
    RunnerMessage,
    RunnerSpec,
    Start,
    Started,
    TaskInfo,
)

if TYPE_CHECKING:  # they need Django's settings, which a fixture makes
    from taskkit.registry import TaskDefinition
    from taskkit.tasks import Backoff

_M = TypeVar("_M", bound=RunnerMessage)

#: Seconds for anything that a sound runner does in milliseconds.
PATIENCE = 20.0


def definition(
    func: Callable[..., Any], *, loop: str | None = None, backoff: Backoff | None = None, **info: Any
) -> TaskDefinition:
    """Return a function as the registry would find it, named `t.<its name>`."""
    from taskkit.registry import TaskDefinition

    name = f"t.{func.__name__}"
    return TaskDefinition(
        info=TaskInfo(name=name, path=name, kind="function", **info),
        func=func,
        model=None,
        loop=loop,
        backoff=backoff,
        parameters=parameters_of(func),
    )


def named(definitions: Iterable[TaskDefinition]) -> dict[str, TaskDefinition]:
    """Return definitions by name."""
    return {each.info.name: each for each in definitions}


class Life:
    """One runner from fork to exit, as a context manager. It is killed at the end if it still lives.

    Attributes:
      pid: of the runner.
      messages: what it has said so far.
      code: exit code, or the negative number of the signal, once it has left.
    """

    def __init__(self, tasks: dict[str, TaskDefinition], **spec: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bh-blobs-")
        self.blobs = Path(self._folder.name)
        self._ends = open_ends()
        values: dict[str, Any] = {"id": "u-1", "pipe_size": self._ends.pipe_size}
        self.spec = RunnerSpec(**values | spec)
        self._tasks = tasks
        self._data = b""
        self._parser = OutputParser(1_000_000)
        self._lines: dict[str, list[Line]] = {}
        self.messages: list[RunnerMessage] = []
        self.code: int | None = None

    def __enter__(self) -> Self:
        directory = os.open(self.blobs, os.O_RDONLY | os.O_DIRECTORY)
        parent = os.getpid()
        connections.close_all()  # as the zygote does: SQLite's locks do not survive a fork
        with warnings.catch_warnings():
            # Threads of other tests lie idle in this process; the child does not miss them.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                from taskkit.zygote import roles

                fds = [*self._ends.far, self._ends.faults, directory]
                roles.live_as_runner(self.spec, fds, parent, parent, self._tasks)
            finally:
                os._exit(99)
        os.close(directory)
        self._ends.close_far()
        self._pidfd = os.pidfd_open(self.pid)
        self._orders = socket.socket(fileno=os.dup(self._ends.near[2]))
        os.set_blocking(self._ends.near[0], False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.hang_up()
        os.close(self._pidfd)
        self._ends.close_near()
        self._folder.cleanup()

    def hang_up(self) -> None:
        """Close this copy of the orders socket."""
        self._orders.close()

    # --- speaking

    def order(self, order: Order) -> None:
        """Give an order."""
        seqpacket.send(self._orders, pack(order))

    def start(self, task: str, *args: Any, token: str = "tok", **changes: Any) -> str:
        """Order an attempt; return its token."""
        values: dict[str, Any] = {"run": "run-" + token, "attempt": 1, "args": list(args)} | changes
        packed: dict[str, Any] = {
            key: json.dumps(values.pop(key)).encode()
            for key in ("args", "kwargs", "metadata")
            if key in values
        }
        self.order(Start(token=token, task=task, **values | packed))
        return token

    def cancel(self, token: str = "tok") -> None:
        """Order a cancellation."""
        self.order(Cancel(token=token))

    # --- listening

    def _read(self, timeout: float) -> bool:
        """Take in what comes within `timeout`; return False at the end of the pipe."""
        events = self._ends.near[0]
        if not select.select([events], [], [], timeout)[0]:
            return True
        part = os.read(events, 1 << 20)
        self._data += part
        for frame in read_frames(self._data, max_frame(self.spec.pipe_size)):
            self._data = self._data[frame.size :]
            self.messages.append(unpack_runner_frame(frame))
        return bool(part)

    def wait_for(self, kind: type[_M], token: str = "tok", where: Callable[[_M], bool] | None = None) -> _M:
        """Return the first message of this kind and token that `where` accepts.

        Raises:
          AssertionError: it did not come in time.
        """
        end = time.monotonic() + PATIENCE
        while True:
            for message in self.messages:
                if (
                    isinstance(message, kind)
                    and getattr(message, "token", token) == token
                    and (where is None or where(message))
                ):
                    return message
            assert time.monotonic() < end, f"no {kind.__name__} of {token!r} in {self.messages}"
            if not self._read(0.2):
                raise AssertionError(f"it left without a {kind.__name__}: {self.messages}, {self.lines('')}")

    def finished(self, token: str = "tok") -> Finished:
        """Return how the attempt ended."""
        return self.wait_for(Finished, token)

    def wait_event(self, type: str, token: str = "tok") -> dict[str, Any]:
        """Return the data of the first event of that name."""
        found: dict[str, Any] = json.loads(self.wait_for(Event, token, lambda e: e.type == type).data)
        return found

    def told(self, token: str = "tok") -> list[tuple[str, dict[str, Any]]]:
        """Return name and data, without what every event has, of the attempt's events so far."""
        found = []
        for message in self.messages:
            if isinstance(message, Event | Progress) and message.token == token:
                data = json.loads(message.data)
                name = message.type if isinstance(message, Event) else "run.progress"
                found.append((name, {key: value for key, value in data.items() if key[0] != "_"}))
        return found

    def order_of_kinds(self) -> list[str]:
        """Return the classes of all messages so far."""
        return [type(message).__name__ for message in self.messages]

    def lines(self, token: str = "tok") -> list[str]:
        """Return what the attempt printed so far."""
        while linux.bytes_to_read(self._ends.near[1]):
            for found, lines in self._parser.receive(os.read(self._ends.near[1], 65536), 0.0).items():
                self._lines.setdefault(found, []).extend(lines)
        return [line.text for line in self._lines.get(token, [])]

    def exit(self) -> int:
        """Wait for its end; return exit code or negative signal. Everything it said is in `messages`."""
        end = time.monotonic() + PATIENCE
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        while not poll.poll(50):
            self._read(0)
            assert time.monotonic() < end, f"it does not leave: {self.order_of_kinds()}"
        while linux.bytes_to_read(self._ends.near[0]):
            self._read(0)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


@contextlib.contextmanager
def living(tasks: dict[str, TaskDefinition], **spec: Any) -> Iterator[Life]:
    """Give a runner that has said hello."""
    with Life(tasks, **spec) as life:
        life.wait_for(Hello)
        yield life


__all__ = ["Life", "Started", "definition", "living", "named"]
