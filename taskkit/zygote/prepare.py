"""Django with every task, imported, proven to survive a fork."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any, Final

from taskkit import linux
from taskkit.errors import SettingsError
from taskkit.settings import PoolSettings, load_settings
from taskkit.wire.messages import RunnerSpec, TaskInfo, ZygoteReady

#: Seconds for the probe child, which asks the database for its migrations (and makes the demo's database).
_PROBE_SECONDS: Final = 30.0

#: Seconds for threads that are ending to end.
_THREAD_SECONDS: Final = 0.5

#: What every runner needs and should share with its siblings instead of importing it once more: 0.3 s and 9 MB each.
_PRELOADED: Final = (
    "anyio._backends._asyncio",
    "taskkit.runner.main",
    "taskkit.courier.loop",
    "taskkit.intake",
    "taskkit.zygote.roles",
    "django.db.models.sql.compiler",
)

#: Likewise for who performs a task on trio: 4 MiB, shared or not, that other projects do without.
_FOR_TRIO: Final = "anyio._backends._trio"


class NotForkSafe(Exception):
    """Something that the project imported does not survive a fork; the message names it and the remedy."""


@dataclass(slots=True)
class Probe:
    """What the probe child found in the database."""

    unapplied: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    database_error: str = ""


def load_project(settings_module: str, path: list[str]) -> dict[str, Any]:
    """Import the project as manage.py would; return its tasks by name.

    Raises:
      SettingsError: there is no such settings module, `taskkit` is not among its apps, or TOKEN_CLAIMS is wrong.
      BaseException: whatever the project's import raises.
    """
    sys.path[:0] = path
    os.environ["DJANGO_SETTINGS_MODULE"] = settings_module
    _import_settings(settings_module)
    import django

    _check_installed(settings_module)
    django.setup()
    from taskkit import registry

    _check_site()
    tasks = registry.known()  # cached: the runners forked from here submit without loading once more
    for name in _PRELOADED:
        importlib.import_module(name)
    if any(task.interface is not None for task in tasks.values()):
        importlib.import_module("taskkit.runner.performance")
    if "trio" in {*(task.loop for task in tasks.values()), *(pool.loop for pool in pools().values())}:
        importlib.import_module(_FOR_TRIO)
    return tasks


def _import_settings(module: str) -> None:
    """Import the settings module by itself: that it is missing differs from what it fails to import."""
    parts = module.split(".")
    try:
        if "" in parts:  # import_module would take a leading dot for a relative import, and say so
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in [".".join(parts[: count + 1]) for count in range(len(parts))]:
            raise
        raise SettingsError(
            f"cannot import settings module {module}: {error}; "
            "start in the folder of manage.py, or check --settings"
        ) from error


def _check_installed(module: str) -> None:
    """Refuse a project without our app, before a model of ours is imported: Django would blame the model."""
    from django.apps import AppConfig
    from django.conf import settings

    entries: Iterable[str] = settings.INSTALLED_APPS
    if any(entry.split(".")[0] == "taskkit" for entry in entries):
        return
    # The project may have a configuration of its own for our app; telling takes the import of each app's own.
    if not any(AppConfig.create(entry).name == "taskkit" for entry in entries):
        raise SettingsError(
            f'"taskkit" is missing from INSTALLED_APPS of {module}; add it, then run `manage.py migrate`'
        )


def _check_site() -> None:
    """Refuse what the site could not call; the tree does not need it, but a site would find out late."""
    from taskkit.checks import of_site
    from taskkit.conf import read_settings

    for found in of_site(read_settings()):
        raise SettingsError(f"{found.msg}. {found.hint}")


def complaint_of(error: BaseException) -> str:
    """Return the traceback of a failed import from the project's first frame on.

    What called the project (this package, importlib, Django) is the same for every project and hides the two lines
    that matter. Empty if nothing else is in it: then the error's own text says everything, save
    for a SyntaxError, which has file and line apart from it.
    """
    shown = traceback.TracebackException.from_exception(error)
    own_fault = bool(shown.stack) and _is_ours(shown.stack[-1].filename)
    if own_fault and not isinstance(error, _improperly_configured()):
        return "".join(shown.format())
    link: traceback.TracebackException | None = shown
    while link is not None:
        link.stack = _from_project_on(link.stack)
        link = link.__cause__ or link.__context__
    if not shown.stack:
        return "".join(shown.format_exception_only()) if isinstance(error, SyntaxError) else ""
    return "".join(shown.format())


def _improperly_configured() -> tuple[type[BaseException], ...]:
    module = sys.modules.get("django.core.exceptions")
    return () if module is None else (module.ImproperlyConfigured,)


def _from_project_on(stack: list[traceback.FrameSummary]) -> traceback.StackSummary:
    kept: list[traceback.FrameSummary] = list(dropwhile(_is_machinery, stack))
    return traceback.StackSummary.from_list(kept)


def _is_ours(filename: str) -> bool:
    own = Path(__file__).parent
    return filename.startswith(f"{own}{os.sep}") or filename == str(own.parent / "registry.py")


def _is_machinery(frame: traceback.FrameSummary) -> bool:
    filename = frame.filename
    homes = [Path(importlib.__file__).parent]
    if (django := sys.modules.get("django")) is not None and django.__file__:
        homes.append(Path(django.__file__).parent)
    imported = filename.startswith(("<frozen importlib", *(f"{home}{os.sep}" for home in homes)))
    return imported or _is_ours(filename)


def describe(settings_module: str, tasks: dict[str, Any], probe: Probe) -> ZygoteReady:
    """Return the zygote's first message."""
    import django
    from django.conf import settings

    from taskkit import __version__
    from taskkit.conf import read_settings

    catalogue: list[TaskInfo] = [definition.info for definition in tasks.values()]
    return ZygoteReady(
        settings=read_settings(),
        settings_module=settings_module,
        catalogue=catalogue,
        allowed_hosts=list(settings.ALLOWED_HOSTS),
        debug=bool(settings.DEBUG),
        versions={
            "bulkhead": __version__,
            "django": django.get_version(),
            "python": platform.python_version(),
        },
        unapplied=probe.unapplied,
        pending=probe.pending,
        database_error=probe.database_error,
    )


