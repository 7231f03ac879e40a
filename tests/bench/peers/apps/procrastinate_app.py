"""Procrastinate on PostgreSQL."""

from __future__ import annotations

import os
import time

import django
from procrastinate import App, PsycopgConnector
from procrastinate.jobs import Status

from tests.project import stamps

django.setup()
app = App(connector=PsycopgConnector(conninfo=os.environ["BENCH_POSTGRES"]))
stamp = app.task(name="stamp")(stamps.stamp)
die = app.task(name="die")(stamps.die)
BATCH = 1_000


def one(path: str) -> None:
    app.open()  # once: what is open stays so
    stamp.defer(path=path)


def many(path: str, n: int) -> None:
    for first in range(0, n, BATCH):
        stamp.batch_defer(*[{"path": path}] * min(BATCH, n - first))


def death(path: str, number: int, timeout: float) -> float | None:
    job = die.defer(path=path, number=number)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if app.job_manager.get_job_status(job) not in (Status.TODO, Status.DOING):
            return time.time()
        time.sleep(0.01)
    return None
