"""Where the console script `bulkhead` enters, on its way to the package `supervisor`.

PyPI's unrelated `supervisor` installs a package of the same name as ours. `gateway` is the one of our three
names that it leaves alone: from here the check for a mixed environment is found by its place, not by its name.
The gateway's process never imports this module.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

#: Exit code: bad configuration (CONTRACT §5).
_EXIT_CODE: Final = 2


def _load(path: Path) -> Any:
    spec = spec_from_file_location("bulkhead_mixed", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Run the command line; return its exit code, 2 when parts of this installation are missing."""
    path = Path(__file__).resolve().parent.parent / "supervisor" / "mixed.py"
    try:
        mixed = _load(path)
    except FileNotFoundError:
        sys.stderr.write(
            f"bulkhead: {path} is missing, the installation is damaged.\n"
            "Remedy: pip install --force-reinstall --no-deps django-bulkhead\n"
        )
        return _EXIT_CODE
    return int(mixed.main())
