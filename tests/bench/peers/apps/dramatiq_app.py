"""Dramatiq on Redis, with a backend for results."""

from __future__ import annotations

import os
import time

import django
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import ResultFailure, ResultMissing, Results
from dramatiq.results.backends import RedisBackend

from tests.project import stamps

django.setup()
broker = RedisBroker(url=os.environ["BENCH_REDIS"])
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BENCH_REDIS"]), store_results=True))
dramatiq.set_broker(broker)
stamp = dramatiq.actor(actor_name="stamp")(stamps.stamp)
die = dramatiq.actor(actor_name="die")(stamps.die)


def one(path: str) -> None:
    stamp.send(path)


def many(path: str, n: int) -> None:
    for _ in range(n):
        stamp.send(path)


def death(path: str, number: int, timeout: float) -> float | None:
    message = die.send(path, number)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            message.get_result()
        except ResultMissing:
            time.sleep(0.01)
            continue
        except ResultFailure:
            pass
        return time.time()
    return None
