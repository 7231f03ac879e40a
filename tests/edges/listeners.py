"""Four clients of an event stream that answer to the same four calls.

Two of them, `Sockets` on raw sockets, `Httpx` on httpx-sse, do in Python what an EventSource does: come back by
Last-Event-ID after the time that `retry:` told, give up for good on any status but 200. The other two are real
EventSources, in node, in Chromium.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import httpx
import httpx_sse

from tests.helpers import FOLDER_PREFIX, ROOT, eventually, raw_get
from tests.processes import opened

#: The newest that runs on node 18, which Debian 12 has.
EVENTSOURCE = "eventsource@3.0.7"

#: Milliseconds before an EventSource comes back that nobody has told when: what Chromium, npm's do.
_RETRY = 3000

#: Seconds until a helper process answers a command. A browser's first page takes half a second.
_ANSWER = 60.0


@dataclass
class Heard:
    """What a client has made of a stream.

    Attributes:
      events: id, type, data of each.
      opens: how often a stream was opened, the first time included.
      finals: of each error the client told, whether it was the last (`readyState` CLOSED).
      closed: whether it has given up for good; false when it was through by itself.
    """

    events: list[tuple[str, str, str]] = field(default_factory=list)
    opens: int = 0
    finals: list[bool] = field(default_factory=list)
    closed: bool = False


class Listening(Protocol):
    """One stream that is listened to."""

    def count(self) -> int:
        """Return how many events have come so far."""

    def opens(self) -> int:
        """Return how often it was opened so far."""

    def wait(self, timeout: float = 30.0) -> Heard:
        """Return everything once the client is through: at the event `until`, or when it has given up."""

    def close(self) -> None:
        """Leave. Again does nothing."""


class Listener(Protocol):
    """A client; `name` is for people."""

    name: str

    def open(self, url: str, token: str, names: Sequence[str], until: str | None) -> Listening:
        """Begin to listen to events of these names, to the end or to the first of the type `until`."""


# -- in this process ----------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """What a decoder found: an event, or a time to wait."""

    event: tuple[str, str, str] | None = None
    retry: int | None = None


class _Thread:
    """The life of an EventSource, over any way to read one response."""

    def __init__(self, source: _Python, url: str, token: str, until: str | None) -> None:
        self._source = source
        self._url = url
        self._token = token
        self._until = until
        self._leaving = threading.Event()
        self._heard = Heard()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def count(self) -> int:
        return len(self._heard.events)

    def opens(self) -> int:
        return self._heard.opens

    def wait(self, timeout: float = 30.0) -> Heard:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), f"{self._source.name} is not through: {self._heard}"
        return self._heard

    def close(self) -> None:
        self._leaving.set()

    def _live(self) -> None:
        retry, last = _RETRY, ""
        while not self._leaving.is_set():
            headers = {"Accept": "text/event-stream"}
            if self._token:
                headers["Authorization"] = f"Bearer {self._token}"
            if last:
                headers["Last-Event-ID"] = last
            with contextlib.suppress(OSError, http.client.HTTPException, httpx.TransportError):
                for piece in self._source.read(self._url, headers):
                    if isinstance(piece, int):
                        if piece != 200:
                            self._heard.finals.append(True)
                            self._heard.closed = True
                            return
                        self._heard.opens += 1
                        continue
                    retry = piece.retry if piece.retry is not None else retry
                    if piece.event is not None:
                        self._heard.events.append(piece.event)
                        last = piece.event[0] or last
                        if piece.event[1] == self._until:
                            return
                    if self._leaving.is_set():
                        return
            self._heard.finals.append(False)
            self._leaving.wait(retry / 1000)


class _Python:
    name = ""

    def open(self, url: str, token: str, names: Sequence[str], until: str | None) -> Listening:
        return _Thread(self, url, token, until)

    def read(self, url: str, headers: dict[str, str]) -> Iterator[int | _Piece]:
        """Yield the status, then what the body says, until it ends."""
        raise NotImplementedError


class Sockets(_Python):
    """http.client with the tests' own decoder."""

    name = "sockets"

    def read(self, url: str, headers: dict[str, str]) -> Iterator[int | _Piece]:
        with raw_get(url, headers=headers, timeout=60.0) as response:
            yield response.status
            while data := response.read():
                events = response.decoder.receive(data)
                if response.decoder.retries:
                    yield _Piece(retry=response.decoder.retries[-1])
                yield from (_Piece((event.id, event.type, event.data)) for event in events)


