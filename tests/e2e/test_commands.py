"""Commands of `manage.py` with a real tree: one becomes it, one watches a run to its end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT, Tree


class ManagedTree(Tree):
    """One that `manage.py` has become."""

    command_words = ("run_supervisor", "--bind", "127.0.0.1:0")

    def command(self) -> list[str]:
        """Return the command line."""
        words = [*self.command_words, "--state-dir", str(self.state_dir), "--runners", str(self.runners)]
        return [sys.executable, "-m", "tests.e2e.managed", *words]


class ServedTree(ManagedTree):
    command_words = ("runserver_stream", "--port", "0")


def manage(tree: Tree, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the site's."""
    return subprocess.run(
        [sys.executable, "-m", "django", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=tree.environment()
        | {
            "DJANGO_SETTINGS_MODULE": "tests.project.settings",
            "TASKKIT_STATE_DIR": str(tree.state_dir),
            "TASKKIT_URL": tree.url,
        },
    )


@pytest.fixture(scope="module", params=[ManagedTree, ServedTree], ids=["run_supervisor", "runserver_stream"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """Give a tree that a command has become."""
    with request.param() as tree:
        yield tree


def test_a_row_made_by_a_command_is_watched_to_its_end(tree: Tree) -> None:
    made = manage(tree, "create_task", "--type", "Row", "--message", "hello", "steps=2")
    assert made.returncode == 0, made.stderr
    watched = manage(tree, *made.stdout.strip().partition("manage.py ")[2].split())
    assert watched.returncode == 0, watched.stderr
    lines = watched.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["run.started", "progress", "progress", "stream.end"]
    assert '"result": "hello"' in lines[-1]
    again = manage(tree, *made.stdout.strip().partition("manage.py ")[2].split())
    assert (again.returncode, again.stdout) == (0, watched.stdout), "what has ended is shown once more"


def test_a_run_that_fails_is_exit_code_1(tree: Tree) -> None:
    run = tree.submit("proj.boom", message="no luck")["id"]
    end = time.monotonic() + 10
    while (watched := manage(tree, "watch_task", run)).returncode and "there is no run" in watched.stderr:
        assert time.monotonic() < end
    assert (watched.returncode, watched.stderr) == (1, "")
    assert "no luck" in watched.stdout.splitlines()[-1]
