"""The peers of the races of queues, each with two processes for work and otherwise as it comes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from tests.bench.peers import brokers
from tests.bench.peers.contestants import APPS, WARM_UP, Contestant, Maker, folder, process
from tests.bench.peers.environments import python_of
from tests.helpers import ROOT

#: Ours by the name that it has in every table.
OURS = "Bulkhead"

#: Processes that perform bodies.
WORKERS = 2

DJANGO = f"Django=={version('Django')}"
#: Django 6 brings the interface along; for older ones there is a backport.
BACKEND = "django-tasks-db" if version("Django") >= "6" else "django-tasks-db[compat]"

REQUIREMENTS: Mapping[str, Sequence[str]] = {
    "celery": ("celery[redis]==5.7.0", DJANGO),
    "rq": ("rq==3.0.0", DJANGO),
    "huey": ("huey==3.5.4", DJANGO),
    "dramatiq": ("dramatiq[redis]==2.2.1", DJANGO),
    "django_tasks": (f"{BACKEND}==0.13.0", DJANGO),
    "streaming": ("django-streaming-coordinator==0.2.1", DJANGO),
    "procrastinate": ("procrastinate==3.10.0", "psycopg[binary]==3.3.9", DJANGO),
}


@contextmanager
def _up(
    app: str, path: Path, workers: Sequence[Sequence[str | Path]], **environment: str
) -> Iterator[Contestant]:
    """Have the workers of a peer run, and its submitter."""
    python = python_of(app, REQUIREMENTS[app])
    settings = _settings(path) | environment
    with ExitStack() as stack:
        running = [
            stack.enter_context(process(command, settings, path / f"worker-{number}.log"))
            for number, command in enumerate(workers)
        ]
        pids = [one.pid for one in running]
        contestant = stack.enter_context(Contestant(python, f"{app}_app", settings, path, pids))
        contestant.starts(WARM_UP, 0.05)
        yield contestant


def _settings(path: Path) -> dict[str, str]:
    return {
        "DJANGO_SETTINGS_MODULE": f"{APPS}.settings",
        "BENCH_DATABASE": str(path / "project.sqlite3"),
        "PYTHONPATH": str(ROOT),
    }


def _migrate(python: Path, settings: Mapping[str, str]) -> None:
    command = [python, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0"]
    subprocess.run(command, check=True, timeout=60, cwd=ROOT, env=os.environ | settings)


@contextmanager
def celery() -> Iterator[Contestant]:
    """Celery, prefork, on Redis."""
    python = python_of("celery", REQUIREMENTS["celery"])
    worker = [python, "-m", "celery", "-A", f"{APPS}.celery_app", "worker", "-c", str(WORKERS)]
    with folder() as path, brokers.redis(path) as url, _up("celery", path, [worker], BENCH_REDIS=url) as up:
        yield up


@contextmanager
def rq() -> Iterator[Contestant]:
    """RQ on Redis: a fork per job."""
    worker = [python_of("rq", REQUIREMENTS["rq"]), "-m", f"{APPS}.rq_app"]
    with (
        folder() as path,
        brokers.redis(path) as url,
        _up("rq", path, [worker] * WORKERS, BENCH_REDIS=url) as up,
    ):
        yield up


@contextmanager
def huey() -> Iterator[Contestant]:
    """Huey on SQLite, its workers processes."""
    consumer = python_of("huey", REQUIREMENTS["huey"]).with_name("huey_consumer")
    worker = [consumer, f"{APPS}.huey_app.huey", "-w", str(WORKERS), "-k", "process"]
    with folder() as path, _up("huey", path, [worker], BENCH_HUEY=str(path / "huey.sqlite3")) as up:
        yield up


@contextmanager
def dramatiq() -> Iterator[Contestant]:
    """Dramatiq on Redis, with as many threads per process as it comes with."""
    program = python_of("dramatiq", REQUIREMENTS["dramatiq"]).with_name("dramatiq")
    worker = [program, f"{APPS}.dramatiq_app", "-p", str(WORKERS)]
    with folder() as path, brokers.redis(path) as url, _up("dramatiq", path, [worker], BENCH_REDIS=url) as up:
        yield up


@contextmanager
def django_tasks() -> Iterator[Contestant]:
    """The database backend of django-tasks, on SQLite."""
    python = python_of("django_tasks", REQUIREMENTS["django_tasks"])
    with folder() as path:
        _migrate(python, _settings(path) | {"BENCH_APPS": "django_tasks_db"})
        workers = [[python, "-m", "django", "db_worker"]] * WORKERS
        with _up("django_tasks", path, workers, BENCH_APPS="django_tasks_db") as up:
            yield up


@contextmanager
def procrastinate() -> Iterator[Contestant]:
    """Procrastinate on PostgreSQL."""
    python = python_of("procrastinate", REQUIREMENTS["procrastinate"])
    program = [python, "-m", "procrastinate", f"--app={APPS}.procrastinate_app.app"]
    with folder() as path, brokers.postgres() as address:
        environment = os.environ | _settings(path) | {"BENCH_POSTGRES": address}
        schema = [*program, "schema", "--apply"]
        subprocess.run(schema, check=True, timeout=60, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        with _up("procrastinate", path, [[*program, "worker"]] * WORKERS, BENCH_POSTGRES=address) as up:
            yield up


@contextmanager
def streaming_coordinator() -> Iterator[Contestant]:
    """django-streaming-coordinator on SQLite: it performs tasks in the process that streams them."""
    python = python_of("streaming", REQUIREMENTS["streaming"])
    with folder() as path:
        port = brokers.free_port()
        settings = _settings(path) | {
            "BENCH_APPS": f"streaming {APPS}.streams",
            "BENCH_URL": f"http://127.0.0.1:{port}",
        }
        _migrate(python, settings)
        server = [python, "-m", "django", "runserver_stream", "--port", str(port)]
        with process(server, settings, path / "server.log") as running:
            brokers.await_port(port)
            with Contestant(python, "streaming_app", settings, path, [running.pid]) as contestant:
                contestant.firsts(WARM_UP, 0.05)
                yield contestant


#: Those that the figures name, in the order of the table.
PEERS: Mapping[str, Maker] = {
    "RQ": rq,
    "Celery": celery,
    "Huey": huey,
    "django-tasks": django_tasks,
    "Procrastinate": procrastinate,
    "Dramatiq": dramatiq,
}
