"""The tree that a project's tests start for themselves."""

from __future__ import annotations

from datetime import timedelta

import httpx
import pytest

from tests.conftest import DjangoProject


def test_it_performs_what_the_test_commits(django_project: DjangoProject) -> None:
    from taskkit import submit
    from taskkit.testing import live_tree, wait_for_run

    with live_tree(environment={"BULKHEAD_TEST_DB": str(django_project.database)}) as tree:
        fine, dead = submit("proj.add", kwargs={"a": 1, "b": 2}), submit("proj.die")
        assert wait_for_run(fine, 20.0).result == 3
        assert wait_for_run(dead, 20.0).error["code"] == "crashed"
        answer = httpx.get(
            f"{tree.url}/api/v1/runs/{fine.id}", headers={"Authorization": f"Bearer {tree.token()}"}
        )
        assert answer.json()["status"] == "SUCCESSFUL"
        with pytest.raises(AssertionError, match="is READY after 0 s"):
            wait_for_run(submit("proj.add", kwargs={"a": 1, "b": 2}, run_after=timedelta(hours=1)), 0)
