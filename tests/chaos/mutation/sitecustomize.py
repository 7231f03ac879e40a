"""Loads one module of a mutated tree without one of its guards. Python imports this by itself at start.

Only where a test has put this folder on PYTHONPATH; BULKHEAD_MUTANT names the mutant. A text that does not occur
exactly once ends the process: a mutant that does not apply any more must not pass for one that is harmless.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

from tests.chaos.mutation.mutants import MUTANTS, Change


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the changed source; nothing of it is cached."""

    changes: Sequence[Change] = ()

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        for change in self.changes:
            if source.count(change.old) != 1:
                os.write(2, f"the mutant does not fit {fullname}: {change.old!r}\n".encode())
                os._exit(70)
            source = source.replace(change.old, change.new)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one mutant."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        changes = [change for change in self._changes if change.module == fullname]
        if not changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.changes = changes
        spec.loader = loader
        return spec


if name := os.environ.get("BULKHEAD_MUTANT"):
    sys.meta_path.insert(0, _Finder(MUTANTS[name]))
