"""Ends of attempts as Django's own Tasks interface names them."""

from __future__ import annotations

from typing import Any

import pytest

from taskkit.errors import TaskTimeout

pytestmark = pytest.mark.usefixtures("django_project")


def error_of(error: dict[str, Any]) -> Any:
    from taskkit import results

    return results.error_of(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"code": "timed_out", "cause": {"kind": "timeout"}}, "TaskTimeout"),
        ({"code": "timed_out", "cause": {"kind": "soft_timeout"}}, "SoftTimeout"),
        ({"code": "timed_out", "cause": {"kind": "cpu_timeout"}}, "CpuTimeout"),
        ({"code": "timed_out", "cause": {"kind": "stall_timeout"}}, "StallTimeout"),
        ({"code": "expired"}, "ScheduleTimeout"),
    ],
)
def test_each_limit_has_a_class_that_can_be_imported_and_is_a_timeout(
    error: dict[str, Any], expected: str
) -> None:
    found = error_of({**error, "message": "too long"})
    assert found.exception_class_path == f"taskkit.errors.{expected}"
    assert issubclass(found.exception_class, TaskTimeout)


def test_a_soft_timeout_stands_above_what_was_made_of_it() -> None:
    error = {"code": "timed_out", "exception": "builtins.ValueError", "cause": {"kind": "soft_timeout"}}
    assert error_of(error).exception_class_path == "taskkit.errors.SoftTimeout"


def test_memory_and_cancellations_keep_theirs() -> None:
    oom = {"code": "crashed", "cause": {"kind": "oom"}}
    assert error_of(oom).exception_class_path == "taskkit.errors.RunnerOutOfMemory"
    cancelled = {"code": "cancelled", "cause": {"kind": "cancelled"}}
    assert error_of(cancelled).exception_class_path == "taskkit.errors.TaskCancelled"
