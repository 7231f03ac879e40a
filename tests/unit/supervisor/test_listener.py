"""The sockets that the tree listens on: bound, refused with a remedy, replaced when stale."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from supervisor import listener
from taskkit.errors import AddressInUse, SettingsError
from taskkit.settings import Settings
from tests import helpers

pytestmark = pytest.mark.usefixtures("leaves_nothing")

Deadline = Callable[[float], AbstractContextManager[trio.CancelScope]]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a moment for a taken address instead of seconds."""
    monkeypatch.setattr(listener, "BIND_SECONDS", 0.2)


@pytest.fixture
def taken() -> Iterator[str]:
    """Give an address that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"127.0.0.1:{sock.getsockname()[1]}"


# --- who may be listened to ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "uds", "hosts", "fine"),
    [
        ("127.0.0.1:8888", None, [], True),
        ("127.9.9.9:1", None, [], True),
        ("[::1]:0", None, [], True),
        ("localhost:80", None, [], True),
        ("0.0.0.0:8888", None, [], False),
        ("[::]:8888", None, [], False),
        ("192.0.2.7:8888", None, [], False),
        ("example.org:80", None, [], False),
        ("0.0.0.0:8888", None, ["example.org"], True),
        ("[::]:8888", None, ["*"], True),
        ("0.0.0.0:8888", "/run/bulkhead.sock", [], True),  # nothing is bound there
    ],
)
def test_listening_beyond_this_machine_needs_names(
    bind: str, uds: str | None, hosts: list[str], fine: bool
) -> None:
    settings = Settings(bind=bind, uds=uds)
    if fine:
        listener.check_exposure(settings, hosts)
        return
    with pytest.raises(SettingsError, match="ALLOWED_HOSTS") as caught:
        listener.check_exposure(settings, hosts)
    assert f"BIND = {bind!r}" in str(caught.value)


# --- TCP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "begins"), [("127.0.0.1:0", "http://127.0.0.1:"), ("[::1]:0", "http://[::1]:")]
)
async def test_port_zero_takes_a_free_one_and_tells_it(tmp_path: Path, bind: str, begins: str) -> None:
    sock, url = await listener.listen(Settings(bind=bind), tmp_path)
    with sock:
        port = sock.getsockname()[1]
        assert port
        assert url == f"{begins}{port}"
        with socket.create_connection(sock.getsockname()[:2], timeout=5):
            pass
        assert not os.get_inheritable(sock.fileno())


async def test_a_taken_port_is_refused_with_a_remedy(
    tmp_path: Path, taken: str, quick: None, deadline: Deadline
) -> None:
    began = trio.current_time()
    with deadline(5), pytest.raises(AddressInUse) as caught:
        await listener.listen(Settings(bind=taken), tmp_path)
    assert trio.current_time() - began >= 0.2, "it waited for a gateway that drains"
    for words in (f"BIND = {taken!r}", "--bind", "port 0"):
        assert words in str(caught.value)
    assert caught.value.exit_code == 2


async def test_a_port_that_becomes_free_in_time_is_taken(tmp_path: Path, deadline: Deadline) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = "127.0.0.1:{1}".format(*other.getsockname())
        found: list[str] = []

        async def listen() -> None:
            sock, url = await listener.listen(Settings(bind=bind), tmp_path)
            sock.close()
            found.append(url)

        with deadline(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                await trio.testing.wait_all_tasks_blocked()
                assert not found
                other.close()
    assert found == [f"http://{bind}"]


@pytest.mark.parametrize("bind", ["192.0.2.1:8888", "no.such.host.invalid:80"])
async def test_an_address_that_is_not_here_is_a_wrong_setting(
    tmp_path: Path, bind: str, deadline: Deadline
) -> None:
    with deadline(20), pytest.raises(SettingsError, match=f"BIND = '{bind}'"):
        await listener.listen(Settings(bind=bind), tmp_path)


HOLDER = """
import socket, sys, time
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
time.sleep(60)
"""


@pytest.fixture
def gateway() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Give a process that holds a port, as a gateway whose supervisor was killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, f"127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


async def test_an_old_gateway_that_does_not_leave_is_killed(
    tmp_path: Path, gateway: tuple[subprocess.Popen[str], str], quick: None, deadline: Deadline
) -> None:
    process, bind = gateway
    record = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    (tmp_path / "store.lock").write_text(json.dumps(record))
    with deadline(10):
        sock, url = await listener.listen(Settings(bind=bind), tmp_path)
    sock.close()
    assert url == f"http://{bind}"
    assert process.wait(5) == -9


@pytest.mark.parametrize(
    "record",
    [
        '{{"pid": {pid}, "started": 1.0}}',
        '{{"pid": {pid}}}',
        "garbage",
        "[]",
        '{{"pid": 0, "started": 0}}',
        "",
    ],
)
async def test_nobody_is_killed_whom_the_lock_does_not_name_exactly(
    tmp_path: Path,
    gateway: tuple[subprocess.Popen[str], str],
    quick: None,
    deadline: Deadline,
    record: str,
) -> None:
    process, bind = gateway
    (tmp_path / "store.lock").write_text(record.format(pid=process.pid))
    with deadline(10), pytest.raises(AddressInUse):
        await listener.listen(Settings(bind=bind), tmp_path)
    assert process.poll() is None


# --- Unix sockets ----------------------------------------------------------------------------------------------


async def test_a_unix_socket_is_for_user_and_group(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    sock, url = await listener.listen(Settings(uds=str(path)), tmp_path)
    with sock:
        assert url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    listener.remove_unix(str(path))
    assert not path.exists()
    listener.remove_unix(str(path))


async def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    sock, _ = await listener.listen(Settings(uds=str(path)), tmp_path)
    with sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


async def test_a_living_unix_socket_is_refused_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(AddressInUse, match=r"web\.sock.*another program listens there"):
            await listener.listen(Settings(uds=str(path)), tmp_path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
async def test_a_socket_of_another_kind_is_not_removed(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "manager.sock"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        with pytest.raises(SettingsError, match="another kind"):
            await listener.listen(Settings(uds=str(path)), tmp_path)
    assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "dangling"])
async def test_what_is_no_socket_is_not_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("data")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(SettingsError, match="another kind"):
        await listener.listen(Settings(uds=str(path)), tmp_path)
    assert path.is_symlink() or path.exists()


async def test_a_folder_that_does_not_exist_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        await listener.listen(Settings(uds=str(tmp_path / "absent" / "web.sock")), tmp_path)


async def test_a_path_longer_than_an_address_works(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    path = folder / "web.sock"
    sock, _ = await listener.listen(Settings(uds=str(path)), tmp_path)
    with sock:
        assert path.is_socket()


# --- sockets handed over by systemd ----------------------------------------------------------------------------

#: Takes its standard input for descriptor 3, as systemd passes it; prints what `listen` made of it.
ACTIVATED = """
import os, sys
os.dup2(0, 3)
os.environ["LISTEN_PID"] = sys.argv[1].format(own=os.getpid())
os.environ["LISTEN_FDS"] = sys.argv[2]
import pathlib, trio
from supervisor import listener
from taskkit.settings import Settings
sock, url = trio.run(listener.listen, Settings(bind="127.0.0.1:0"), pathlib.Path("/tmp"))
print(url, sorted(set(os.environ) & {"LISTEN_PID", "LISTEN_FDS"}))
"""


def activated(sock: socket.socket, pid: str, count: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", ACTIVATED, pid, count],
        stdin=sock.fileno(),
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_a_passed_socket_is_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert activated(sock, "{own}", "1") == f"http://127.0.0.1:{port} []"


def test_a_passed_unix_socket_is_accepted(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        assert activated(sock, "{own}", "1") == f"unix:{tmp_path / 's'} []"


@pytest.mark.parametrize(("pid", "count"), [("1", "1"), ("{own}", "0"), ("{own}", ""), ("", "1")])
def test_a_socket_passed_to_somebody_else_is_not_taken(pid: str, count: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        printed = activated(sock, pid, count)
        assert f":{sock.getsockname()[1]} " not in printed
        assert printed.endswith("[]"), "no child takes it for its own either"


# --- operator and poke -----------------------------------------------------------------------------------------


def test_the_operator_socket_is_for_this_user_and_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    for _ in range(2):
        with listener.listen_seqpacket(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(path))


def test_anybody_may_poke_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "poke.sock"
    for _ in range(2):
        with listener.bind_poke(path) as sock:
            assert stat.S_IMODE(path.stat().st_mode) == 0o666
            sock.settimeout(5)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                client.sendto(b"", str(path))
            assert sock.recv(10) == b""


def test_deep_state_directories_have_working_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 150)
    folder.mkdir()
    with listener.listen_seqpacket(folder / "control.sock"), listener.bind_poke(folder / "poke.sock"):
        assert (folder / "control.sock").is_socket()
        assert (folder / "poke.sock").is_socket()
