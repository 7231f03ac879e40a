"""Fixtures for projects that test with pytest. Imports Django only when one of them is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def perform_submitted() -> Callable[..., Any]:
    """Give `taskkit.testing.perform_submitted`: performs in this process what was submitted so far."""
    from taskkit.testing import perform_submitted

    return perform_submitted


@pytest.fixture(scope="session")
def bulkhead_tree(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Give a `taskkit.testing.LiveTree` on the test databases, for all tests that want one."""
    with contextlib.suppress(pytest.FixtureLookupError):  # pytest-django makes the databases here
        request.getfixturevalue("django_db_setup")
    from taskkit.testing import live_tree

    with live_tree() as tree:
        yield tree
