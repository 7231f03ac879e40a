"""Publishes to a peer, in a process of its own: one event per POST, over one connection that is kept.

    python publisher.py PORT PATH EVENTS SIZE DELAY

It begins when it reads a line from stdin. An event is what `proj.paced` makes: `at`, the time; a text of SIZE bytes.
"""

from __future__ import annotations

import http.client
import json
import sys
import time


def publish(port: int, path: str, events: int, size: int, delay: float) -> None:
    """Publish events that are due every `delay` seconds, each when the one before has been taken."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    print("ready", flush=True)
    sys.stdin.readline()
    text = "~".ljust(size, "x")
    due = time.monotonic()
    for number in range(1, events + 1):
        time.sleep(max(0.0, due - time.monotonic()))
        due += delay
        body = json.dumps({"number": number, "at": time.time(), "text": text})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status < 300, (response.status, path)


if __name__ == "__main__":
    publish(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
