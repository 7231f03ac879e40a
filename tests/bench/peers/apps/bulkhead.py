"""Ours, as a project's own process submits it: rows of the outbox, or the batch endpoint."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time

import django
import httpx

from tests.bench.peers.apps.driver import first_event

django.setup()

from django.db import transaction  # noqa: E402

from taskkit import get_client, submit  # noqa: E402  (Django first)

URL, TOKEN = os.environ["BENCH_URL"], os.environ["BENCH_TOKEN"]
BATCH = 1_000


def one(path: str) -> None:
    """Submit as the README does from Django: a row in the outbox, in a transaction of its own."""
    submit("proj.bench_stamp", kwargs={"path": path})


def committed(path: str) -> float:
    """Submit in a transaction; return the Unix time of its commit, in front of whatever else is done then."""
    at: list[float] = []
    with transaction.atomic():
        transaction.on_commit(lambda: at.append(time.time()))
        one(path)
    return at[0]


def many(path: str, n: int) -> None:
    """Submit by the batch endpoint, which is there for many."""
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:
        for first in range(0, n, BATCH):
            runs = [{"task": "proj.bench_stamp", "kwargs": {"path": path}}] * min(BATCH, n - first)
            answer = client.post("/api/v1/runs/batch", json={"runs": runs}, timeout=60).raise_for_status()
            assert answer.json()["accepted"] == len(runs), answer.text[:1000]


def ended() -> float | None:
    """Return the Unix time at which the last end was on disk; None while a run is open."""
    path = f"file:{os.environ['BENCH_STORE']}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True, timeout=10)) as store:
        last, unfinished = store.execute(
            "SELECT max(finished_at), sum(finished_at IS NULL) FROM run"
        ).fetchone()
    return None if unfinished else float(last)


def first() -> float:
    """Submit over HTTP, ask for the stream; return the Unix time of the first event."""
    run = get_client(URL, token=TOKEN).submit("proj.count", kwargs={"n": 1})["id"]
    return first_event(URL, f"/api/v1/runs/{run}/events", {"Authorization": f"Bearer {TOKEN}"})


def death(path: str, number: int, timeout: float) -> float | None:
    """Follow a run that dies until its stream ends."""
    client = get_client(URL, token=TOKEN)
    run = client.submit("proj.bench_die", kwargs={"path": path, "number": number})["id"]
    ends = (time.time() for event in client.follow(run) if event.type == "stream.end")
    return next(ends, None)
