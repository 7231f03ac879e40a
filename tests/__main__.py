"""Every check of this project, in one command.

    python -m tests [--without NAME]... [-- ARGUMENTS OF PYTEST]

What fails is performed once more at the end, when nothing runs beside it, and is named in the summary whatever comes
of that: a shared machine stands still for seconds now and then, and tests with a score of real processes notice. What
fails twice has failed. (CPython's own test runner has the same rule.)

Exit codes: 0 everything passed, 1 something failed, 2 a system package is missing or a flag is wrong (then no
test ran).
"""

from __future__ import annotations

import argparse
import compileall
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, NamedTuple

from tests.lots import FOLDERS, ROOT, Lot, Work, close, deal, perform

APT_FILE = ROOT / "tests" / "apt.txt"


class Phase(NamedTuple):
    """Groups whose lots are performed side by side.

    Attributes:
      hands: how many lots at once.
      dealt: the lots of each group. They take turns, so that what computes runs beside what waits for processes to
        come back; what takes longest begins.
    """

    hands: int
    dealt: dict[str, int]


#: One after the other. For about half of its time a lot waits, so three keep two cores busy; those that kill whatever
#: lives in a tree for minutes have one neighbour, and what measures time has none.
PHASES = (
    Phase(3, {"moments": 1, "e2e": 5, "unit": 4, "edges": 2, "bench-smoke": 1, "arch": 1}),
    Phase(2, {"guards": 1, "chaos": 1}),
    Phase(1, {"alone": 1}),
)

GROUPS = ("lint", *(group for phase in PHASES for group in phase.dealt))

#: What every process of a tree loads. Where PYTHONDONTWRITEBYTECODE is set, each would compile it: a tree costs 2.2 s
#: of CPU then instead of 1.5 s, and there are some five hundred.
COMPILED = ("supervisor", "gateway", "taskkit", "deploy", "tests")

LINTERS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))

_PACKAGE = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+)\s*(\[(?P<group>[\w-]+)\])?\s*#\s*(?P<command>[\w-]+):\s*\S.*"
)


@dataclass(frozen=True)
class Package:
    """One line of apt.txt; `group` None means that all groups need it."""

    name: str
    group: str | None
    command: str


@dataclass(frozen=True)
class Outcome:
    """What one group came to.

    Attributes:
      seconds: of its lots, together.
      late: names of the tests that passed the second time only.
    """

    group: str
    passed: int
    failed: int
    seconds: float
    late: tuple[str, ...] = ()


#: Failures in all groups that get a second chance. More of them are no accident.
DOUBTFUL = 20


def read_packages(text: str) -> list[Package]:
    """Return the packages listed in apt.txt.

    Raises:
      ValueError: a line does not have the form `package [group] # command: why`.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _PACKAGE.fullmatch(line.strip())
        if match is None or match["group"] not in (None, *GROUPS):
            raise ValueError(f"apt.txt:{number}: write `package [group] # command: why`, not {line!r}")
        found.append(Package(match["name"], match["group"], match["command"]))
    return found


def is_installed(package: Package) -> bool:
    """Whether the package is there, or one that provides it; on a system without dpkg, whether its command is."""
    if shutil.which("dpkg-query") is None:
        return shutil.which(package.command) is not None
    return package.name in installed_packages()


@functools.cache
def installed_packages() -> frozenset[str]:
    """Return the names of what dpkg has installed, and those that it stands for: NodeSource's `nodejs` has `npm`."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}\t${Package}, ${Provides}\n"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    found = set()
    for line in answer.splitlines():
        status, _, names = line.partition("\t")
        if status == "installed":
            found |= {name.partition("(")[0].strip() for name in names.split(",")}
    return frozenset(found)


