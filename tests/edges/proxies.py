"""nginx, Caddy: started with the files in deploy/, which are changed in nothing but addresses."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.edges.listeners import new_folder
from tests.helpers import ROOT, eventually
from tests.processes import opened

#: Debian has nginx where an ordinary user's PATH does not look.
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

#: How a site may have set nginx up for everything else: what compresses whatever it can must not get at streams.
_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/log;
{user}
events {{ worker_connections 1024; }}
http {{
    access_log off;
    gzip on;
    gzip_proxied any;
    gzip_min_length 1;
    gzip_types text/event-stream application/x-ndjson text/plain application/json;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/bulkhead.conf;
}}
"""

_CADDY = """
{{
	admin off
	skip_install_trust
	auto_https disable_redirects
}}
import {path}
"""


@dataclass
class Proxy:
    """A running one; counts as an open tree of processes."""

    url: str
    pid: int
    state_dir: Path


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _replaced(text: str, changes: Mapping[str, str]) -> str:
    """Return the text with each change made at the one place where it belongs."""
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def _accepts(port: int, process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return process.poll() is not None


@contextlib.contextmanager
def _running(
    command: Callable[[Path, int], Sequence[str]], scheme: str, environment: Mapping[str, str]
) -> Iterator[Proxy]:
    """Run a proxy on a port that is free; another one when somebody was quicker."""
    folder = new_folder()
    folder.chmod(0o755)
    env = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    process: subprocess.Popen[bytes] | None = None
    try:
        for _ in range(5):
            port = free_port()
            with (folder / "output").open("ab") as output:
                process = subprocess.Popen(
                    command(folder, port),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=env | {name: value.format(port=port) for name, value in environment.items()},
                    start_new_session=True,
                )
            proxy = Proxy(f"{scheme}://localhost:{port}", process.pid, folder)
            opened.append(proxy)
            eventually(lambda port=port, process=process: _accepts(port, process), 20, "a proxy that accepts")
            if process.poll() is None:
                break
            opened.remove(proxy)
        else:
            raise AssertionError((folder / "output").read_text())
        try:
            yield proxy
        finally:
            process.terminate()
            try:
                process.wait(10)
            finally:
                opened.remove(proxy)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def nginx(upstream: str, *, http_1_0: bool = False) -> Iterator[Proxy]:
    """Give nginx in front of `upstream` (HOST:PORT).

    With `http_1_0` it asks the gateway as it does when nobody says `proxy_http_version`.
    """
    found = shutil.which("nginx", path=_PATH)
    assert found, "tests/apt.txt has nginx"
    site = _replaced(
        (ROOT / "deploy/nginx/bulkhead.conf").read_text(),
        {"server 127.0.0.1:8888;": f"server {upstream};"}
        | ({"proxy_http_version 1.1;": ""} if http_1_0 else {}),
    )

    def command(folder: Path, port: int) -> Sequence[str]:
        text = _replaced(site, {"listen 80;": f"listen 127.0.0.1:{port};"})
        (folder / "bulkhead.conf").write_text(text)
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, user=user))
        return [found, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "log")]

    with _running(command, "http", {}) as proxy:
        yield proxy


@contextlib.contextmanager
def caddy(upstream: str, *, tls: bool = False) -> Iterator[Proxy]:
    """Give Caddy in front of `upstream`; with `tls` under a certificate of its own authority."""
    found = shutil.which("caddy", path=_PATH)
    assert found, "tests/apt.txt has caddy"
    site = (
        "https://localhost:{port}" if tls else "http://localhost:{port}"
    )  # `localhost`: its own authority signs

    def command(folder: Path, port: int) -> Sequence[str]:
        (folder / "Caddyfile").write_text(_CADDY.format(path=ROOT / "deploy/caddy/Caddyfile"))
        return [found, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]

    environment = {"BULKHEAD_SITE": site, "BULKHEAD_UPSTREAM": upstream}
    with _running(command, "https" if tls else "http", environment) as proxy:
        yield proxy
