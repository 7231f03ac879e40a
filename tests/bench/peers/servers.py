"""A peer that takes events by POST and streams them: its life, its processes, its publisher."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench import publisher
from tests.bench.contestants import SIZE, Channel
from tests.bench.readers import Target
from tests.bench.usage import with_children
from tests.helpers import wait_until_gone

APPS = Path(__file__).parent / "apps"

#: Seconds until a server accepts connections, until it has ended.
_PATIENCE = 30.0

_channels = itertools.count(1)

#: Starts a peer; it runs inside the block.
Start = Callable[[], AbstractContextManager["Peer"]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that runs.

    Attributes:
      stream, publish: paths; `{}` is the channel.
    """

    name: str
    pid: int
    port: int
    stream: str
    publish: str

    def pids(self) -> list[int]:
        """Return the server with its workers."""
        return with_children(self.pid)

    @contextmanager
    def channel(self, events: int, delay: float) -> Iterator[Channel]:
        """Have a fresh channel, with a publisher that waits."""
        name = f"channel-{next(_channels)}"
        command = [sys.executable, publisher.__file__, str(self.port), self.publish.format(name)]
        with subprocess.Popen(
            [*command, str(events), str(SIZE), str(delay)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as speaker:
            assert speaker.stdin is not None
            assert speaker.stdout is not None
            try:
                assert speaker.stdout.readline() == "ready\n", f"no publisher for {self.name}"
                stdin = speaker.stdin

                def begin() -> None:
                    stdin.write("\n")
                    stdin.flush()

                yield Channel(Target(self.port, self.stream.format(name)), begin)
            finally:
                speaker.kill()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(
    name: str,
    command: Callable[[int, Path], Sequence[str | Path]],
    *,
    stream: str,
    publish: str,
    env: Mapping[str, str] | None = None,
) -> Iterator[Peer]:
    """Run a server in an empty folder of its own.

    Args:
      command: from a port and the folder to the command line.

    Raises:
      RuntimeError: it does not accept connections; the message has what it printed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bulkhead-peer-") as home:
        folder = Path(home)
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(port, folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env={**os.environ, **(env or {})},
            )
        try:
            _await(process, port, name, log)
            yield Peer(name, process.pid, port, stream, publish)
        finally:
            _end(process)


def _await(process: subprocess.Popen[bytes], port: int, name: str, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{name} does not accept connections: {log.read_text(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    everybody = [psutil.Process(pid) for pid in with_children(process.pid)] if process.poll() is None else []
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for one in everybody:
        if one.is_running():
            one.kill()
    wait_until_gone(set(everybody), 5.0)
