"""The sockets that the tree listens on: made by the supervisor, so that no child's death closes them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import trio

from taskkit import linux
from taskkit.errors import AddressInUse, SettingsError
from taskkit.settings import Settings, is_loopback, parse_bind

#: Connections that may wait for the gateway. Hypercorn's own 100 overflows when a page's tabs come back at once
#: after a restart; the kernel caps it at net.core.somaxconn (4,096 by default).
BACKLOG: Final = 2_048

#: Seconds to wait for the gateway of a supervisor that was killed: it closes its listener at once, then drains.
BIND_SECONDS: Final = 3.0

#: systemd passes sockets from this descriptor on (sd_listen_fds(3)).
_FIRST_PASSED: Final = 3


def check_exposure(settings: Settings, allowed_hosts: list[str]) -> None:
    """Refuse to listen beyond this machine without knowing which names are ours.

    Raises:
      SettingsError: BIND is no loopback address, and neither ALLOWED_HOSTS is set.
    """
    if settings.uds is None and not is_loopback(parse_bind(settings.bind)[0]) and not allowed_hosts:
        raise SettingsError(
            f"BIND = {settings.bind!r} is reachable from other machines, but ALLOWED_HOSTS is empty: name the hosts "
            "that may be asked for, in Django's ALLOWED_HOSTS or in TASKKIT['ALLOWED_HOSTS']"
        )


async def listen(settings: Settings, state_dir: Path) -> tuple[socket.socket, str]:
    """Return the listening socket and the URL of the gateway.

    Raises:
      AddressInUse: somebody else listens there; the message has the remedy.
      SettingsError: the address does not exist here.
    """
    passed = _passed_socket()
    if passed is not None:
        return passed, _url(passed)
    if settings.uds is not None:
        return _listen_unix(Path(settings.uds)), f"unix:{settings.uds}"
    return await _listen_tcp(settings.bind, state_dir)


def _passed_socket() -> socket.socket | None:
    """Return the socket that systemd opened for this process, if any (sd_listen_fds(3))."""
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or count in ("", "0"):
        return None
    return socket.socket(fileno=os.dup(_FIRST_PASSED))


def _url(sock: socket.socket) -> str:
    address = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{address}"
    host = f"[{address[0]}]" if sock.family == socket.AF_INET6 else address[0]
    return f"http://{host}:{address[1]}"


async def _listen_tcp(bind: str, state_dir: Path) -> tuple[socket.socket, str]:
    deadline = trio.current_time() + BIND_SECONDS
    asked_to_leave = False
    while True:
        try:
            sock = _bind_tcp(bind)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SettingsError(f"BIND = {bind!r}: {error.strerror or error}") from error
            if trio.current_time() < deadline:
                await trio.sleep(0.05)
                continue
            if not asked_to_leave and _kill_old_gateway(state_dir):
                asked_to_leave = True
                deadline = trio.current_time() + 1.0
                continue
            raise AddressInUse(
                f"BIND = {bind!r}: another program listens there; stop it, or choose another address with --bind "
                "(port 0 takes a free one) or BIND in settings"
            ) from error
        return sock, _url(sock)


def _bind_tcp(bind: str) -> socket.socket:
    host, port = parse_bind(bind)
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _kill_old_gateway(state_dir: Path) -> bool:
    """End the gateway that a killed supervisor left behind on this state directory; return whether there was one.

    The store's lock file names it by pid and start time, so that another process with its number is left alone.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
        record = json.loads((state_dir / "store.lock").read_text())
        process = psutil.Process(int(record["pid"]))
        if abs(process.create_time() - float(record["started"])) < 0.05:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def _listen_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _replacing(path) as address:
            sock.bind(address)
        os.chmod(path, 0o660)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def remove_unix(path: str) -> None:
    """Remove the socket file at `path`; the tree that listened there is gone."""
    Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """Yield the address for `path`, after removing a socket there that nobody listens on.

    Raises:
      AddressInUse: somebody does.
      SettingsError: something else lies there, or the folder cannot be written.
    """
    try:
        with linux.short_socket_path(path) as address:
            if path.exists() or path.is_symlink():
                _remove_dead(path, address)
            yield address
    except OSError as error:
        raise SettingsError(f"socket {str(path)!r}: {error.strerror or error}") from error


def _remove_dead(path: Path, address: str) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise SettingsError(f"socket {str(path)!r}: a file of another kind lies there; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                # A SEQPACKET or datagram socket. Whether it lives cannot be told by connecting, and /run is full
                # of living ones.
                raise SettingsError(
                    f"socket {str(path)!r}: a socket of another kind lies there; choose another path"
                ) from error
            raise
    raise AddressInUse(f"socket {str(path)!r}: another program listens there; stop it or choose another path")


def listen_seqpacket(path: Path) -> socket.socket:
    """Return a listening SEQPACKET socket at `path` (0600); a stale one is replaced: the caller holds the lock."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path.unlink(missing_ok=True)
    with linux.short_socket_path(path) as address:
        sock.bind(address)
    os.chmod(path, 0o600)
    sock.listen(128)
    return sock


def bind_poke(path: Path) -> socket.socket:
    """Return the datagram socket that Django processes poke; other users', too, so anybody may write (0666)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    path.unlink(missing_ok=True)
    with linux.short_socket_path(path) as address:
        sock.bind(address)
    os.chmod(path, 0o666)
    return sock
