"""Task objects of Django's own interface, noted where they are made.

They may be defined in any module, and the registry reads the `tasks` modules only. Imports no Django.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The first Task of each function: the one that its decorator made. Later ones come from `using`.
_first: dict[Callable[..., Any], Any] = {}


def note(task: Any) -> None:
    """Remember a Task if it is the first one of its function."""
    _first.setdefault(task.func, task)


def tasks() -> list[Any]:
    """Return the noted Tasks, in the order of their making."""
    return list(_first.values())
