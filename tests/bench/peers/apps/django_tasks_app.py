"""The database backend of django-tasks, on the project's SQLite file."""

from __future__ import annotations

import time

import django

from tests.project import stamps

try:
    from django.tasks import task  # since Django 6
except ImportError:
    from django_tasks import task

django.setup()


@task
def stamp(path: str) -> None:
    stamps.stamp(path)


@task
def die(path: str, number: int) -> None:
    stamps.die(path, number)


def one(path: str) -> None:
    stamp.enqueue(path)


def many(path: str, n: int) -> None:
    for _ in range(n):
        stamp.enqueue(path)


def death(path: str, number: int, timeout: float) -> float | None:
    result = die.enqueue(path, number)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        result.refresh()
        if result.is_finished:
            return time.time()
        time.sleep(0.01)
    return None