class Httpx(_Python):
    """httpx with httpx-sse."""

    name = "httpx"

    def read(self, url: str, headers: dict[str, str]) -> Iterator[int | _Piece]:
        with (
            httpx.Client(timeout=60.0, trust_env=False) as client,
            httpx_sse.connect_sse(client, "GET", url, headers=headers) as source,
        ):
            yield source.response.status_code
            if source.response.status_code != 200:
                return
            for event in source.iter_sse():
                # httpx-sse yields for every blank line; a block without data is no event (WHATWG HTML §9.2.6).
                yield _Piece((event.id, event.event, event.data) if event.data else None, event.retry)


# -- in others ----------------------------------------------------------------------------------------------


class Helper:
    """A helper process that answers JSON lines, as a context manager; it counts as an open tree of processes.

    Attributes:
      said: its first line, when it begins with one.
    """

    def __init__(self, name: str, command: Sequence[str], *, greets: bool = False, folder: Path) -> None:
        self.name = name
        self.state_dir = folder  # as a tree's, for whoever counts what a test leaves
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "TMPDIR": str(folder)},
                start_new_session=True,
            )
        opened.append(self)
        self.said: dict[str, Any] = self._answer() if greets else {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        opened.remove(self)

    def ask(self, **command: Any) -> Any:
        """Send a command; return the answer."""
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
            return self._answer()

    def open(self, url: str, token: str, names: Sequence[str], until: str | None) -> Listening:
        """Begin to listen, see Listener."""
        number = next(self._numbers)
        self.ask(op="open", id=number, url=url, token=token, names=list(names), until=until)
        return _Remote(self, number)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        timer = threading.Timer(_ANSWER, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        assert line, f"{self.name} has ended: {self._log.read_text(errors='replace')[-4000:]}"
        return json.loads(line)


class _Remote:
    """What a helper process listens to under a number."""

    def __init__(self, helper: Helper, number: int) -> None:
        self._helper = helper
        self._number = number
        self._is_open = True

    def count(self) -> int:
        return int(self._helper.ask(op="peek", id=self._number)["count"])

    def opens(self) -> int:
        return int(self._helper.ask(op="peek", id=self._number)["opens"])

    def wait(self, timeout: float = 30.0) -> Heard:
        eventually(self._is_done, timeout, f"{self._helper.name} to be through")
        heard = self._helper.ask(op="take", id=self._number)
        self.close()
        events = [(id, type, data) for id, type, data in heard["events"]]
        return Heard(events, heard["opens"], heard["finals"], heard["closed"])

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._helper.ask(op="close", id=self._number)

    def _is_done(self) -> bool:
        return bool(self._helper.ask(op="peek", id=self._number)["done"])


def new_folder() -> Path:
    """Return a folder for a helper's files; Chromium's socket there needs a short name."""
    return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))


def install_eventsource(folder: Path) -> None:
    """Have npm put its `eventsource` into the folder; its own cache makes that one second.

    Raises:
      AssertionError: npm says why not.
    """
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(
        [*command, "--prefer-offline", EVENTSOURCE],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def node() -> Iterator[Helper]:
    """Give npm's `eventsource` under node."""
    folder = new_folder()
    try:
        install_eventsource(folder)
        script = str(Path(__file__).with_name("eventsource.mjs"))
        with Helper("node", ["node", script, str(folder)], folder=folder) as helper:
            yield helper
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def browser() -> Iterator[Helper]:
    """Give Debian's Chromium; `said["origin"]` is that of its pages."""
    path = shutil.which("chromium")
    assert path, "tests/apt.txt has chromium"
    folder = new_folder()
    try:
        command = [sys.executable, "-m", "tests.edges.browser", path]
        with Helper("chromium", command, greets=True, folder=folder) as helper:
            yield helper
    finally:
        shutil.rmtree(folder, ignore_errors=True)
