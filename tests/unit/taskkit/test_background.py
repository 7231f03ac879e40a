"""What became of a request, in the words of the seed."""

from __future__ import annotations

import time

import pytest

from taskkit.background import channel_claims, full, is_channel, outcome
from taskkit.lifecycle import RunStatus

ANSWER = {"status": 201, "headers": [["A", "b"]], "endpoint": "/x/", "response": {"a": 1}}


@pytest.mark.parametrize("status", [RunStatus.READY, RunStatus.RUNNING])
def test_before_the_end_it_is_not_ready(status: RunStatus) -> None:
    assert outcome("i", status, None, None) == {"status": "not ready"}
    assert full(status, "7", outcome("i", status, None, None))["response"] is None


def test_a_view_s_answer_is_told_as_it_was() -> None:
    assert outcome("i", RunStatus.SUCCESSFUL, ANSWER, None, "/y/") == {"task_id": "i", **ANSWER}
    more = outcome("i", RunStatus.SUCCESSFUL, {**ANSWER, "encoding": "base64", "truncated": True}, None)
    assert (more["encoding"], more["truncated"]) == ("base64", True)


@pytest.mark.parametrize("result", [None, 3, {"endpoint": "/x/"}, [1]])
def test_what_another_task_returns_is_its_response(result: object) -> None:
    found = outcome("i", RunStatus.SUCCESSFUL, result, None)
    assert found == {"task_id": "i", "status": 200, "endpoint": "", "headers": [], "response": result}


@pytest.mark.parametrize("error", [None, {}, {"message": "gone"}])
@pytest.mark.parametrize("status", [RunStatus.FAILED, RunStatus.CANCELLED])
def test_a_run_that_failed_is_500(status: RunStatus, error: dict[str, str] | None) -> None:
    found = outcome("i", status, ANSWER, error, "/y/")
    said = (error or {}).get("message", "failed")
    assert found == {
        "task_id": "i",
        "status": 500,
        "endpoint": "/y/",
        "headers": [],
        "response": {"error": said},
    }
    assert full(status, "7", found) == {"status": "failed", "channel_name": "7", "response": found}


def test_a_channel_s_name_reaches_what_was_submitted_on_it() -> None:
    claims = channel_claims("0123456789abcdef")
    assert claims.expires_at > time.time()
    assert claims.sees_run("any", "t.f", "anon:0123456789abcdef")
    assert not claims.sees_run("any", "t.f", "0123456789abcdef")
    assert not claims.sees_run("any", "t.f", "")
    assert claims.actions == {"read"}


@pytest.mark.parametrize("text", ["short", "x" * 129, "with.a.dot.in.its.name", "with space in it ...", ""])
def test_not_everything_is_a_channel_s_name(text: str) -> None:
    assert not is_channel(text)
