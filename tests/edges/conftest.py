"""The clients, one of each for all tests, plus what every end-to-end test must leave behind: nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import _subreaper, leaves_nothing
from tests.edges.listeners import Helper, Httpx, Listener, Sockets, browser, node
from tests.edges.trees import edge_tree
from tests.helpers import Tree

__all__ = ["_subreaper", "leaves_nothing"]


@pytest.fixture(scope="session")
def plain_tree(_subreaper: None) -> Iterator[Tree]:
    """Give a tree as it is without settings, for all tests that leave it as they found it."""
    with edge_tree() as tree:
        yield tree


@pytest.fixture(scope="session")
def chromium(_subreaper: None) -> Iterator[Helper]:
    """Give the browser."""
    with browser() as helper:
        yield helper


@pytest.fixture(scope="session")
def npm(_subreaper: None) -> Iterator[Helper]:
    """Give npm's EventSource."""
    with node() as helper:
        yield helper


@pytest.fixture(scope="session")
def listeners(chromium: Helper, npm: Helper) -> list[Listener]:
    """Give all four."""
    return [Sockets(), Httpx(), npm, chromium]