def probe_database(*, migrate: bool) -> Probe:
    """Ask the database, in a forked child that goes away with its connections, what migrations it lacks.

    With `migrate` the child applies them first: for the demo, whose database is its own.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _probe_child(write, migrate)
    os.close(write)
    data = _read_until_end(read)
    os.close(read)
    if not data:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    os.waitpid(pid, 0)
    if not data:
        return Probe(database_error=f"the database did not answer within {_PROBE_SECONDS:.0f} s")
    found = json.loads(data)
    return Probe(found["unapplied"], found["pending"], found["error"])


def _read_until_end(fd: int) -> bytes:
    parts = []
    while select.select([fd], [], [], _PROBE_SECONDS)[0] and (part := os.read(fd, 65536)):
        parts.append(part)
    return b"".join(parts)


def _probe_child(write: int, migrate: bool) -> None:
    try:
        try:
            ours, others = _unapplied(migrate)
            found = {"unapplied": ours, "pending": others, "error": ""}
        except Exception as error:
            detail = "" if type(error).__module__.startswith("django.db") else traceback.format_exc()
            found = {
                "unapplied": [],
                "pending": [],
                "error": f"{type(error).__name__}: {error}\n{detail}".strip(),
            }
        os.write(write, json.dumps(found).encode())
    finally:
        os._exit(0)


def _unapplied(migrate: bool) -> tuple[list[str], list[str]]:
    """Return the migrations that are lacking: ours where submissions go, the project's in its default database."""
    from django.core.management import call_command
    from django.db import DEFAULT_DB_ALIAS

    from taskkit.outbox import alias_of

    if migrate:
        call_command("migrate", verbosity=0, interactive=False)
    home = alias_of(None)
    lacking = _lacking(DEFAULT_DB_ALIAS)
    ours = [name for name in (lacking if home == DEFAULT_DB_ALIAS else _lacking(home)) if _is_own(name)]
    hint = "" if home == DEFAULT_DB_ALIAS else f" (--database {home})"
    return [f"{name}{hint}" for name in ours], [name for name in lacking if not _is_own(name)]


