"""A real courier in a thread, with the test as its supervisor, its gateway and the processes that poke it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from taskkit import linux, seqpacket
from taskkit.wire import codec
from taskkit.wire.messages import CourierMessage, CourierReady, CourierToGateway, Link, Message, Stop

#: Seconds for any single wait: how long a broken test hangs.
PATIENCE = 20.0

_M = TypeVar("_M", bound=Message)


class Tree:
    """What surrounds the courier under test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.poke_path = str(directory / "poke.sock")
        self._poke = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._poke.bind(self.poke_path)
        self.control, self._theirs = linux.seqpacket_pair()
        self.control.settimeout(PATIENCE)
        self.gateway: socket.socket | None = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="courier under test", daemon=True)

    def _run(self) -> None:
        from taskkit.courier.loop import main

        try:
            main(self._theirs, self._poke, str(self.directory))
        except BaseException as error:
            self.failure = error

    def start(self) -> str:
        """Start the courier; return the name of its node."""
        self._thread.start()
        ready = receive(self.control, CourierMessage)
        assert isinstance(ready, CourierReady)
        return ready.node

    def link(self) -> socket.socket:
        """Be a new gateway; the former one is gone."""
        self.unlink()
        self.gateway, other = linux.seqpacket_pair()
        self.gateway.settimeout(PATIENCE)
        with other:
            seqpacket.send(self.control, codec.pack(Link()), (other.fileno(),))
        return self.gateway

    def unlink(self) -> None:
        """Die as the gateway."""
        if self.gateway is not None:
            self.gateway.close()
            self.gateway = None

    def poke(self) -> None:
        """Do what a Django process does at its commit."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"\0", self.poke_path)

    def tell(self, *messages: Message) -> None:
        """Send as the gateway."""
        assert self.gateway is not None
        for message in messages:
            seqpacket.send(self.gateway, codec.pack(message))

    def expect(self, kind: type[_M]) -> _M:
        """Return the next message to the gateway, which has to be a `kind`."""
        assert self.gateway is not None
        message = receive(self.gateway, CourierToGateway)
        assert isinstance(message, kind), message
        return message

    def expect_silence(self, seconds: float) -> None:
        """Make sure that nothing comes for so long."""
        assert self.gateway is not None
        self.gateway.settimeout(seconds)
        try:
            message = receive(self.gateway, CourierToGateway)
        except TimeoutError:
            return
        finally:
            self.gateway.settimeout(PATIENCE)
        raise AssertionError(f"unexpected: {message}")

    def stop(self) -> None:
        """Have the courier leave, in order."""
        if self._thread.is_alive():
            seqpacket.send(self.control, codec.pack(Stop()))
        self.wait()

    def wait(self) -> None:
        """Wait until the courier has left."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the courier does not leave"

    def close(self) -> None:
        """Close everything; a courier that still lives sees the end of file."""
        self.unlink()
        self.control.close()
        if self._thread.ident is not None:
            self.wait()
        self._theirs.close()
        self._poke.close()


def receive(sock: socket.socket, expected: Any) -> Any:
    """Return the next message, descriptors refused.

    Raises:
      EOFError: the courier closed the socket.
    """
    packet = seqpacket.receive(sock)
    if packet is None:
        raise EOFError
    payload, fds = packet
    assert not fds
    return codec.unpack(payload, expected)


@contextmanager
def tree(directory: Path) -> Iterator[Tree]:
    """Give a tree whose courier is not started yet."""
    made = Tree(directory)
    try:
        yield made
    finally:
        made.close()
