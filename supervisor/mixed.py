"""Refuses an environment where PyPI's `supervisor` or `taskkit` is installed beside this project.

Both install packages of the same import names as ours, so pip lets either overwrite the other; which one wins
depends on the order. Hence:

Rule 1: this file imports the standard library only, at its top.

Rule 2: the console script enters at `gateway.command`, which loads this file by its place beside `gateway`.
So the command can still say what is wrong when the name `supervisor` is somebody else's (an editable install
always loses to PyPI's files, which lie earlier on `sys.path`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

_OURS = "django-bulkhead"
_PACKAGES = ("supervisor", "gateway", "taskkit")
_RECORDED = re.compile(rf"^(?:{'|'.join(_PACKAGES)})/", re.MULTILINE)

#: Exit code: bad configuration (CONTRACT §5).
_EXIT_CODE = 2


def _shares_a_name(distribution: Distribution) -> bool:
    """Whether it installs a package of one of our names, by its list of packages or else of files."""
    top_level = distribution.read_text("top_level.txt")
    if top_level is not None:
        return not set(_PACKAGES).isdisjoint(top_level.split())
    return _RECORDED.search(distribution.read_text("RECORD") or "") is not None


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def foreign_distributions() -> list[str]:
    """Return the names of installed distributions, other than ours, that provide one of our import names."""
    found = {d.name for d in distributions() if _shares_a_name(d)}
    return sorted(name for name in found if _normalised(name) != _OURS)


def _homes() -> Iterator[tuple[str, Path | None]]:
    """Yield where each package would be imported from; None when it is missing or has lost its `__init__`."""
    for name in _PACKAGES:
        spec = PathFinder.find_spec(name)
        yield name, None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent.parent


def problem() -> str | None:
    """Return what is wrong with this environment, with its remedy, or None.

    Either another distribution shares our import names; or its removal took files of ours along, or our
    packages come from different places.
    """
    foreign = foreign_distributions()
    if foreign:
        names = " ".join(foreign)
        return (
            f"bulkhead cannot run beside the distribution {' and '.join(map(repr, foreign))}: it installs "
            "packages of the same names (supervisor, taskkit).\n"
            f"Remedy: pip uninstall {names} && pip install --force-reinstall --no-deps {_OURS}\n"
            "(a checkout: pip install --no-deps -e . instead), or give one of them its own environment."
        )
    homes = dict(_homes())
    if None in homes.values() or len(set(homes.values())) != 1:
        places = ", ".join(f"{name}: {home or 'damaged or missing'}" for name, home in homes.items())
        return (
            f"the installation of {_OURS} is damaged ({places}).\n"
            f"Remedy: pip install --force-reinstall --no-deps {_OURS}\n"
            "(a checkout: pip install --no-deps -e . instead)."
        )
    return None


def refuse() -> None:
    """Leave with exit code 2 if the environment is mixed.

    Raises:
      SystemExit: it is; standard error has the distribution's name and the remedy.
    """
    message = problem()
    if message is not None:
        sys.stderr.write(message + "\n")
        raise SystemExit(_EXIT_CODE)


def main() -> int:
    """Run the command line in an environment that is fit for it; return its exit code."""
    refuse()
    if sys.argv[1:2] == ["run"]:
        from supervisor.image import main as image

        return image()
    from supervisor.cli.main import main as command

    return command()