def _lacking(alias: str) -> list[str]:
    from django.db import connections
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connections[alias])
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    return [f"{one.app_label}.{one.name}" for one, backwards in plan if not backwards]


def _is_own(migration: str) -> bool:
    return migration.startswith("taskkit.")


def pools() -> dict[str, PoolSettings]:
    """Return the project's pools; flags can change how many runners they have, not what is asked here."""
    from taskkit.conf import read_settings

    return load_settings(read_settings()).all_pools


def any_pool_forks() -> bool:
    """Whether some pool's runners, or intake and courier, are to be forked from this process."""
    return any(pool.start == "fork" for pool in pools().values())


def check_pools(tasks: dict[str, Any]) -> None:
    """Refuse tasks that their pool cannot perform.

    Raises:
      SettingsError: a pool does not exist, or performs several runs in one process and the task would block them.
    """
    known = pools()
    for name, definition in tasks.items():
        pool = known.get(definition.info.pool)
        if pool is None:
            raise SettingsError(
                f"task {name}: there is no pool {definition.info.pool!r}; name it in TASKKIT['POOLS'] "
                f"(there are {', '.join(sorted(known))})"
            )
        if pool.concurrency > 1 and not definition.is_async:
            raise SettingsError(
                f"task {name} is synchronous, but POOLS.{definition.info.pool}.concurrency = {pool.concurrency} "
                "performs several runs in one process, and it would block the others: make it `async def`, or give "
                "it a pool with concurrency = 1"
            )


def practise() -> None:
    """Go a runner's way once, before the fork: what that makes on its way (decoders, caches) is made once for all.

    A runner that comes up takes 2.8 ms less, and 140 pages less of its own.
    """
    from taskkit.runner.orders import Orders
    from taskkit.runner.rehearsal import rehearse

    handler = signal.getsignal(signal.SIGIO)
    near, far = linux.seqpacket_pair()
    with near, far:
        rehearse(RunnerSpec(id=""), Orders(far, lambda token: None))
    if handler is not None:  # None: it is not Python's to set again
        signal.signal(signal.SIGIO, handler)


def check_schedules(tasks: dict[str, Any]) -> None:
    """Refuse schedules in the code that could never make a run.

    Raises:
      SettingsError: one is on no task, its arguments do not fit, or two have one name.
    """
    from taskkit.schedules import declared

    _, complaints = declared(tasks)
    if complaints:
        raise SettingsError("; ".join(complaints))


def freeze(own: set[int]) -> None:
    """Make this process ready to be forked many times. `own` are descriptors of ours.

    Raises:
      NotForkSafe: a thread, a socket or an epoll instance is left, which a child would share or lack.
    """
    from django.db import connections

    connections.close_all()
    threads = _lasting_threads()
    if threads:
        raise NotForkSafe(
            f"importing the project left {len(threads)} thread(s) running: {', '.join(threads)}. A forked runner "
            "would not have them, and a lock one of them holds would stay locked for ever. Start threads inside a "
            'task instead of at import, or give every pool start="spawn" (TASKKIT["POOLS"])'
        )
    foreign = _foreign_descriptors(own)
    if foreign:
        raise NotForkSafe(
            f"importing the project left open: {', '.join(foreign)}. All runners would share it. Open it inside a "
            'task instead of at import, or give every pool start="spawn" (TASKKIT["POOLS"])'
        )
    gc.collect()
    gc.freeze()


def _lasting_threads() -> list[str]:
    """Return the other threads that are still there after a moment: one that was joined may not have left yet."""
    deadline = time.monotonic() + _THREAD_SECONDS
    while (threads := _other_threads()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return threads


def _other_threads() -> list[str]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = []
    for task in Path("/proc/self/task").iterdir():
        number = int(task.name)
        if number == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has just ended
            found.append(
                names.get(number) or f"{(task / 'comm').read_text().strip()} (not a thread of Python's)"
            )
    return found


def _foreign_descriptors(own: set[int]) -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            shared = target.startswith("socket:") or "eventpoll" in target or "io_uring" in target
            if shared and int(entry.name) > 2 and int(entry.name) not in own:
                found.append(f"descriptor {entry.name} ({target})")
    return found
