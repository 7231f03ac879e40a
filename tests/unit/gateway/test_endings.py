"""How ends are named: by cause of death, as error of the run, as last event."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.endings import ending_of, error_of, last_event, quarantine_of, rfc3339, with_limit
from gateway.store.rows import RunRow
from taskkit.lifecycle import Ending, RunStatus
from taskkit.wire.messages import Cause, TaskFailure


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("signal", Ending.CRASHED),
        ("exit", Ending.CRASHED),
        ("no_result", Ending.CRASHED),
        ("oom", Ending.CRASHED),
        ("oom_suspected", Ending.CRASHED),
        ("cpu_limit", Ending.CRASHED),
        ("corrupt", Ending.CRASHED),
        ("descriptors", Ending.CRASHED),
        ("a kind of some later version", Ending.CRASHED),
        ("timeout", Ending.TIMED_OUT),
        ("cancelled", Ending.CANCELLED),
        ("operator", Ending.LOST),
        ("stopped", Ending.LOST),
        ("boot", Ending.LOST),
        ("lost", Ending.LOST),
        ("abandoned", Ending.LOST),
    ],
)
def test_every_cause_of_death_ends_an_attempt_in_its_way(kind: str, ending: Ending) -> None:
    assert ending_of(Cause(kind=kind)) is ending


def test_an_error_has_the_words_of_the_exception() -> None:
    failure = TaskFailure(exception="builtins.ValueError", message="no", traceback="Traceback …")
    assert error_of(Ending.RAISED, None, failure) == {
        "code": "raised",
        "message": "no",
        "exception": "builtins.ValueError",
        "traceback": "Traceback …",
    }


def test_an_exception_without_words_is_named_by_its_class() -> None:
    error = error_of(Ending.RAISED, None, TaskFailure(exception="builtins.ValueError"))
    assert error["message"] == "builtins.ValueError"


@pytest.mark.parametrize(
    ("exception", "limit", "message"),
    [
        (
            "builtins.MemoryError",
            4096,
            "no; the limit is 4096 bytes of address space (memory_limit, RLIMIT_AS)",
        ),
        ("numpy._core._exceptions._ArrayMemoryError", 4096, "no; the limit is 4096 bytes"),
        ("builtins.MemoryError", None, "no"),
        ("builtins.ValueError", 4096, "no"),
    ],
)
def test_want_of_memory_tells_the_limit(exception: str, limit: int | None, message: str) -> None:
    failure = with_limit(TaskFailure(exception=exception, message="no"), limit)
    assert failure is not None
    assert failure.message.startswith(message)
    assert with_limit(None, limit) is None


def test_a_quarantine_says_what_to_do_and_keeps_the_cause() -> None:
    run = RunRow(no=1, id="run-1", task="t", crashes=3)
    error = quarantine_of(error_of(Ending.CRASHED, Cause(kind="signal", detail="it died"), None), run)
    assert (error["code"], error["crashes"], error["cause"]["kind"]) == ("quarantined", 3, "signal")
    assert "it has killed 3 runners, the last time: it died" in error["message"]
    assert "`bulkhead release run-1`" in error["message"]


def test_an_error_tells_the_cause_of_death() -> None:
    error = error_of(Ending.CRASHED, Cause(kind="signal", signal="SIGSEGV", detail="killed by SIGSEGV"), None)
    assert error["message"] == "killed by SIGSEGV"
    assert error["cause"] == {"kind": "signal", "signal": "SIGSEGV", "detail": "killed by SIGSEGV"}


@pytest.mark.parametrize("ending", [ending for ending in Ending if ending is not Ending.RETURNED])
def test_an_error_is_never_without_a_message(ending: Ending) -> None:
    error = error_of(ending, None, None)
    assert error["code"] == ending.value
    assert error["message"]
    json.loads(msgspec.json.encode(error))


def _last(run: RunRow, error: dict[str, Any] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(msgspec.json.encode(last_event(run, error)))
    return found


def test_the_last_event_has_a_small_result_and_never_a_large_one() -> None:
    run = RunRow(no=1, id="r", task="t", status=RunStatus.SUCCESSFUL, result=b'{"a":[1,2]}')
    assert _last(run) == {"status": "SUCCESSFUL", "result": {"a": [1, 2]}}
    run.result = b'"' + b"x" * (64 * 1024 - 2) + b'"'
    assert "result" in _last(run)
    run.result = b'"' + b"x" * (64 * 1024 - 1) + b'"'
    assert _last(run) == {"status": "SUCCESSFUL"}


def test_the_last_event_of_a_failure_has_the_error_and_no_result() -> None:
    run = RunRow(no=1, id="r", task="t", status=RunStatus.FAILED, result=b"1")
    assert _last(run, {"code": "raised", "message": "no"}) == {
        "status": "FAILED",
        "error": {"code": "raised", "message": "no"},
    }


def test_times_are_rfc3339_in_utc() -> None:
    assert rfc3339(0.0) == "1970-01-01T00:00:00Z"
    assert rfc3339(1767323045.25) == "2026-01-02T03:04:05.250000Z"
