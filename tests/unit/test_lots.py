"""Lots: what each comes to, in which order, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import __main__ as command
from tests import lots
from tests.helpers import ROOT, eventually
from tests.lots import Lot

PASSES = "def test_it(): pass\n"

#: Fails at first, is late in one, and never passes in another.
MIXED = """
import pathlib, pytest
@pytest.fixture
def there():
    mark = pathlib.Path({mark!r})
    there = mark.exists()
    mark.touch()
    yield there
    assert there
def test_late(there):
    assert there
def test_never(): assert False
def test_at_once(): pass
"""

#: Says that it has begun, then takes long; its fixture is cleaned up.
WAITS = """
import pathlib, pytest, time
@pytest.fixture
def cleaned():
    yield
    pathlib.Path({folder!r}, "cleaned").touch()
def test_it(cleaned):
    pathlib.Path({folder!r}, "begun").touch()
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a pytest within these tests load no plugin: that is most of what it takes."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def write(folder: Path, text: str, name: str = "test_it.py") -> str:
    """Write a file of tests; return its path."""
    (folder / name).write_text(text)
    return str(folder / name)


def test_what_fails_is_performed_once_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lot = Lot("arch", [], [write(tmp_path, MIXED.format(mark=str(tmp_path / "mark")))])
    try:
        lots.perform([lot], 1)
        assert (lot.passed, lot.failed) == (1, 2)
        lot.repeat()
        assert (lot.passed, lot.failed) == (2, 1)
        assert {name.rpartition("::")[2] for name in lot.late} == {"test_late"}
    finally:
        lots.close([lot])
    capfd.readouterr()


def test_a_lot_beside_others_is_printed_when_it_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        Lot("arch", [], [write(tmp_path, PASSES, f"test_{name}.py")], beside=True) for name in ("one", "two")
    ]
    try:
        lots.perform(made, 2)
    finally:
        lots.close(made)
    outcome = command.outcome_of("arch", made)
    assert (outcome.passed, outcome.failed) == (2, 0)
    assert outcome.seconds == sum(lot.seconds for lot in made)
    told = capsys.readouterr().out
    assert told.count("== arch ==") == told.count("= 1 passed in") == 2


def test_no_more_run_than_there_are_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[object] = []
    most = 0

    class Short:
        """Ends when it has been looked at as often as it is long."""

        def __init__(self, length: int) -> None:
            self.length = length

        def start(self) -> None:
            nonlocal most
            running.append(self)
            most = max(most, len(running))

        def has_ended(self) -> bool:
            self.length -= 1
            return self.length < 0

        def finish(self) -> None:
            running.remove(self)

    monkeypatch.setattr(lots, "LOOK", 0)
    lots.perform([Short(length) for length in (5, 0, 2, 1, 0, 3)], 3)  # type: ignore[misc]
    assert (running, most) == ([], 3)


def test_every_group_has_its_lots_and_what_measures_time_comes_last() -> None:
    phases = [command.plan(phase, command.GROUPS, []) for phase in command.PHASES]
    try:
        assert {lot.group for phase in phases for lot in phase} == lots.FOLDERS.keys()
        assert [lot.group for lot in phases[0][:3]] == ["moments", "e2e", "unit"]
        assert [lot.group for lot in phases[-1]] == ["alone"]
        assert command.PHASES[-1].hands == 1
    finally:
        lots.close([lot for phase in phases for lot in phase])


@pytest.mark.parametrize("folder", ["tests/e2e", "tests/unit"])
def test_every_file_is_dealt_to_somebody_once(folder: str) -> None:
    dealt = lots.deal(folder, 3)
    found = [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("test_*.py")]
    assert sorted(file for lot in dealt for file in lot) == sorted(found)
    sizes = [sum((ROOT / file).stat().st_size for file in lot) for lot in dealt]
    assert max(sizes) < 2 * min(sizes)


def test_lots_that_are_closed_clean_up_and_are_gone(tmp_path: Path) -> None:
    lot = Lot("unit", [], [write(tmp_path, WAITS.format(folder=str(tmp_path)))], beside=True)
    lot.start()
    eventually((tmp_path / "begun").exists, 60, "the test")
    lots.close([lot], patience=0.0)
    assert (tmp_path / "cleaned").exists()
    assert lot.has_ended()
    assert not lot._home.exists()


def test_an_interrupt_ends_all_lots(tmp_path: Path) -> None:
    """The command is told twice, as by `timeout`; it began where a Ctrl-C is ignored, as behind a shell's `&`."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, WAITS.format(folder=str(tmp_path / name)))
    program = (
        "import sys; from tests import __main__ as command; from tests.lots import Lot\n"
        "command.compile_sources = lambda: None; command.read_packages = lambda text: []\n"
        "command.plan = lambda phase, groups, arguments:"
        " [Lot('unit', [], [folder], beside=True) for folder in sys.argv[1:] if phase.hands == 3]\n"
        "sys.exit(command.main(['--without=lint']))"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *(str(tmp_path / name) for name in ("one", "two"))],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        for name in ("one", "two"):
            eventually((tmp_path / name / "begun").exists, 60, "the tests")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
    assert all((tmp_path / name / "cleaned").exists() for name in ("one", "two"))
    assert not list(tmp_path.glob("bulkhead-report-*"))


def test_a_pytest_that_dies_without_a_report_is_a_failure(tmp_path: Path) -> None:
    assert lots.count(tmp_path / "none.xml", 3, selective=False) == (0, 1)
    assert lots.count(tmp_path / "none.xml", lots.NO_TESTS_COLLECTED, selective=False) == (0, 1)
    assert lots.count(tmp_path / "none.xml", lots.NO_TESTS_COLLECTED, selective=True) == (0, 0)
