"""Huey on SQLite."""

from __future__ import annotations

import os
import time

import django
from huey import SqliteHuey
from huey.exceptions import ResultTimeout, TaskException

from tests.project import stamps

django.setup()
huey = SqliteHuey("bench", filename=os.environ["BENCH_HUEY"])
stamp = huey.task(name="stamp")(stamps.stamp)
die = huey.task(name="die")(stamps.die)


def one(path: str) -> None:
    stamp(path)


def many(path: str, n: int) -> None:
    for _ in range(n):
        stamp(path)


def death(path: str, number: int, timeout: float) -> float | None:
    try:
        die(path, number).get(blocking=True, timeout=timeout)
    except ResultTimeout:
        return None
    except TaskException:
        pass
    return time.time()
