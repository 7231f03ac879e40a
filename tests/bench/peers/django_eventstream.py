"""django-eventstream under Daphne, as its README sets it up: one process, `send_event` called by a view in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.peers.environments import python_of
from tests.bench.peers.servers import APPS, Peer, serving

REQUIREMENTS = ("django-eventstream==5.3.4", "daphne==4.2.3", "Django==5.2.19")


@contextmanager
def django_eventstream() -> Iterator[Peer]:
    """Run it. Without storage, which its README leaves off as well: a client that has ten events waiting loses more."""
    python = python_of("django-eventstream", REQUIREMENTS)
    with serving(
        "django-eventstream",
        lambda port, _: [
            *(python, "-m", "daphne", "--port", str(port), "--verbosity", "0", "eventstream_app:application")
        ],
        stream="/events/{}/",
        publish="/publish/{}/",
        env={"PYTHONPATH": str(APPS)},
    ) as peer:
        yield peer
