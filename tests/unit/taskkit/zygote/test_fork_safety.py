"""What does not survive a fork is named, with the remedy; each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers import ROOT


def _freeze(tmp_path: Path, code: str, rest: str = "prepare.freeze(own)") -> str:
    """Run code as an import of the project would, then freeze; return "frozen" or the complaint."""
    program = f"""
import os, socket, select, threading, time
import django
django.setup()
from taskkit.zygote import prepare
own = set()
{textwrap.dedent(code)}
try:
    {rest}
    print("frozen")
except prepare.NotForkSafe as error:
    print(error)
os._exit(0) if os.sys.stdout.flush() is None else None
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": "tests.project.settings",
            "BULKHEAD_TEST_DB": str(tmp_path / "db.sqlite3"),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_project_that_only_imports_is_frozen(tmp_path: Path) -> None:
    assert _freeze(tmp_path, "") == "frozen"


def test_a_thread_at_import_is_named(tmp_path: Path) -> None:
    complaint = _freeze(
        tmp_path,
        "threading.Thread(target=time.sleep, args=(60,), daemon=True, name='metrics-flusher').start()",
    )
    assert "1 thread(s)" in complaint
    assert "metrics-flusher" in complaint
    assert 'start="spawn"' in complaint


def test_a_thread_that_python_does_not_know_is_named_by_the_kernels_name(tmp_path: Path) -> None:
    complaint = _freeze(
        tmp_path, "import _thread; _thread.start_new_thread(time.sleep, (60,)); time.sleep(0.1)"
    )
    assert "not a thread of Python's" in complaint


def test_a_thread_that_has_ended_is_no_matter(tmp_path: Path) -> None:
    assert _freeze(tmp_path, "t = threading.Thread(target=int); t.start(); t.join()") == "frozen"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("s = socket.socket()", "socket:"),
        ("a, b = socket.socketpair()", "socket:"),
        ("e = select.epoll()", "eventpoll"),
    ],
)
def test_a_descriptor_that_all_runners_would_share_is_named(tmp_path: Path, code: str, kind: str) -> None:
    complaint = _freeze(tmp_path, code)
    assert "left open: descriptor" in complaint
    assert kind in complaint
    assert "inside a task" in complaint


def test_descriptors_of_ours_are_no_complaint(tmp_path: Path) -> None:
    assert _freeze(tmp_path, "s = socket.socket(); own.add(s.fileno())") == "frozen"


def test_files_and_pipes_are_no_complaint(tmp_path: Path) -> None:
    assert _freeze(tmp_path, "p = os.pipe(); f = open(os.devnull)") == "frozen"


def test_database_connections_are_closed_first(tmp_path: Path) -> None:
    code = """
    from django.db import connection
    connection.cursor().execute("select 1")
    """
    assert _freeze(tmp_path, code, "prepare.freeze(own); assert connection.connection is None") == "frozen"


def test_what_is_frozen_is_not_collected_again(tmp_path: Path) -> None:
    rest = "prepare.freeze(own); import gc; assert gc.get_freeze_count() > 10_000"
    assert _freeze(tmp_path, "", rest) == "frozen"


def test_practising_leaves_nothing_that_a_fork_would_share(tmp_path: Path) -> None:
    rest = "before = signal.getsignal(signal.SIGIO); prepare.practise(); prepare.freeze(own); "
    assert (
        _freeze(tmp_path, "import signal", rest + "assert signal.getsignal(signal.SIGIO) == before")
        == "frozen"
    )


def test_migrations_that_are_missing_are_named_and_the_parent_opens_no_connection(tmp_path: Path) -> None:
    code = """
    from django.db import connection
    probe = prepare.probe_database(migrate=False)
    numbers = ("0001_initial", "0002_results", "0003_run_permissions", "0004_schedules")
    names = (*numbers, "0005_stored_requests", "0006_nodes_share")
    assert probe.unapplied == [f"taskkit.{name}" for name in names], probe
    assert connection.connection is None
    probe = prepare.probe_database(migrate=True)
    assert probe.unapplied == [] and probe.database_error == "", probe
    """
    assert _freeze(tmp_path, code) == "frozen"


def test_a_database_that_is_away_is_told_and_does_not_stop_the_start(tmp_path: Path) -> None:
    code = """
    from django.db import connections
    connections.settings["default"]["NAME"] = "/nonexistent/folder/db.sqlite3"
    probe = prepare.probe_database(migrate=False)
    assert "OperationalError" in probe.database_error, probe
    """
    assert _freeze(tmp_path, code) == "frozen"


def test_tasks_that_their_pool_cannot_perform_are_refused(tmp_path: Path) -> None:
    code = """
    from taskkit import registry
    from taskkit.errors import SettingsError
    from taskkit.settings import PoolSettings
    tasks = registry.load()
    prepare.check_pools(tasks)
    prepare.pools = lambda: {"default": PoolSettings(concurrency=2)}
    try:
        prepare.check_pools(tasks)
        raise SystemExit("a synchronous task in a shared pool")
    except SettingsError as error:
        assert "is synchronous" in str(error) and "concurrency = 1" in str(error), error
    prepare.pools = lambda: {}
    try:
        prepare.check_pools(tasks)
        raise SystemExit("a pool that does not exist")
    except SettingsError as error:
        assert "there is no pool 'default'" in str(error), error
    """
    assert _freeze(tmp_path, code) == "frozen"
