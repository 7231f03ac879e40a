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
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APT_FILE = ROOT / "tests" / "apt.txt"

MOMENTS = "tests/chaos/test_failpoints.py"
GUARDS = "tests/chaos/test_mutants.py"

#: What pytest is asked for by group, in the order they run: cheap ones first.
FOLDERS = {
    "unit": ("tests/unit",),
    "arch": ("tests/arch",),
    "guards": (GUARDS,),
    "moments": (MOMENTS,),
    "e2e": ("tests/e2e", "-m", "not alone"),
    "alone": ("tests/e2e", "-m", "alone"),
    "edges": ("tests/edges",),
    "chaos": ("tests/chaos", f"--ignore={MOMENTS}", f"--ignore={GUARDS}"),
    "bench-smoke": ("tests/bench",),
}
GROUPS = ("lint", *FOLDERS)

#: The group that runs beside those in front of it: for most of its time it waits for processes to come back. What
#: follows it measures time, and has the machine for itself.
BESIDE = "moments"

#: Groups whose files are dealt to several processes. What measures time is marked `alone`, and is.
SIDE_BY_SIDE = {"unit": 2, "e2e": 2, "edges": 2}

LINTERS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))

#: What pytest leaves with when nothing was selected: right with `-k`, wrong without.
NO_TESTS_COLLECTED = 5

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
    """What one group came to; `late` names the tests that passed the second time only."""

    group: str
    passed: int
    failed: int
    seconds: float
    late: tuple[str, ...] = ()


#: Failures in all groups that get a second chance. More of them are no accident.
DOUBTFUL = 20

#: Seconds for one group. The longest takes 450 on two cores; a thread that does not end keeps pytest for ever.
GROUP_SECONDS = 900.0


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


def run(command: Sequence[str]) -> int:
    """Run a command visibly; return its exit code. An interrupt reaches it, and is waited for.

    One that takes longer than GROUP_SECONDS hangs: it is killed, and has failed.
    """
    print("$", " ".join(command), flush=True)
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            return process.wait(GROUP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"not done within {GROUP_SECONDS:.0f} s; killed", file=sys.stderr, flush=True)
            process.kill()
            return process.wait() or 1
        except KeyboardInterrupt:
            process.wait(timeout=30)
            raise


def run_lint() -> Outcome:
    """Run the linters, all of them even if one complains."""
    started = time.monotonic()
    codes = [run([sys.executable, "-m", *linter]) for linter in LINTERS]
    failed = sum(code != 0 for code in codes)
    return Outcome("lint", len(codes) - failed, failed, time.monotonic() - started)


def count(report: Path, code: int, selective: bool) -> tuple[int, int]:
    """Return (passed, failed) of a JUnit report; a pytest that complains counts as one failure at least.

    A skipped test has failed. One that fails in its call and in its teardown is one test, though pytest counts two.
    """
    passed, failed = len(cases(report)), len(cases(report, "failure", "error", "skipped"))
    accepted = (0, NO_TESTS_COLLECTED) if selective else (0,)
    return passed - failed, max(failed, code not in accepted)


def failures(report: Path) -> set[str]:
    """Return the names of the tests that have failed by a JUnit report."""
    return cases(report, "failure", "error")


def cases(report: Path, *outcomes: str) -> set[str]:
    """Return the names of a JUnit report's tests: those with one of these outcomes, or all."""
    if not report.exists():
        return set()
    return {
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(report).getroot().iter("testcase")
        if not outcomes or any(case.find(outcome) is not None for outcome in outcomes)
    }


