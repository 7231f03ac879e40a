"""Ours, as a project's own process submits it: rows of the outbox, or the batch endpoint."""

from __future__ import annotations

import os
import time

import django
import httpx

from tests.bench.peers.apps import driver

django.setup()

from taskkit import get_client, submit  # noqa: E402  (Django first)

URL, TOKEN = os.environ["BENCH_URL"], os.environ["BENCH_TOKEN"]
BATCH = 1_000


def one(path: str) -> None:
    """Submit as the README does from Django: a row in the outbox, in a transaction of its own."""
    submit("proj.bench_stamp", kwargs={"path": path})


def many(path: str, n: int) -> None:
    """Submit by the batch endpoint, which is there for many."""
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:
        for first in range(0, n, BATCH):
            runs = [{"task": "proj.bench_stamp", "kwargs": {"path": path}}] * min(BATCH, n - first)
            answer = client.post("/api/v1/runs/batch", json={"runs": runs}, timeout=60).raise_for_status()
            assert answer.json()["accepted"] == len(runs), answer.text[:1000]


def death(path: str, number: int, timeout: float) -> float | None:
    """Follow a run that dies until its stream ends."""
    client = get_client(URL, token=TOKEN)
    run = client.submit("proj.bench_die", kwargs={"path": path, "number": number})["id"]
    ends = (time.time() for event in client.follow(run) if event.type == "stream.end")
    return next(ends, None)


if __name__ == "__main__":
    driver.serve(one, many, death)
