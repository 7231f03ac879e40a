"""nchan, the C server: Debian's nginx with Debian's module, configured as both come.

From Debian's nginx.conf stay `worker_processes auto`, sendfile and tcp_nopush; from nchan its defaults: ten messages
per channel, 128 MB of shared memory. Changed is what 10,000 connections need, and the access log is off, as nobody else
keeps one. `auto` is two workers on two cores: nothing is lost that way, and a delivery costs no more than with one
(11.1, 11.4, 10.2, 10.6 us beside 13.0, 11.3, 12.1, 11.5, 1,000 subscribers at 50 events/s).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.peers.environments import debian
from tests.bench.peers.servers import Peer, serving

#: Connections per worker: all of the 10,000 may come to the same one.
CONNECTIONS = 15_000

CONFIGURATION = """
load_module /usr/lib/nginx/modules/ngx_nchan_module.so;
worker_processes auto;
daemon off;
pid {folder}/pid;
error_log stderr;
events {{ worker_connections {connections}; }}
http {{
    sendfile on;
    tcp_nopush on;
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location ~ ^/stream/(.+)$ {{ nchan_subscriber eventsource; nchan_channel_id $1; }}
        location ~ ^/publish/(.+)$ {{ nchan_publisher; nchan_channel_id $1; }}
    }}
}}
"""


def _command(port: int, folder: Path) -> list[str]:
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format(port=port, folder=folder, connections=CONNECTIONS))
    return [debian("nginx"), "-p", str(folder), "-e", "stderr", "-c", str(file)]


@contextmanager
def nchan() -> Iterator[Peer]:
    """Run it."""
    with serving("nchan", _command, stream="/stream/{}", publish="/publish/{}") as peer:
        yield peer
