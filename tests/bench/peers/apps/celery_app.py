"""Celery as its guide for Django has it, with a backend for results, as everybody else here keeps them."""

from __future__ import annotations

import os
import time

from celery import Celery
from celery.exceptions import WorkerLostError

from tests.project import stamps

app = Celery("bench", broker=os.environ["BENCH_REDIS"], backend=os.environ["BENCH_REDIS"])
app.config_from_object("django.conf:settings", namespace="CELERY")

stamp = app.task(name="stamp")(stamps.stamp)
die = app.task(name="die")(stamps.die)


def one(path: str) -> None:
    stamp.delay(path)


def many(path: str, n: int) -> None:
    for _ in range(n):
        stamp.delay(path)


def death(path: str, number: int, timeout: float) -> float | None:
    try:
        die.delay(path, number).get(timeout=timeout)
    except WorkerLostError:
        return time.time()
    return None
