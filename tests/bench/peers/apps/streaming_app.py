"""django-streaming-coordinator: whoever first asks for a row's stream has its server perform the task."""

from __future__ import annotations

import os

import django

from tests.bench.peers.apps.driver import first_event

django.setup()

from tests.bench.peers.apps.streams.models import Beat  # noqa: E402  (Django first)


def first() -> float:
    """Make a row, ask for its stream; return the Unix time of the first event."""
    row = Beat.objects.create()
    return first_event(os.environ["BENCH_URL"], f"/stream/streams/Beat/{row.pk}", {})
