"""Every check of this project, in one command.

    python -m tests [--without NAME]... [-- ARGUMENTS OF PYTEST]

Exit codes: 0 everything passed, 1 something failed, 2 a system package is missing or a flag is wrong (then no
test ran).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
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

#: Folders by pytest group, in the order they run: cheap ones first.
FOLDERS = {
    "unit": "tests/unit",
    "arch": "tests/arch",
    "e2e": "tests/e2e",
    "chaos": "tests/chaos",
    "bench-smoke": "tests/bench",
}
GROUPS = ("lint", *FOLDERS)
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
    """What one group came to."""

    group: str
    passed: int
    failed: int
    seconds: float


#: Seconds for one group. The longest takes 200 on two cores; a thread that does not end keeps pytest for ever.
GROUP_SECONDS = 600.0


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
    """Whether the package is there; on a system without dpkg, whether its command is."""
    if shutil.which("dpkg-query") is None:
        return shutil.which(package.command) is not None
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package.name]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout == "installed"


def install(names: Sequence[str]) -> bool:
    """Install Debian packages as root; return whether that worked."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *names]
    for update in (False, True):  # the lists may be there already; they are fetched when they are not
        if update:
            subprocess.run(["apt-get", "update"], check=False, env=environment)
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
    """Return (passed, failed) of a JUnit report; a pytest that complains counts as one failure at least."""
    passed = failed = 0
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            bad = sum(int(suite.get(name, "0")) for name in ("failures", "errors", "skipped"))
            failed += bad
            passed += max(0, int(suite.get("tests", "0")) - bad)
    accepted = (0, NO_TESTS_COLLECTED) if selective else (0,)
    return passed, max(failed, code not in accepted)


def run_pytest(group: str, arguments: Sequence[str]) -> Outcome:
    """Run one group in a process of its own."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bulkhead-report-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", FOLDERS[group], "--durations=5", "--durations-min=1"]
        code = run([*command, f"--junitxml={report}", *arguments])
        passed, failed = count(report, code, selective=bool(arguments))
    return Outcome(group, passed, failed, time.monotonic() - started)


def summary(outcomes: Sequence[Outcome], without: Collection[str]) -> str:
    """Return the closing lines."""
    lines = [
        f"  {outcome.group:<12}{outcome.passed:>5} passed, {outcome.failed} failed in {outcome.seconds:.1f} s"
        for outcome in outcomes
    ]
    lines += [f"  {group:<12} NOT RUN" for group in GROUPS if group in without]
    passed = sum(outcome.passed for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
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
    outcomes = []
    for group in GROUPS:
        if group not in without:
            print(f"\n== {group} ==", flush=True)
            outcomes.append(run_lint() if group == "lint" else run_pytest(group, for_pytest))
    print("\n== summary ==")
    print(summary(outcomes, without))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
