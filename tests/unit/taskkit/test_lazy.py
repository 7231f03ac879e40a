"""`import taskkit` is cheap, complete, and the same in every order."""

from __future__ import annotations

import subprocess
import sys

import pytest

import taskkit


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_nothing_heavy() -> None:
    loaded = run("import sys, taskkit; print(*sys.modules)").split()
    for name in ("django", "trio", "anyio", "asyncio", "msgspec", "httpx"):
        assert name not in loaded
    assert [it for it in loaded if it.startswith("taskkit")] == ["taskkit"]


def test_speaking_needs_no_django() -> None:
    assert (
        run("import sys; from taskkit import emit, progress, task; print('django' in sys.modules)")
        == "False\n"
    )


def test_every_public_name_is_there(django_project: object) -> None:
    for name in taskkit.__all__:
        assert getattr(taskkit, name) is not None
    assert set(taskkit.__all__) <= set(dir(taskkit))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        taskkit.nothing  # noqa: B018


def test_what_a_client_raises_is_at_hand_without_django() -> None:
    names = "RunError", "RunFailed", "RunCrashed", "RunTimedOut", "RunWasCancelled", "RunLost"
    assert set(names) <= set(taskkit.__all__)
    code = f"import sys; from taskkit import {', '.join(names)}; print('django' in sys.modules, RunLost.__base__)"
    assert run(code) == "False <class 'taskkit.errors.RunError'>\n"


METHODS = ("start_task", "get_task_instance", "is_task_running")
CHECK = f"""
import taskkit
for thing in (taskkit.coordinator, first, second):
    assert all(callable(getattr(thing, name)) for name in {METHODS!r}), thing
import taskkit.coordinator as module
assert module.coordinator is module.coordinator
from taskkit.coordinator import coordinator as inner
from taskkit import coordinator as outer
assert all(getattr(outer, name) == getattr(inner, name) for name in {METHODS!r})
"""


@pytest.mark.parametrize(
    "order",
    [
        "from taskkit import coordinator as first\nfrom taskkit.coordinator import coordinator as second",
        "from taskkit.coordinator import coordinator as first\nfrom taskkit import coordinator as second",
        "import taskkit.coordinator\nfirst = taskkit.coordinator\nfrom taskkit import coordinator as second",
    ],
)
def test_the_coordinator_works_in_either_import_order(order: str) -> None:
    run(order + CHECK)
