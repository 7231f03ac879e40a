"""The tree around a courier under test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.taskkit.courier.harness import Tree, tree


@pytest.fixture
def quiet_tree(django_project: Any, tmp_state_dir: Path) -> Iterator[Tree]:
    """Give a tree whose courier has not been started."""
    from taskkit import outbox

    outbox._addresses.clear()  # a process remembers for 5 s where it poked: the former test's tree
    with tree(tmp_state_dir) as made:
        yield made


@pytest.fixture
def linked(quiet_tree: Tree) -> Tree:
    """Give a tree whose courier turns, linked to the test as its gateway."""
    assert quiet_tree.start()
    quiet_tree.link()
    return quiet_tree
