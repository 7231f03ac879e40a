"""Imports what another version of the supervisor needs, to see whether it can: `python -m supervisor.probe FD`.

An upgrade asks first: an image that cannot be imported, or does not understand what is handed over (the file behind
FD), would take the whole tree along.
"""

from __future__ import annotations

import importlib
import sys

_ROOMS = (
    "supervisor.daemon",
    "supervisor.image",
    "supervisor.cli.main",
    "taskkit.wire.codec",
    "taskkit.tokens",
)


def main(argv: list[str]) -> int:
    """Import them, take the hand-over; return 0. What that raises is the answer."""
    for name in _ROOMS:
        importlib.import_module(name)
    from supervisor import handover
    from taskkit.settings import load_settings

    load_settings(handover.read(int(argv[1])).ready.settings)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
