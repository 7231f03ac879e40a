"""What every end-to-end test must leave behind: nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from taskkit import linux
from tests import helpers


@pytest.fixture(scope="session", autouse=True)
def _subreaper() -> None:
    """Make orphans of a tree this process's children, so that none can hide under init."""
    linux.set_subreaper()


@pytest.fixture(autouse=True)
def leaves_nothing(_subreaper: None) -> Iterator[None]:
    """Fail the test when a process, socket file or descriptor that it made is still there.

    Trees that are still open (fixtures of a wider scope) do not count.
    """
    processes = helpers.strays()
    sockets = helpers.socket_files()
    descriptors = helpers.open_descriptors()
    yield
    left = helpers.wait_until_only(processes, timeout=3.0)
    complaints = [helpers.describe(process) for process in left]
    helpers.kill(left)  # the next test starts clean
    helpers.reap_children()
    complaints += [str(path) for path in helpers.socket_files() - sockets if not helpers.in_open_tree(path)]
    if helpers.open_trees() == 0:
        complaints += [
            f"descriptor {fd}: {target}"
            for fd, target in (helpers.open_descriptors() - descriptors)
            if target
        ]
    assert not complaints, "the test left: " + "; ".join(complaints)
