"""A project of two databases whose router keeps our tables in the second one, from its first migration on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from tests.helpers import ROOT

SETTINGS = """
from tests.project.settings import *
DATABASES = {
    alias: {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE / f"{alias}.sqlite3"}
    for alias in ("default", "tasks")
}
class Router:
    def db_for_read(self, model, **hints):
        return "tasks" if model._meta.app_label == "taskkit" else None
    db_for_write = db_for_read
    def allow_migrate(self, db, app_label, **hints):
        return (db == "tasks") == (app_label == "taskkit")
DATABASE_ROUTERS = [Router()]
"""

SCRIPT = """
import django
django.setup()
from django.core.checks import run_checks
from django.core.management import call_command
from taskkit import submit
from taskkit.backend import BulkheadBackend
from taskkit.models import Run
from taskkit.outbox import poke
from taskkit.testing import perform_submitted, wait_for_run
from taskkit.zygote import prepare

call_command("migrate", verbosity=0, run_syncdb=True)
lacking = prepare.probe_database(migrate=False)
assert lacking.unapplied[0] == "taskkit.0001_initial (--database tasks)", lacking
assert not lacking.pending, lacking
call_command("migrate", database="tasks", verbosity=0)
ready = prepare.probe_database(migrate=False)
assert (ready.unapplied, ready.pending, ready.database_error) == ([], [], ""), ready

(warning,) = run_checks(tags=["taskkit"])
assert warning.id == "taskkit.W005" and "'tasks'" in warning.msg and "on_commit" in warning.hint, warning

run = submit("proj.add", kwargs={"a": 1, "b": 2})
assert run.using == "tasks" and Run.objects.using("tasks").count() == 1
assert [done.result for done in perform_submitted()] == [3]
for one in (run, run.id, run.run()):
    assert wait_for_run(one, 0).result == 3
call_command("create_task", "row", "message=x", verbosity=0)
assert Run.objects.get(task="proj.Row").status == "READY"
assert BulkheadBackend("default", {}).using == "tasks"
call_command("cleanup_old_tasks", "--hours", "0", "--runs", "0")
assert Run.objects.count() == 1
print("fine")
"""


def test_everything_finds_the_database_that_submissions_go_to(tmp_path: Path) -> None:
    (tmp_path / "two_databases.py").write_text(
        SETTINGS.replace("BASE /", f"BASE_DIR.__class__({str(tmp_path)!r}) /")
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=os.environ
        | {"DJANGO_SETTINGS_MODULE": "two_databases", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fine"
