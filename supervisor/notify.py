"""What the service manager is told: sd_notify(3) over its datagram socket, nothing where there is none."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**fields: str | int) -> None:
    """Send fields such as READY=1, STATUS=…, STOPPING=1 to $NOTIFY_SOCKET. Never blocks, never raises."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket, in systemd's spelling
        address = "\0" + address[1:]
    text = "\n".join(f"{key}={str(value).replace(chr(10), ' ')}" for key, value in fields.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(text.encode(), address)
