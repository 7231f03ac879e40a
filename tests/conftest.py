"""Fixtures of all tests, plus the rule that a skipped test is a failed one."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import trio

from tests import helpers

#: Real time is generous on purpose: it decides how long a broken test hangs, not how fast a sound one is.
#: Two shared cores were seen to stretch a 1 s test to 4 s.
SLOWNESS = float(os.environ.get("BULKHEAD_TEST_SLOWNESS", "1"))

hypothesis.settings.register_profile(
    "bulkhead",
    deadline=None,  # a shared machine makes any single example slow now and then
    database=None,  # what failed is printed as a blob; a hidden folder would make runs differ
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("bulkhead")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped":
        return
    reason = getattr(report, "wasxfail", None) or report.longrepr
    with contextlib.suppress(AttributeError):
        del report.wasxfail
    report.outcome = "failed"
    report.longrepr = f"a test that does not run proves nothing; this one was skipped: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a skipped or expectedly failing test as failed."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Report a module that skips itself as failed."""
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture
def deadline() -> Callable[[float], contextlib.AbstractContextManager[trio.CancelScope]]:
    """Give `deadline(seconds)`: trio.fail_after, stretched by BULKHEAD_TEST_SLOWNESS."""
    return lambda seconds: trio.fail_after(seconds * SLOWNESS)


@pytest.fixture
def seed() -> int:
    """Give the seed of a random test: BULKHEAD_SEED or a new one. Pytest shows it when the test fails."""
    value = int(os.environ.get("BULKHEAD_SEED") or random.SystemRandom().randrange(2**32))
    print(f"BULKHEAD_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Give a random generator made from `seed`."""
    return random.Random(seed)


@pytest.fixture
def tmp_state_dir() -> Iterator[Path]:
    """Give an empty state directory with a short path: a Unix socket's address has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix=helpers.FOLDER_PREFIX, dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class DjangoProject:
    """The tests' Django project, set up in this process: `database` is a fresh, migrated SQLite file."""

    database: Path


@pytest.fixture(scope="session")
def _migrated_database() -> Iterator[Path]:
    """Set Django up, once; give a migrated file to copy."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-db-") as folder:
        template = Path(folder) / "template.sqlite3"
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.project.settings"
        os.environ.setdefault("BULKHEAD_TEST_DB", str(template))
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        connections.settings["default"]["NAME"] = str(template)
        call_command("migrate", run_syncdb=True, verbosity=0)
        connections.close_all()
        yield template


@pytest.fixture
def django_project(_migrated_database: Path, tmp_path: Path) -> Iterator[DjangoProject]:
    """Give Django with an empty database of its own.

    A file rather than a rolled-back transaction: courier tests look at it from other threads and processes.
    All connections of this process, also of threads that start later, use it.
    """
    from django.db import connections

    database = tmp_path / "project.sqlite3"
    shutil.copyfile(_migrated_database, database)
    connections.close_all()
    # One dict per alias, shared by the connections of all threads.
    connections.settings["default"]["NAME"] = str(database)
    connections["default"].settings_dict["NAME"] = str(database)
    try:
        yield DjangoProject(database)
    finally:
        connections.close_all()


@pytest.fixture(scope="session", autouse=True)
def _no_stray_processes() -> Iterator[None]:
    """Fail the run when a process of ours outlives it."""
    yield
    left = helpers.wait_until_gone(helpers.descendants(), timeout=3.0)
    helpers.reap_children()
    if left:
        pytest.fail("processes are left: " + "; ".join(helpers.describe(process) for process in left))
