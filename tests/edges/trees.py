"""A tree for tests that are a crowd by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.helpers import Tree

#: LIMITS of the tests' project. What is a limit per address, or per second, has to be raised here: thousands of
#: clients come from one address, all at once, and some of them with tokens that are none.
LIMITS: dict[str, Any] = {
    "accepts_per_second": 10_000,
    "auth_failures": 0,
    "streams_per_token": 1_000,
    "cancel_grace_seconds": 1.0,
    "kill_grace_seconds": 0.5,
    "stop_grace_seconds": 3.0,
}


def edge_tree(limits: Mapping[str, Any] | None = None, **env: str) -> Tree:
    """Return a tree of the tests' project, with LIMITS and those given, not started yet."""
    return Tree(runners=4, env={"TASKKIT_LIMITS": json.dumps({**LIMITS, **(limits or {})}), **env})
