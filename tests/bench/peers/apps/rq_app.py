"""RQ. Its worker imports the project before it works, as RQ's notes on performance advise: each job is a fork of it."""

from __future__ import annotations

import os
import time

import django
from redis import Redis
from rq import Queue, Worker

from tests.project import stamps

django.setup()
queue = Queue(connection=Redis.from_url(os.environ["BENCH_REDIS"]))


def one(path: str) -> None:
    queue.enqueue(stamps.stamp, path)


def many(path: str, n: int) -> None:
    queue.enqueue_many([Queue.prepare_data(stamps.stamp, (path,)) for _ in range(n)])


def death(path: str, number: int, timeout: float) -> float | None:
    job = queue.enqueue(stamps.die, path, number)
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0:
        if job.latest_result(timeout=max(1, int(left))) is not None:  # it blocks, and 0 would not
            return time.time()
    return None


if __name__ == "__main__":
    Worker([queue], connection=queue.connection).work()
