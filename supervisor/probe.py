"""Imports what another version of the supervisor needs, to see whether it can: `python -m supervisor.probe`.

An upgrade asks first: an image that cannot be imported would take the whole tree along.
"""

from __future__ import annotations

import importlib
import sys

_ROOMS = ("supervisor.daemon", "supervisor.cli.main", "taskkit.wire.codec", "taskkit.tokens")


def main() -> int:
    """Import them; return 0. What they raise is the answer."""
    for name in _ROOMS:
        importlib.import_module(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
