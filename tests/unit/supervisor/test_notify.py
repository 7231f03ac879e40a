"""What reaches a service manager's socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.notify import notify

pytestmark = pytest.mark.usefixtures("leaves_nothing")


@pytest.fixture(params=["file", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """Give a listening service manager, whose address is in $NOTIFY_SOCKET."""
    name = f"bulkhead-test-{os.getpid()}"
    address, shown = (
        (str(tmp_path / "notify"), str(tmp_path / "notify"))
        if request.param == "file"
        else ("\0" + name, "@" + name)
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", shown)
        yield sock


def test_fields_arrive_one_to_a_line(manager: socket.socket) -> None:
    notify(READY=1, STATUS="serving http://127.0.0.1:8888", MAINPID=42)
    assert manager.recv(1000) == b"READY=1\nSTATUS=serving http://127.0.0.1:8888\nMAINPID=42"


def test_a_line_break_cannot_make_another_field(manager: socket.socket) -> None:
    notify(STATUS="one\nSTOPPING=1")
    assert manager.recv(1000) == b"STATUS=one STOPPING=1"


def test_each_call_is_one_datagram(manager: socket.socket) -> None:
    notify(READY=1)
    notify(STOPPING=1)
    assert [manager.recv(1000), manager.recv(1000)] == [b"READY=1", b"STOPPING=1"]


def test_a_manager_that_does_not_read_blocks_nobody(manager: socket.socket) -> None:
    for _ in range(5000):
        notify(STATUS="x" * 1000)
    assert manager.recv(2000) == b"STATUS=" + b"x" * 1000


@pytest.mark.parametrize("address", ["", "/nonexistent/socket", "@nobody", "/" + "x" * 300, "vsock:2:1"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify(READY=1)


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY=1)