class Lot:
    """One pytest over a group, or over some files of it, as a context manager.

    Args:
      beside: whether others run meanwhile; what it says is printed when it is waited for then.

    Attributes:
      passed, failed: how many tests, once it is finished.
      late: names of those that passed the second time.
    """

    def __init__(
        self,
        group: str,
        arguments: Sequence[str],
        paths: Sequence[str] | None = None,
        *,
        beside: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bulkhead-report-")
        self._home = Path(self._folder.name)
        self._output = self._home / "output"
        self._selective = bool(arguments)
        self._beside = beside
        self.passed = self.failed = 0
        self.late: set[str] = set()
        tests, *options = FOLDERS[group]
        self._command = [sys.executable, "-m", "pytest", *([tests] if paths is None else paths), *options]
        self._command += ["--durations=5", "--durations-min=1", "-o", f"cache_dir={self._home / 'cache'}"]
        self._command += arguments
        self._started = time.monotonic()
        self._process = self._start([*self._command, f"--junitxml={self._home / 'first.xml'}"])

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        print("$", " ".join(command), "&" if self._beside else "", flush=True)
        if not self._beside:
            return subprocess.Popen(command, cwd=ROOT)
        with self._output.open("wb") as output:
            return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        """Wait for its end.

        One that takes longer than GROUP_SECONDS hangs: it is killed, and has failed.
        """
        code = self._wait(GROUP_SECONDS - (time.monotonic() - self._started))
        if self._beside:
            print(self._output.read_text(errors="replace"), flush=True)
        self.passed, self.failed = count(self._home / "first.xml", code, self._selective)

    def _wait(self, seconds: float) -> int:
        try:
            return self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            print("not done in time; killed", file=sys.stderr, flush=True)
            self._process.kill()
            return self._process.wait() or 1

    def repeat(self) -> None:
        """Perform what has failed once more; nothing runs beside it now."""
        doubtful = failures(self._home / "first.xml")
        if not doubtful:  # pytest itself has failed
            return
        self._beside = False
        report = self._home / "second.xml"
        again = ["--last-failed", "--last-failed-no-failures=none", f"--junitxml={report}"]
        self._process = self._start([*self._command, *again])
        code = self._wait(GROUP_SECONDS)
        passed, failed = count(report, code, selective=False)
        if code == 0 and failed == 0 and passed >= len(doubtful):
            self.late = doubtful
        elif report.exists():
            self.late = doubtful - failures(report) if passed + failed >= len(doubtful) else set()
        self.passed += len(self.late)
        self.failed -= len(self.late)

    def close(self) -> None:
        """End it if it still runs: it stops its trees then."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()


def deal(folder: str, hands: int) -> list[list[str]]:
    """Return the test files of a folder in so many lots of about the same size; long files take long."""
    files = sorted((ROOT / folder).rglob("test_*.py"), key=lambda path: (-path.stat().st_size, path.name))
    lots: list[list[Path]] = [[] for _ in range(hands)]
    for file in files:
        min(lots, key=lambda lot: sum(path.stat().st_size for path in lot)).append(file)
    return [sorted(str(file.relative_to(ROOT)) for file in lot) for lot in lots]


def summary(outcomes: Sequence[Outcome], without: Collection[str], seconds: float) -> str:
    """Return the closing lines; `seconds` is how long all of it took."""
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
    started = time.monotonic()
    with contextlib.ExitStack() as lots:
        outcomes = run_groups([group for group in GROUPS if group not in without], for_pytest, lots)
    print("\n== summary ==")
    print(summary(outcomes, without, time.monotonic() - started))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def run_groups(groups: Sequence[str], arguments: Sequence[str], lots: contextlib.ExitStack) -> list[Outcome]:
    """Run the groups in their order, then what has failed once more; `lots` closes what was begun."""

    def begin(group: str, paths: Sequence[str] | None = None, *, beside: bool = False) -> Lot:
        lot = Lot(group, arguments, paths, beside=beside)
        lots.callback(lot.close)
        return lot

    background = begin(BESIDE, beside=True) if BESIDE in groups else None
    outcomes, doubtful = [], []
    for group in groups:
        print(f"\n== {group} ==", flush=True)
        begun = time.monotonic()
        if group == "lint":
            outcomes.append(run_lint())
            continue
        if group == BESIDE and background is not None:
            mine = [background]
        elif group in SIDE_BY_SIDE:
            mine = [begin(group, lot, beside=True) for lot in deal(FOLDERS[group][0], SIDE_BY_SIDE[group])]
        else:
            mine = [begin(group)]
        for lot in mine:
            lot.finish()
        doubtful.append((len(outcomes), mine))
        outcomes.append(outcome_of(group, mine, time.monotonic() - begun))
    if 0 < sum(outcome.failed for outcome in outcomes) <= DOUBTFUL:
        print("\n== once more ==", flush=True)
        for index, mine in doubtful:
            for lot in mine:
                if lot.failed:
                    lot.repeat()
            outcomes[index] = outcome_of(outcomes[index].group, mine, outcomes[index].seconds)
    return outcomes


def outcome_of(group: str, lots: Sequence[Lot], seconds: float) -> Outcome:
    """Return what the lots of a group came to together."""
    late = tuple(sorted(name for lot in lots for name in lot.late))
    return Outcome(group, sum(lot.passed for lot in lots), sum(lot.failed for lot in lots), seconds, late)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