def install(names: Sequence[str]) -> bool:
    """Install Debian packages as root; return whether that worked."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *names]
    for update in (False, True):  # the lists may be there already; they are fetched when they are not
        if update:
            subprocess.run(["apt-get", "update"], check=False, env=environment)
        installed_packages.cache_clear()
        if subprocess.run(command, check=False, env=environment).returncode == 0:
            return True
    return False


def provide_packages(packages: Sequence[Package]) -> bool:
    """Return whether all packages are there, after installing what is missing if this is root."""
    missing = [package.name for package in packages if not is_installed(package)]
    if not missing:
        return True
    if os.geteuid() == 0 and shutil.which("apt-get") and install(missing):
        return True
    print(
        "System packages are missing that tests need (tests/apt.txt says why). Install them with:",
        file=sys.stderr,
    )
    print(f"    sudo apt-get install --yes --no-install-recommends {' '.join(missing)}", file=sys.stderr)
    return False


def compile_sources() -> None:
    """Write the byte code of all modules but those of tests, which are loaded once."""
    for package in COMPILED:
        compileall.compile_dir(ROOT / package, quiet=1, rx=re.compile(r"/test_\w+\.py$"))


class Lint:
    """The linters, at once; they go beside the lots of tests as one of them."""

    group = "lint"

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self.late: set[str] = set()
        self.seconds = 0.0
        self._running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def start(self) -> None:
        """Start them."""
        self._began = time.monotonic()
        for linter in LINTERS:
            command, said = [sys.executable, "-m", *linter], tempfile.TemporaryFile()
            print("$", " ".join(command), "&", flush=True)
            process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            self._running.append((process, said))

    def has_ended(self) -> bool:
        """Whether all have."""
        return all(process.poll() is not None for process, _ in self._running)

    def finish(self) -> None:
        """Wait for their end, count, and print what they have said."""
        print("\n== lint ==", flush=True)
        for process, said in self._running:
            self.failed += process.wait() != 0
            said.seek(0)
            print(said.read().decode(errors="replace"), end="", flush=True)
        self.passed = len(self._running) - self.failed
        self.seconds = time.monotonic() - self._began

    def close(self) -> None:
        """End what still runs."""
        for process, said in self._running:
            process.kill()
            process.wait()
            said.close()


def summary(outcomes: Sequence[Outcome], without: Collection[str], seconds: float) -> str:
    """Return the closing lines; `seconds` is how long all of it took, which is less than all groups together."""
    lines = [
        f"  {outcome.group:<12}{outcome.passed:>5} passed, {outcome.failed} failed in {outcome.seconds:.1f} s"
        for outcome in outcomes
    ]
    lines += [f"  passed the second time only: {name}" for outcome in outcomes for name in outcome.late]
    lines += [f"  {group:<12} NOT RUN" for group in GROUPS if group in without]
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    return "\n".join([*lines, f"{passed} passed, {failed} failed in {seconds:.1f} s"])


def parse(arguments: Sequence[str]) -> tuple[set[str], list[str]]:
    """Return (groups to leave out, arguments of pytest)."""
    own, for_pytest = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, for_pytest = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests", description="Run every check of this project.")
    parser.add_argument("--without", action="append", default=[], choices=GROUPS, help="leave a group out")
    return set(parser.parse_args(own).without), for_pytest


def main(arguments: Sequence[str]) -> int:
    """Run all groups but those left out; return the exit code."""
    without, for_pytest = parse(arguments)
    packages = read_packages(APT_FILE.read_text())
    if not provide_packages([package for package in packages if package.group not in without]):
        return 2
    # A shell lets what it runs in the background ignore a Ctrl-C; pytest would never stop its trees then.
    before = signal.signal(signal.SIGINT, interrupt_once)
    started = time.monotonic()
    compile_sources()
    try:
        outcomes = run_groups([group for group in GROUPS if group not in without], for_pytest)
    finally:
        signal.signal(signal.SIGINT, before)
    print("\n== summary ==")
    print(summary(outcomes, without, time.monotonic() - started))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def interrupt_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, and never again: `timeout` sends two, and what is begun has to be ended."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_groups(groups: Sequence[str], arguments: Sequence[str]) -> list[Outcome]:
    """Run the groups, then what has failed once more."""
    lint = [Lint()] if "lint" in groups else []
    phases = [plan(phase, groups, arguments) for phase in PHASES]
    lots = [lot for dealt in phases for lot in dealt]
    everything: list[Work] = [*lint, *lots]
    try:
        perform([*phases[0][:1], *lint, *phases[0][1:]], PHASES[0].hands)
        for phase, dealt in zip(PHASES[1:], phases[1:], strict=True):
            perform(dealt, phase.hands)
        if 0 < sum(lot.failed for lot in lots) <= DOUBTFUL:
            print("\n== once more ==", flush=True)
            for lot in lots:
                if lot.failed:
                    lot.repeat()
    finally:
        for linters in lint:
            linters.close()
        close(lots)
    return [outcome_of(group, [lot for lot in everything if lot.group == group]) for group in groups]


def plan(phase: Phase, groups: Collection[str], arguments: Sequence[str]) -> list[Lot]:
    """Return the lots of a phase in their order."""
    dealt = []
    for group, count in phase.dealt.items():
        if group in groups:
            files = deal(FOLDERS[group][0], count) if count > 1 else [None]
            dealt.append([Lot(group, arguments, paths, beside=phase.hands > 1) for paths in files])
    return [lot for turn in itertools.zip_longest(*dealt) for lot in turn if lot is not None]


def outcome_of(group: str, lots: Sequence[Work]) -> Outcome:
    """Return what the lots of a group came to together."""
    late = tuple(sorted(name for lot in lots for name in lot.late))
    seconds = sum(lot.seconds for lot in lots)
    return Outcome(group, sum(lot.passed for lot in lots), sum(lot.failed for lot in lots), seconds, late)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
