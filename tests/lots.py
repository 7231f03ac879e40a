"""A group's tests in lots: one pytest each, several of them side by side."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent

MOMENTS = "tests/chaos/test_failpoints.py"
GUARDS = "tests/chaos/test_mutants.py"

#: What pytest is asked for by group.
FOLDERS = {
    "moments": (MOMENTS,),
    "guards": (GUARDS,),
    "e2e": ("tests/e2e", "-m", "not alone"),
    "unit": ("tests/unit",),
    "edges": ("tests/edges",),
    "arch": ("tests/arch",),
    "alone": ("tests/e2e", "-m", "alone"),
    "chaos": ("tests/chaos", f"--ignore={MOMENTS}", f"--ignore={GUARDS}"),
    "bench-smoke": ("tests/bench",),
}

#: What pytest leaves with when nothing was selected: right with `-k`, wrong without.
NO_TESTS_COLLECTED = 5

#: Seconds for one lot. The longest takes 350 on two cores; a thread that does not end keeps pytest for ever.
LOT_SECONDS = 900.0

#: Seconds between two looks at who has ended.
LOOK = 0.05


class Work(Protocol):
    """What can be performed beside others."""

    group: str
    passed: int
    failed: int
    late: set[str]
    seconds: float

    def start(self) -> None: ...
    def has_ended(self) -> bool: ...
    def finish(self) -> None: ...


class Lot:
    """One pytest over a group, or over some files of it; not started yet.

    Args:
      arguments: further ones of pytest; with any, it is no failure that nothing was selected.
      paths: the files; by default the group's own.
      beside: whether others run meanwhile; what it says is printed when it has ended then.

    Attributes:
      passed, failed: how many tests, once it is finished.
      late: names of those that passed the second time.
      seconds: how long it ran.
    """

    def __init__(
        self,
        group: str,
        arguments: Sequence[str],
        paths: Sequence[str] | None = None,
        *,
        beside: bool = False,
    ) -> None:
        self.group = group
        self.passed = self.failed = 0
        self.late: set[str] = set()
        self.seconds = 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="bulkhead-report-")
        self._home = Path(self._folder.name)
        self._output = self._home / "output"
        self._selective = bool(arguments)
        self._beside = beside
        self._process: subprocess.Popen[bytes] | None = None
        tests, *options = FOLDERS[group]
        self._command = [sys.executable, "-m", "pytest", *([tests] if paths is None else paths), *options]
        self._command += ["--durations=5", "--durations-min=1", "-o", f"cache_dir={self._home / 'cache'}"]
        self._command += arguments

    def start(self) -> None:
        """Start it."""
        self._start([*self._command, f"--junitxml={self._home / 'first.xml'}"])

    def _start(self, command: Sequence[str]) -> None:
        print("$", " ".join(command), "&" if self._beside else "", flush=True)
        self._began = time.monotonic()
        if self._beside:
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        else:
            self._process = subprocess.Popen(command, cwd=ROOT)

    def has_ended(self) -> bool:
        """Whether it has; one that takes longer than LOT_SECONDS hangs, is killed, and has failed."""
        assert self._process is not None
        if self._process.poll() is None and time.monotonic() - self._began > LOT_SECONDS:
            print("not done in time; killed", file=sys.stderr, flush=True)
            self._process.kill()
            self._process.wait()
        return self._process.poll() is not None

    def finish(self) -> None:
        """Wait for its end, and count."""
        code = self._wait()
        self.seconds = time.monotonic() - self._began
        if self._beside:
            print(f"\n== {self.group} ==\n{self._output.read_text(errors='replace')}", flush=True)
        self.passed, self.failed = count(self._home / "first.xml", code, self._selective)

    def _wait(self) -> int:
        while not self.has_ended():
            time.sleep(LOOK)
        assert self._process is not None
        return self._process.wait()

    def repeat(self) -> None:
        """Perform what has failed once more; nothing runs beside it now."""
        doubtful = failures(self._home / "first.xml")
        if not doubtful:  # pytest itself has failed
            return
        self._beside = False
        report = self._home / "second.xml"
        again = ["--last-failed", "--last-failed-no-failures=none", f"--junitxml={report}"]
        self._start([*self._command, *again])
        code = self._wait()
        passed, failed = count(report, code, selective=False)
        if code == 0 and failed == 0 and passed >= len(doubtful):
            self.late = doubtful
        elif report.exists():
            self.late = doubtful - failures(report) if passed + failed >= len(doubtful) else set()
        self.passed += len(self.late)
        self.failed -= len(self.late)

    def interrupt(self) -> None:
        """Tell it to stop: it ends its trees then."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def is_gone_within(self, seconds: float) -> bool:
        """Wait for its end; whether it came in time."""
        try:
            return self._process is None or self._process.wait(max(0.0, seconds)) is not None
        except subprocess.TimeoutExpired:
            return False

    def close(self) -> None:
        """Remove what it has written; it is killed if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def perform(lots: Sequence[Work], hands: int) -> None:
    """Run lots in their order, so many at once."""
    waiting, running = list(lots), list[Work]()
    while waiting or running:
        while waiting and len(running) < hands:
            running.append(waiting.pop(0))
            running[-1].start()
        for lot in [lot for lot in running if lot.has_ended()]:
            running.remove(lot)
            lot.finish()
        time.sleep(LOOK)


def close(lots: Sequence[Lot], patience: float = 5.0) -> None:
    """End what still runs.

    Args:
      patience: seconds in which they may end by themselves. A Ctrl-C has reached them as well, and another one
        would end them in the middle of their cleaning up.
    """
    for seconds in (patience, 12.0):  # less than the 20 s after which .ci/run kills
        end = time.monotonic() + seconds
        running = [lot for lot in lots if not lot.is_gone_within(end - time.monotonic())]
        if seconds == patience:
            for lot in running:
                lot.interrupt()
    for lot in lots:
        lot.close()


def deal(folder: str, hands: int) -> list[list[str]]:
    """Return the test files of a folder in so many lots of about the same size; long files take long."""
    files = sorted((ROOT / folder).rglob("test_*.py"), key=lambda path: (-path.stat().st_size, path.name))
    lots: list[list[Path]] = [[] for _ in range(hands)]
    for file in files:
        min(lots, key=lambda lot: sum(path.stat().st_size for path in lot)).append(file)
    return [sorted(str(file.relative_to(ROOT)) for file in lot) for lot in lots]


# --- what pytest reports ------------------------------------------------------------------------------------------


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
